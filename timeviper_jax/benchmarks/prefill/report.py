"""What a chip makes of a plan: gibibytes, and the least seconds, by part."""

import datetime
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.chips import Chip
from timeviper_jax.benchmarks.prefill.calls import DECODE

RESULTS = pathlib.Path(__file__).parents[1] / "results"
GIB = 2**30
# What TransV saves at 4,096 frames, as a share; on which device is not said.
PAPER = {"frames": 4096, "memory": 0.548, "prefill": 0.157}
GOAL_GIB = 32  # For a single chip, with TransV.


def of_calls(reports: Sequence[dict], chip: Chip) -> dict:
    """Sums of what `ahead` says of each call of one setting.

    A call's least time is that of its arithmetic at the chip's peak or that of its
    bytes at its bandwidth, whichever is more. The most memory is that of one call:
    its arguments, outputs and temporaries, and what else lies on the chip. What was
    not compiled has no memory.
    """
    calls = [_call(report, chip) for report in reports]
    watched = [call for call in calls if call["part"] != DECODE]
    bound = sum(call["bound_seconds"] for call in watched)
    compiled = [call for call in calls if call["gib"]]
    gib = max((call["gib"] for call in compiled), default=None)
    return {
        "gib": gib,
        "fits": gib and gib * GIB <= chip.memory,
        "at": gib and max(compiled, key=lambda call: call["gib"])["name"],
        "bound_seconds": _figures(bound),
        "tera_flop": _figures(sum(call["tera_flop"] for call in watched)),
        "parts": _parts(watched, bound),
        "decode_bound_seconds": calls[-1]["bound_seconds"],
        "programs": calls,
    }


def _call(report: dict, chip: Chip) -> dict:
    arithmetic = report["flops"] / chip.peak
    memory = report["moved"] / chip.bandwidth
    sizes = {}
    for key in ("argument", "output", "alias", "temp"):
        sizes[f"{key}_gib"] = _gib(report[key]) if key in report else None
    return {
        "part": report["part"],
        "name": report["name"],
        "times": report["times"],
        "tokens": report["tokens"],
        "tera_flop": _figures(report["flops"] / 1e12),
        "exact": report["exact"],
        "moved_gib": _gib(report["moved"]),
        "bound_seconds": _figures(max(arithmetic, memory)),
        "bound_by": "arithmetic" if arithmetic >= memory else "bandwidth",
        **sizes,
        "resident_gib": _gib(report["resident"]),
        "gib": _gib(_on_chip(report)) if "temp" in report else None,
        "compile_seconds": report.get("compile_seconds"),
    }


def _on_chip(report: dict) -> int:
    own = report["argument"] + report["output"] - report["alias"] + report["temp"]
    return own + report["resident"]


def _gib(size: int) -> float:
    return round(size / GIB, 3)


def _figures(value: float) -> float:
    return float(f"{value:.5g}")


def _parts(calls: Sequence[dict], bound: float) -> dict[str, dict]:
    parts: dict[str, dict] = {}
    for call in calls:
        part = parts.setdefault(call["part"], {"bound_seconds": 0.0, "tera_flop": 0.0})
        for key in part:
            part[key] += call[key]
    for part in parts.values():
        part["share"] = round(part["bound_seconds"] / bound, 4)
        part["bound_seconds"] = _figures(part["bound_seconds"])
        part["tera_flop"] = _figures(part["tera_flop"])
    return parts


def text(result: dict) -> str:
    """A result as lines."""
    rows = [("part", "calls", "TFLOP", "bound s", "GiB on the chip", "temporaries")]
    for call in result["programs"]:
        rows.append(
            (
                f"{call['part']}: {call['name']}",
                str(call["times"]),
                f"{call['tera_flop']:.2f}",
                f"{call['bound_seconds']:.4g}",
                _or_dash(call["gib"]),
                _or_dash(call["temp_gib"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    verdict = "fits" if result["fits"] else "does not fit"
    memory = f"{result['gib']} GiB, {verdict}" if result["gib"] else "not compiled"
    transv = "with" if result["transv"] else "without"
    lines.append(
        f"{result['preset']} on one {result['chip']}, {result['frames']} frames"
        f" ({result['tokens']} tokens) {transv} TransV: {memory};"
        f" at least {result['bound_seconds']} s"
    )
    return "\n".join(lines)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write(result: dict[str, Any], folder: pathlib.Path, name: str) -> pathlib.Path:
    """Writes the file that carries what was measured and the date."""
    result = result | {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
    }
    name = re.sub(r"\W+", "-", f"{name} {result['date']}").strip("-").lower()
    path = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


# What was measured.


def saved(found: Sequence[dict]) -> dict[str, dict[str, float]]:
    """The share of memory and of time that TransV saves, by frames."""
    without = {one["frames"]: one for one in found if not one["transv"]}
    return {
        str(one["frames"]): {
            "memory": _less(one, without[one["frames"]], "peak_gib"),
            "prefill": _less(one, without[one["frames"]], "seconds"),
        }
        for one in found
        if one["transv"] and one["frames"] in without
    }


def _less(one: dict, other: dict, key: str) -> float:
    return round(1 - one[key] / other[key], 3)


def lines(found: Sequence[dict]) -> str:
    """A line for each setting, with the share of each part."""
    rows = []
    for one in found:
        whole = sum(one["parts"].values())
        shares = [f"{part} {s / whole:.0%}" for part, s in one["parts"].items()]
        transv = "with" if one["transv"] else "without"
        rows.append(
            f"{one['frames']:6} frames {transv:7} TransV: {one['seconds']:.3f} s to the"
            f" first token, then {one['tokens_per_second']:.1f} tokens/s;"
            f" {one['peak_gib']:.2f} GiB of the {one['memory_of']};"
            f" {', '.join(shares)}"
        )
    return "\n".join(rows)


def draw(found: Sequence[dict], path: pathlib.Path) -> None:
    """Memory and seconds by frames, with TransV and without, as the paper has them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    titles = {
        "peak_gib": f"peak memory, GiB of the {found[0]['memory_of']}",
        "seconds": "seconds to the first token",
    }
    for panel, (key, title), share in zip(
        panels, titles.items(), ("memory", "prefill"), strict=True
    ):
        for transv in (False, True):
            line = [one for one in found if one["transv"] == transv]
            panel.plot(
                [one["frames"] for one in line],
                [one[key] for one in line],
                marker="o",
                label="TransV" if transv else "all tokens",
            )
        panel.set(xlabel="frames", title=title, xscale="log", ylim=(0, None))
        paper = f"paper, at {PAPER['frames']} frames: -{PAPER[share]:.1%}"
        panel.legend(title=paper)
    figure.suptitle(found[0]["device"])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
