"""Compiles one program for one chip, in a process of its own; no chip is needed.

    python -m pallas_kernels.bench.compiled v5e forward null ssd

prints what the compiler says, as JSON. libtpu reads its options once, from the
environment, when JAX starts it: hence the process.
"""

import glob
import importlib.util
import json
import os
import subprocess
import sys
import tempfile

# Without these libtpu looks for a chip for 40 s, and two processes collide.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_DUMP = "KERNEL_DUMP"


def available() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compile_apart(
    chip: str, direction: str, shape: tuple | None = None, op: str = "ssd"
) -> dict:
    """Compiles in another process: bytes, and bundles of each kernel.

    Raises:
      RuntimeError: The program does not compile; the end of what the compiler said.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": dump}
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pallas_kernels.bench.compiled"),
                *(chip, direction, json.dumps(shape), op),
            ],
            env=environment | {_DUMP: folder},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{op} {chip} {direction} {shape}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _bundles(folder: str, kernel: str) -> int:
    """Instruction bundles in a kernel's final program, both sides of every branch."""
    (path,) = glob.glob(f"{folder}/*{kernel}*-final_hlo-static-per-bundle-*.txt")
    with open(path) as lines:
        rows = lines.read().split("== UTILIZATION:")[1]
    return sum(bool(row.strip()) for row in rows.splitlines())


def _compile_here(chip_name: str, direction: str, shape: str, op: str) -> dict:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from pallas_kernels.bench import (
        attention_programs,
        conv_programs,
        programs,
        topology,
    )

    programs = {
        "ssd": programs,
        "attention": attention_programs,
        "causal_conv1d": conv_programs,
    }[op]
    sizes = json.loads(shape)
    shape = programs.Shape(*sizes) if sizes else programs.NANO_9B
    mesh = topology.one_chip(chip_name)
    place = NamedSharding(mesh, PartitionSpec())
    # The mesh tells the ops which chip they are compiled for.
    with jax.set_mesh(mesh):
        program = programs.DIRECTIONS[direction](shape)
    inputs = {
        name: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=place)
        for name, z in program.inputs.items()
    }
    with jax.set_mesh(mesh):
        compiled = jax.jit(program.run).lower(**inputs).compile()
    memory = compiled.memory_analysis()
    return {
        "tokens": shape.tokens,
        "input_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        # Right where there are no loops, and no kernels, whose bytes XLA can't see.
        "accessed_bytes": compiled.cost_analysis()["bytes accessed"],
        "counted": program.counted,
        "flops": program.flops,
        "bundles": {
            kernel: times * _bundles(os.environ[_DUMP], kernel)
            for kernel, times in program.executions.items()
        },
    }


if __name__ == "__main__":
    print(json.dumps(_compile_here(*sys.argv[1:])))
