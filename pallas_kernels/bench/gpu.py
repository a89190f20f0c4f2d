"""The SSD's GPU kernels: what they compile to with no GPU, or how fast a GPU runs them.

Ahead of time: registers, spills and shared memory of each kernel on an H200;
temporaries and bytes moved of the whole program, XLA's share included; in backward,
states saved for it too, against the inputs of the forward. On a GPU: see `gpu_timing`.
"""

import argparse
import json
import pathlib
import sys

import jax

from pallas_kernels.bench import gpu_compiled, gpu_timing, venvs
from pallas_kernels.bench.programs import NANO_9B, Shape

# One group of narrower heads; few of the narrowest; a ragged end; float32.
_SHAPES = {
    "Nano-9B": NANO_9B,
    "80 x 64, 1 group": Shape(2304, 80, 64, 1, 128),
    "4 x 16, state 16": Shape(100, 4, 16, 1, 16),
    "16 x 128, 8 groups": Shape(1000, 16, 128, 8, 128),
    "8 x 80, float32": Shape(700, 8, 80, 2, 128, "float32"),
}


def add_command(commands) -> None:
    """Adds `gpu` to the command line."""
    parser = commands.add_parser(
        "gpu", help="time the SSD on a GPU, or compile for one"
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument(
        "--aot", action="store_true", help="compile for an H200 that is not there"
    )
    parser.add_argument(
        "--mamba",
        type=pathlib.Path,
        help="a copy of state-spaces/mamba, whose Triton kernels are timed beside ours"
        " (needs torch and triton)",
    )
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parents[1] / "results",
        help="where the file of a run on a GPU goes",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compiles, or measures and writes a file; prints."""
    if arguments.aot:
        results = _ahead_of_time()
        print(json.dumps(results, indent=1) if arguments.json else _table(results))
        return
    if jax.default_backend() != "gpu":
        sys.exit(
            f"No GPU: JAX sees {jax.devices()[0].device_kind!r}. Install jax[cuda12]"
            " where there is one, or compile only: python -m pallas_kernels.bench gpu"
            " --aot"
        )
    results = gpu_timing.measure(arguments.mamba)
    path = gpu_timing.write(results, arguments.results)
    print(json.dumps(results, indent=1) if arguments.json else gpu_timing.text(results))
    print(f"Wrote {path}.", file=sys.stderr)
    if not results["accurate"]:
        sys.exit("The kernels differ from float64 by more than they should.")


def _ahead_of_time() -> list[dict]:
    python = venvs.python_with("cuda-12", gpu_compiled.PACKAGES)
    results = []
    for name, shape in _SHAPES.items():
        forward_bytes = None
        for direction in ("forward", "backward"):
            print(f"{name} {direction} ...", file=sys.stderr, flush=True)
            report = gpu_compiled.compile_apart(python, direction, shape)
            forward_bytes = forward_bytes or report["input_bytes"]
            results.append(_result(name, direction, report, forward_bytes))
    return results


def _result(name: str, direction: str, report: dict, forward_bytes: int) -> dict:
    tokens = report["tokens"]
    inputs_and_outputs = report["input_bytes"] + report["output_bytes"]
    return {
        "op": "ssd",
        "shape": name,
        "direction": direction,
        "chip": "H200",
        "compiles": True,
        "spill_bytes": sum(z["spill_bytes"] for z in report["kernels"].values()),
        "temp_ratio": round(report["temp_bytes"] / forward_bytes, 4),
        "moved_bytes_per_token": round(report["moved_bytes"] / tokens),
        "floor_bytes_per_token": round(inputs_and_outputs / tokens),
        "kernels": report["kernels"],
    }


def _table(results: list[dict]) -> str:
    lines = []
    for result in results:
        lines.append(
            f"{result['shape']}, {result['direction']}: temporaries"
            f" {result['temp_ratio']} of the inputs,"
            f" {result['moved_bytes_per_token']} bytes moved a token"
            f" (inputs and outputs: {result['floor_bytes_per_token']})"
        )
        lines += [
            f"    {name:20} {kernel['threads']:4} threads {kernel['registers']:4}"
            f" registers {kernel['spill_bytes']:6} bytes spilled"
            f" {kernel['shared_bytes']:7} bytes shared"
            for name, kernel in sorted(result["kernels"].items())
        ]
    return "\n".join(lines)
