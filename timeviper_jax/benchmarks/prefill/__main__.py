"""What watching a long video costs, on a chip that is not there or on the one at hand.

    python -m timeviper_jax.benchmarks.prefill --aot v5p

compiles every program of 10,000 frames and their first question for one chip, and
prints what memory they take and the least time that their arithmetic and bytes allow.
With `--chunks 2048 4096 8192 16384` it does so for chunks of each size.

    python -m timeviper_jax.benchmarks.prefill --frames 256 1024 4096 10000

runs them on the device at hand, on random weights and pixels, and writes JSON and a
picture.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence

from pallas_kernels.chips import GPUS
from timeviper_jax import presets
from timeviper_jax.benchmarks.prefill import ahead, measure, report, settings


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m timeviper_jax.benchmarks.prefill")
    parser.add_argument(
        "--preset", default="nano_9b", help="a name or a .json of sizes"
    )
    parser.add_argument(
        "--aot", choices=("v5p", "v6e", *GPUS), help="compile for a chip, run nothing"
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[10_000])
    parser.add_argument("--batch", type=int, default=64, help="frames encoded at once")
    parser.add_argument("--chunks", type=int, nargs="+", help="tokens of a call")
    parser.add_argument(
        "--transv",
        choices=("with", "without", "both"),
        default="both",
        help="the preset's TransV, none, or one after the other",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="compile only programs whose names begin so; of the rest count arithmetic",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        help="write files there; what is measured goes beside this one if nothing is"
        " said",
    )
    return parser.parse_args(argv)


def _ahead_of_time(arguments: argparse.Namespace) -> None:
    """Compiles, prints, and writes a file if that is asked for."""
    options = _settings(arguments)
    reports = ahead.compile_apart(
        ahead.python_for(arguments.aot), arguments.aot, options, names=arguments.only
    )
    calls: list[list[dict]] = [[] for _ in options]
    for call in reports:
        print(f"{call['part']}: {call['name']} ...", file=sys.stderr, flush=True)
        calls[call["setting"]].append(call)
    chip = ahead.chip_of(arguments.aot)
    results = [
        _described(one, arguments.aot) | report.of_calls(found, chip)
        for one, found in zip(options, calls, strict=True)
    ]
    results = _paired(results)
    if arguments.results:
        name = f"prefill {arguments.preset} {arguments.aot} aot"
        path = report.write({"results": results}, arguments.results, name)
        print(f"Wrote {path}.", file=sys.stderr)
    if arguments.json:
        print(json.dumps(results[0] if len(results) == 1 else results, indent=1))
        return
    for result in results:
        print(report.text(result))
        if "without_transv" in result:
            print(report.text(result["without_transv"]))


def _measured(arguments: argparse.Namespace) -> None:
    """Runs each setting in a process of its own, prints, and writes files."""
    found = []
    for options in _settings(arguments):
        print(f"{options} ...", file=sys.stderr, flush=True)
        found.append(measure.measure_apart(options))
    device = found[0]["device"]
    result = {
        "preset": arguments.preset,
        "device": device,
        "results": found,
        "saved_by_transv": report.saved(found),
        "paper": report.PAPER,
    }
    folder = arguments.results or report.RESULTS
    path = report.write(result, folder, f"prefill {arguments.preset} {device}")
    report.draw(found, path.with_suffix(".png"))
    print(json.dumps(result, indent=1) if arguments.json else report.lines(found))
    print(f"Wrote {path} and .png beside it.", file=sys.stderr)


def _settings(arguments: argparse.Namespace) -> list[dict]:
    """Every setting that is asked for, as plain values."""
    sizes = presets.find_config(arguments.preset)
    stages = {"with": [True], "without": [False], "both": [True, False]}
    transv = stages[arguments.transv] if sizes.llm.transv else [False]
    chunks = arguments.chunks or [settings.viewer_of(sizes).chunk]
    return [
        {
            "preset": arguments.preset,
            "transv": with_stages,
            "frames": frames,
            "batch": arguments.batch,
            "viewer": {"chunk": chunk},
        }
        for frames, chunk, with_stages in itertools.product(
            arguments.frames, chunks, transv
        )
    ]


def _described(options: dict, chip: str) -> dict:
    setting = settings.make(**options)
    return {
        "preset": options["preset"],
        "chip": chip,
        "transv": options["transv"],
        "frames": setting.frames,
        "tokens": setting.tokens,
        "batch": setting.batch,
        "viewer": dataclasses.asdict(setting.viewer),
        "goal_gib": report.GOAL_GIB,
    }


def _paired(results: list[dict]) -> list[dict]:
    """Each result with TransV has the one without beside it."""
    pairs = []
    for result in results:
        before = pairs[-1] if pairs else {"transv": False}
        if before["transv"] and not result["transv"]:
            before["without_transv"] = result
        else:
            pairs.append(result)
    return pairs


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is asked for."""
    arguments = _arguments(argv)
    (_ahead_of_time if arguments.aot else _measured)(arguments)


if __name__ == "__main__":
    main()
