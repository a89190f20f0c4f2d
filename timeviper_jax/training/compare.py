r"""Tables what many runs came to, and in what they differ.

python -m timeviper_jax.training.compare runs/lr/*
python -m timeviper_jax.training.compare runs/lr/* --json

A line has the fields of the config in which the runs differ, the steps that are made
and logged of how many, the loss (of the last line, and the lowest of the stage that it
is of), the loss of validation (likewise), the median of tokens per second over the
lines of that stage, and the goodput. `--json` has more: the stage, the medians of all
rates, and the seconds of each stage by phase. A run may still be going on, or have
written nothing yet: what is not known is left out.
"""

import argparse
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from timeviper_jax import checksums
from timeviper_jax.training.experiment import flat
from timeviper_jax.training.metrics import read_lines

_RATES = (
    *("steps_per_second", "tokens_per_second", "frames_per_second"),
    *("mfu", "input_bound", "hbm_peak_gib"),
)
Line = Mapping[str, Any]
Run = dict[str, Any]


def read(workdir: pathlib.Path) -> Run:
    """What a run's directory says of it; what it does not is None or empty.

    Raises:
      ValueError: There is no such folder, or a line of metrics is no JSON.
    """
    if not workdir.is_dir():
        raise ValueError(f"{workdir} is no folder; give runs' working directories.")
    config = read_config(workdir / "checkpoints")
    lines = read_lines(workdir / "metrics.jsonl")
    trained = [line for line in lines if "loss" in line]
    last = trained[-1] if trained else {}
    stage = [line for line in trained if line["stage"] == last["stage"]]
    validated = [x["validation_loss"] for x in lines if "validation_loss" in x]
    return {
        "run": str(workdir),
        "config": config,
        "steps": last.get("step", 0),
        "of_steps": _steps(config),
        "stage": last.get("stage"),
        "loss": _number(last.get("loss")),
        "best_loss": _least(line["loss"] for line in stage),
        "validation_loss": _number(validated[-1]) if validated else None,
        "best_validation_loss": _least(validated),
        **{name: _median(stage, name) for name in _RATES},
        "goodput": last.get("goodput"),
        "stage_seconds": stage_seconds(trained),
    }


def read_config(checkpoints: pathlib.Path) -> Run:
    """The config that the newest finished checkpoint names; empty without one.

    Its arrays are not read, so that they need not be whole.
    """
    finished = [
        folder
        for folder in checksums.steps(checkpoints)
        if (folder / checksums.MANIFEST).exists()
    ]
    if not finished:
        return {}
    newest = max(finished, key=lambda folder: int(folder.name))
    path = newest / "run" / "metadata"
    try:
        return json.loads(path.read_bytes())["config"]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error}).") from None


def stage_seconds(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """The seconds of each stage by phase, up to its last line.

    A line has those of the whole run so far, over all its processes; what is between
    two stages is the later one's.
    """
    found, before = {}, {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        last = [line for line in lines if line["stage"] == stage][-1]
        now = {k: v for k, v in last.items() if k.startswith("seconds_")}
        found[stage] = {
            name.removeprefix("seconds_"): round(now[name] - before.get(name, 0.0), 3)
            for name in now
        }
        before = now
    return found


def _steps(config: Run) -> int | None:
    if not config:
        return None
    return sum(config["stages"][name]["steps"] for name in config["stage_order"])


def _number(value: float | None) -> float | None:
    """None for nan, which JSON has no word for: the updates were all skipped."""
    return None if value is None or math.isnan(value) else value


def _least(values: Iterable[float]) -> float | None:
    return min((x for x in values if not math.isnan(x)), default=None)


def _median(lines: Sequence[Line], name: str) -> float | None:
    values = [line[name] for line in lines if name in line]
    return statistics.median(values) if values else None


def differing(runs: Sequence[Run]) -> list[str]:
    """The fields whose values are not the same in all configs that are known."""
    configs = [flat(run["config"]) for run in runs if run["config"]]
    names = dict.fromkeys(name for config in configs for name in config)
    return [
        name
        for name in names
        if any(c.get(name) != configs[0].get(name) for c in configs)
    ]


def rows(runs: Sequence[Run]) -> list[Run]:
    """The same with the overrides that differ in place of the whole config."""
    names = differing(runs)
    made = []
    for run in runs:
        config = flat(run["config"])
        own = {name: config[name] for name in names if name in config}
        rest = {k: v for k, v in run.items() if k not in ("run", "config")}
        made.append({"run": run["run"], "overrides": own, **rest})
    return made


def table(runs: Sequence[Run]) -> str:
    """A line a run, the columns one under the other."""
    names = differing(runs)
    losses = ("loss", "lowest", "validation", "lowest")
    head = ("steps", *losses, "tokens/s", "goodput")
    lines = [["run", *names, *head]]
    for row in rows(runs):
        steps = str(row["steps"])
        if row["of_steps"] is not None:
            steps += f"/{row['of_steps']}"
        losses = ("loss", "best_loss", "validation_loss", "best_validation_loss")
        lines.append(
            [
                *(row["run"], *(_text(row["overrides"].get(name)) for name in names)),
                *(steps, *(_text(row[name], ".4f") for name in losses)),
                _text(row["tokens_per_second"], ",.0f"),
                _text(row["goodput"], ".3f"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _text(value: Any, form: str = "") -> str:
    return "-" if value is None else format(value, form) if form else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    options = parser.parse_args(argv)
    try:
        runs = [read(workdir) for workdir in options.workdirs]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(rows(runs), indent=1) if options.json else table(runs))


if __name__ == "__main__":
    main()
