"""Writes the table that block sizes of the splash kernels are chosen from.

What one visit of a tile costs is what the compiler schedules for it, as `bench aot`
counts it, and a pause between two steps of a grid, which is assumed and not measured.
Nothing here ran on a chip. A tile that does not compile is left out.
"""

import argparse
import json
import statistics
import sys

from pallas_kernels.attention import blocks
from pallas_kernels.bench import compiled
from pallas_kernels.chips import CHIPS

_STEP_SECONDS = 0.35e-6  # Between two steps of a grid.
_HEAD_DIM = 128  # Narrower heads are padded to as much in registers and matmuls.
_TILES = (
    (128, 128),
    (256, 256),
    (256, 512),
    (512, 256),
    (512, 512),
    (512, 1024),
    (1024, 512),
    (1024, 1024),
)


def add_command(commands) -> None:
    """Adds `blocks` to the command line."""
    parser = commands.add_parser("blocks", help="write attention's table of tiles")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compiles the kernels with each tile for each chip; a tile costs the mean."""
    if not compiled.available():
        sys.exit("The TPU compiler is not installed: pip install libtpu.")
    costs = {kernel: {} for kernel in blocks.KERNELS}
    for tile in _TILES:
        reports = [_visit(chip, tile) for chip in arguments.chips]
        if None in reports:
            continue
        for kernel, seen in costs.items():
            cycles = statistics.mean(report[kernel] for report in reports)
            seen["x".join(map(str, tile))] = round(cycles)
    table = {"chips": arguments.chips, "cycles": {str(_HEAD_DIM): costs}}
    blocks.TABLE.write_text(json.dumps(table, indent=2) + "\n")
    print(json.dumps(table, indent=2))


def _visit(chip: str, tile: tuple[int, int]) -> dict[str, float] | None:
    """Cycles of one visit for each kernel; None if these tiles do not compile."""
    print(f"{tile} on {chip} ...", file=sys.stderr, flush=True)
    shape = (2 * max(tile), 2, 1, _HEAD_DIM, "bfloat16", tile)
    try:
        report = compiled.compile_apart(chip, "tile", shape, op="attention")
    except RuntimeError as refusal:
        print(f"does not compile: {refusal}", file=sys.stderr)
        return None
    pause = _STEP_SECONDS * CHIPS[chip].clock
    bundles = (report["bundles"][kernel] + pause for kernel in report["counted"])
    return dict(zip(blocks.KERNELS, bundles, strict=True))
