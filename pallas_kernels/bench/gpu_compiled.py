"""Compiles one program for an H200, in a process of its own; no GPU is needed.

    python -m pallas_kernels.bench.gpu_compiled backward null

prints what the compilers say, as JSON. It needs the packages in PACKAGES. XLA reads
where to dump what from the environment, when JAX starts it: hence the process.
"""

import glob
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

# One version of everything: registers and spills are those of these compilers.
PACKAGES = (
    "jax==0.10.2",
    "jax-cuda12-plugin==0.10.2",
    "jax-cuda12-pjrt==0.10.2",
    "nvidia-cuda-nvcc-cu12==12.9.86",
    "einops",
    "jaxtyping",
)

_DUMP = "KERNEL_DUMP"
_ITEM_SIZES = {"pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
# What XLA only names: no bytes move.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}


def compile_apart(
    python: pathlib.Path, direction: str, shape: tuple | None = None
) -> dict:
    """Compiles in another process: bytes, and each kernel's registers and spills.

    Raises:
      RuntimeError: The program does not compile; the end of what the compiler said.
    """
    package = str(pathlib.Path(__file__).parents[2])
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": package,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "XLA_FLAGS": f"--xla_dump_to={folder}",
            _DUMP: folder,
        }
        command = [str(python), "-m", "pallas_kernels.bench.gpu_compiled"]
        done = subprocess.run(
            [*command, direction, json.dumps(shape)],
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{direction} {shape}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def moved_bytes(program: str) -> int:
    """Bytes that a compiled program's operations read and write, each array once.

    An operation that reads a part of an array counts for all of it; what a kernel reads
    again comes from its caches or is not counted.
    """
    lines = program[program.index("\nENTRY ") :].splitlines()
    operation = re.compile(
        r"\s+(?:ROOT )?%(\S+) = (\(.*?\)(?= [a-z])|\S+) ([a-z][\w-]*)\((.*?)\)"
    )
    sizes, total = {}, 0
    for line in lines:
        if match := operation.match(line):
            name, types, kind, operands = match.groups()
            sizes[name] = _array_bytes(types)
            if kind not in _FREE:
                read = re.findall(r"%([\w.-]+)", operands)
                total += sizes[name] + sum(sizes[operand] for operand in read)
    return total


def _array_bytes(types: str) -> int:
    """The size of an array, or of a tuple of them, as XLA writes their types."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
    count = lambda dims: math.prod(int(n) for n in dims.split(",") if n)
    return sum(_ITEM_SIZES[dtype] * count(dims) for dtype, dims in arrays)


def _kernels(folder: str) -> dict[str, dict]:
    """Our kernels by name: what a thread and a block take of a multiprocessor."""
    (path,) = glob.glob(f"{folder}/*.thunk_sequence.txt")
    launch = r"(ssd_gpu\w+) grid: .*? threads: \[(\d+).*?shared_memory: (\d+) bytes"
    found = {
        name: {"threads": int(threads), "shared_bytes": int(shared)}
        for name, threads, shared in re.findall(launch, pathlib.Path(path).read_text())
    }
    for path in glob.glob(f"{folder}/*.ptx"):
        (name, *_) = re.findall(r"\.entry (\w+)", pathlib.Path(path).read_text()) or [
            ""
        ]
        if name in found:
            report = _assembled(path)
            (registers,) = re.findall(r"Used (\d+) registers", report)
            spills = re.findall(r"(\d+) bytes spill", report)
            found[name]["registers"] = int(registers)
            found[name]["spill_bytes"] = sum(map(int, spills))
    return found


def _assembled(path: str) -> str:
    """What NVIDIA's assembler reports of a file."""
    (toolkit,) = importlib.util.find_spec("nvidia.cuda_nvcc").submodule_search_locations
    command = [f"{toolkit}/bin/ptxas", "-arch=sm_90a", "-v", path, "-o", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _compile_here(direction: str, shape: list | None) -> dict:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from pallas_kernels.bench import gpu_programs, programs, topology

    shape = programs.Shape(*shape) if shape else programs.NANO_9B
    arrays = gpu_programs.inputs(shape)
    if direction == "forward":
        arrays = {k: v for k, v in arrays.items() if k not in ("dy", "dlast")}
    mesh = topology.one_chip("h200")
    place = NamedSharding(mesh, PartitionSpec())
    arrays = {
        name: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=place)
        for name, z in arrays.items()
    }
    run = gpu_programs.DIRECTIONS[direction]("pallas_gpu")
    # The mesh tells the ops which chip they are compiled for.
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(**arrays).compile()
    memory = compiled.memory_analysis()
    return {
        "tokens": shape.tokens,
        "input_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "moved_bytes": moved_bytes(compiled.as_text()),
        "kernels": _kernels(os.environ[_DUMP]),
    }


if __name__ == "__main__":
    print(json.dumps(_compile_here(sys.argv[1], json.loads(sys.argv[2]))))
