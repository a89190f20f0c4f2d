"""The SSD on CPU: against mamba2-jax's, and its cost against length.

The peer comes from the package index into a venv of its own, under .bench/ where the
command is run; that venv's Python then times both, taking turns.
"""

import argparse
import json
import os
import pathlib
import subprocess

from pallas_kernels.bench import venvs

_PACKAGES = ("mamba2-jax==1.1.2", "einops", "jaxtyping")


def add_command(commands) -> None:
    """Adds `ssd` to the command line."""
    parser = commands.add_parser("ssd", help="time the SSD on CPU against mamba2-jax")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Makes the venv if need be, times, and prints."""
    python = venvs.python_with("mamba2-jax", _PACKAGES)
    package = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [str(python), "-m", "pallas_kernels.bench.ssd_timing"],
        env=os.environ | {"PYTHONPATH": str(package), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result, indent=1) if arguments.json else _text(result))


def _text(result: dict) -> str:
    lines = [
        f"{name}: mamba2-jax takes {result[f'{key}_speedup']} x as long"
        for key, name in (
            ("forward", "forward"),
            ("forward_backward", "forward and backward"),
        )
    ]
    lines += [
        f"{row['length']:6d} tokens: {row['microseconds']} microseconds and"
        f" {row['bytes']} bytes a token"
        for row in result["per_token"]
    ]
    return "\n".join(lines)
