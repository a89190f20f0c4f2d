"""Checks the SSD's GPU kernels against float64 and times them, on the GPU at hand.

Nano-9B's shape, with segments, first and last state and d; forward, and forward and
backward together; beside XLA's scan over chunks at its best chunk, and beside the
Triton kernels of state-spaces/mamba where a copy of its source is given.
"""

import datetime
import importlib.util
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from pallas_kernels.bench import gpu_compiled, gpu_programs
from pallas_kernels.bench.programs import NANO_9B

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
# The float64 recurrence goes token by token, at length; so fewer of both here.
CHECKED = NANO_9B._replace(tokens=700, heads=16, groups=2)
SCAN_CHUNKS = (64, 128, 256)
TURNS = 10
# Bytes a second, as the maker publishes them.
_BANDWIDTHS = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}
# The largest error of an array, relative to its largest element. In bfloat16, outputs
# and the matmuls' weights are rounded to 8 bits.
_TOLERANCES = {"bfloat16": 8e-3, "float32": 2e-5}


def measure(mamba: pathlib.Path | None) -> dict:
    """Errors, and times of everything at every length."""
    errors = {dtype: _errors(dtype) for dtype in _TOLERANCES}
    accurate = all(
        max(found.values()) <= _TOLERANCES[dtype] for dtype, found in errors.items()
    )
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "shape": NANO_9B._asdict() | {"tokens": list(LENGTHS)},
        "accurate": accurate,
        "errors": errors,
        "times": [_row(length) for length in LENGTHS],
        "mamba": _mamba(mamba),
    }


def write(results: dict, folder: pathlib.Path) -> pathlib.Path:
    """Writes the file that carries the device's name and the date."""
    device = re.sub(r"\W+", "-", results["device"]).strip("-").lower()
    path = folder / f"{device}_{results['date']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def text(results: dict) -> str:
    """The results as lines."""
    lines = [f"{results['device']}, jax {results['jax']}, {results['date']}"]
    for dtype, errors in results["errors"].items():
        worst = max(errors, key=errors.get)
        lines.append(f"{dtype}: error at most {errors[worst]:.1e}, of {worst}")
    for row in results["times"]:
        for direction in gpu_programs.DIRECTIONS:
            found = row[direction]
            line = f"{row['tokens']:7} tokens, {direction:8}"
            line += f" {found['milliseconds']:9.3f} ms"
            line += f" (XLA's scan {found['scan_milliseconds']:.3f})"
            lines.append(line + f", {found['moved_bytes'] / 1e9:.2f} GB moved")
    lines += [f"state-spaces/mamba: {results['mamba']}"]
    return "\n".join(lines)


def _errors(dtype: str) -> dict[str, float]:
    """Of outputs and gradients, from the recurrence in float64 on rounded inputs."""
    shape = CHECKED._replace(dtype=dtype)
    arrays = gpu_programs.drawn(shape)
    got = jax.jit(gpu_programs.forward_backward("pallas_gpu"))(**arrays)
    with jax.enable_x64(True):
        exact = {
            name: z if name == "segment_ids" else np.asarray(z, np.float64)
            for name, z in arrays.items()
        }
        want = jax.jit(gpu_programs.forward_backward("reference"))(**exact)
        want = jax.tree.map(np.asarray, want)

    def error(g, w):
        return float(np.abs(np.asarray(g, np.float64) - w).max() / np.abs(w).max())

    leaves = jax.tree.leaves_with_path(jax.tree.map(error, got, want))
    return {jax.tree_util.keystr(path): value for path, value in leaves}


def _row(length: int) -> dict:
    """Both directions at one length, in bfloat16."""
    shape = NANO_9B._replace(tokens=length)
    arrays = gpu_programs.drawn(shape)
    row = {"tokens": length}
    for direction, program in gpu_programs.DIRECTIONS.items():
        print(f"{length} tokens, {direction} ...", file=sys.stderr, flush=True)
        milliseconds, moved = _time(program("pallas_gpu"), arrays)
        scans = {
            chunk: _time(program("scan", chunk_size=chunk), arrays)[0]
            for chunk in SCAN_CHUNKS
        }
        best = min(scans, key=scans.get)
        bandwidth = _BANDWIDTHS.get(jax.devices()[0].device_kind)
        row[direction] = {
            "milliseconds": milliseconds,
            "moved_bytes": moved,
            "share_of_bandwidth": bandwidth
            and round(moved / (milliseconds * 1e-3) / bandwidth, 3),
            "scan_milliseconds": scans[best],
            "scan_chunk": best,
        }
    return row


def _time(program: Callable, arrays: dict) -> tuple[float, int]:
    """Milliseconds of one call, the median of several turns, and bytes it moves."""
    compiled = jax.jit(program).lower(**arrays).compile()
    jax.block_until_ready(compiled(**arrays))
    seconds = []
    for _ in range(TURNS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(**arrays))
        seconds.append(time.perf_counter() - start)
    moved = gpu_compiled.moved_bytes(compiled.as_text())
    return round(statistics.median(seconds) * 1e3, 4), moved


def _mamba(source: pathlib.Path | None) -> dict | str:
    """Times by `gpu_mamba` in a process of its own, or why there are none."""
    if source is None:
        return "not timed: no --mamba given"
    if not (source / "mamba_ssm/ops/triton/ssd_combined.py").is_file():
        return f"not timed: {source} holds no mamba_ssm/ops/triton/ssd_combined.py"
    missing = [z for z in ("torch", "triton") if not importlib.util.find_spec(z)]
    if missing:
        return f"not timed: {' and '.join(missing)} not installed"
    command = [sys.executable, "-m", "pallas_kernels.bench.gpu_mamba", str(source)]
    package = str(pathlib.Path(__file__).parents[2])
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return f"not timed: {done.stderr[-500:]}"
    return json.loads(done.stdout.splitlines()[-1])
