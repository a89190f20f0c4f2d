"""What the SSD kernels compile to for real TPUs, at Nano-9B's shape, with no chip.

Cycles are instruction bundles, counted in the compiler's last listing and multiplied
by how often a kernel's code runs: a bundle takes a cycle when nothing stalls it. The
floor is what moving the program's inputs and outputs once takes at the published
bandwidth. Temporaries are those of the whole program, XLA's share included; in
backward, states saved for it too, against the inputs of the forward.
"""

import argparse
import json
import sys

from pallas_kernels.bench import compiled
from pallas_kernels.bench.chips import CHIPS

_COLUMNS = {
    "op": "op",
    "direction": "direction",
    "chip": "chip",
    "cycles_per_token": "cycles/token",
    "floor_cycles_per_token": "HBM floor",
    "temp_ratio": "temp/inputs",
}


def add_command(commands) -> None:
    """Adds `aot` to the command line."""
    parser = commands.add_parser("aot", help="compile for TPUs that are not there")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compiles everything, one program after another, and prints a table."""
    if not compiled.available():
        sys.exit("The TPU compiler is not installed: pip install libtpu.")
    results = []
    for chip in arguments.chips:
        forward_bytes = None
        for direction in ("forward", "backward"):
            print(f"ssd {direction} on {chip} ...", file=sys.stderr, flush=True)
            report = compiled.compile_apart(chip, direction)
            forward_bytes = forward_bytes or report["input_bytes"]
            results.append(_result(chip, direction, report, forward_bytes))
    print(json.dumps(results, indent=1) if arguments.json else _table(results))


def _result(chip: str, direction: str, report: dict, forward_bytes: int) -> dict:
    moved = report["input_bytes"] + report["output_bytes"]
    seconds = moved / CHIPS[chip].bandwidth
    tokens = report["tokens"]
    return {
        "op": "ssd",
        "direction": direction,
        "chip": chip,
        "compiles": True,
        "cycles_per_token": round(report["bundles"][f"ssd_{direction}"] / tokens, 1),
        "floor_cycles_per_token": round(seconds * CHIPS[chip].clock / tokens, 1),
        "temp_ratio": round(report["temp_bytes"] / forward_bytes, 4),
        "temp_bytes": report["temp_bytes"],
        "moved_bytes": moved,
    }


def _table(results: list[dict]) -> str:
    rows = [list(_COLUMNS.values())]
    rows += [[str(result[key]) for key in _COLUMNS] for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = lambda row: "  ".join(z.ljust(w) for z, w in zip(row, widths, strict=True))
    return "\n".join(pad(row) for row in rows)
