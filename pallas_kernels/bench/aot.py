"""What the ops compile to for real TPUs, at Nano-9B's shapes, with no chip.

Cycles are instruction bundles, counted in the compiler's last listing and multiplied
by how often a kernel's code runs: a bundle takes a cycle when nothing stalls it. Where
XLA does all, as for the convolution, they are those of moving what it says it reads and
writes at the published bandwidth. The floor is what moving the program's inputs and
outputs once takes, or its matmuls at the published peak if that is more. Temporaries
are those of the whole program, XLA's share included; in backward, states saved for it
too, against the inputs of the forward.
"""

import argparse
import itertools
import json
import sys

from pallas_kernels.bench import compiled
from pallas_kernels.chips import CHIPS

OPS = ("ssd", "attention", "causal_conv1d")
_COLUMNS = {
    "op": "op",
    "direction": "direction",
    "chip": "chip",
    "cycles_per_token": "cycles/token",
    "floor_cycles_per_token": "floor",
    "temp_ratio": "temp/inputs",
}


def add_command(commands) -> None:
    """Adds `aot` to the command line."""
    parser = commands.add_parser("aot", help="compile for TPUs that are not there")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compiles everything, one program after another, and prints a table."""
    if not compiled.available():
        sys.exit("The TPU compiler is not installed: pip install libtpu.")
    results = []
    for op, chip in itertools.product(arguments.ops, arguments.chips):
        forward_bytes = None
        for direction in ("forward", "backward"):
            print(f"{op} {direction} on {chip} ...", file=sys.stderr, flush=True)
            report = compiled.compile_apart(chip, direction, op=op)
            forward_bytes = forward_bytes or report["input_bytes"]
            results.append(_result(op, chip, direction, report, forward_bytes))
    print(json.dumps(results, indent=1) if arguments.json else _table(results))


def _result(op: str, name: str, direction: str, report: dict, forward_bytes: int):
    chip, tokens = CHIPS[name], report["tokens"]
    moved = report["input_bytes"] + report["output_bytes"]
    floor = max(moved / chip.bandwidth, report["flops"] / chip.peak) * chip.clock
    cycles = sum(report["bundles"][kernel] for kernel in report["counted"])
    if not report["counted"]:
        cycles = report["accessed_bytes"] / chip.bandwidth * chip.clock
    return {
        "op": op,
        "direction": direction,
        "chip": name,
        "compiles": True,
        "cycles_per_token": round(cycles / tokens, 1),
        "floor_cycles_per_token": round(floor / tokens, 1),
        "temp_ratio": round(report["temp_bytes"] / forward_bytes, 4),
        "temp_bytes": report["temp_bytes"],
        "moved_bytes": moved,
        # All but those of kernels, which XLA does not see.
        "xla_bytes": report["accessed_bytes"],
    }


def _table(results: list[dict]) -> str:
    rows = [list(_COLUMNS.values())]
    rows += [[str(result[key]) for key in _COLUMNS] for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = lambda row: "  ".join(z.ljust(w) for z, w in zip(row, widths, strict=True))
    return "\n".join(pad(row) for row in rows)
