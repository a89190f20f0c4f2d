r"""Sets the arms of the needle benchmark beside each other.

python -m timeviper_jax.evals.compare --workdir runs/demo --seeds 1

Reads what `eval.py` wrote for each arm and writes `report.json` and `needles.png`. The
arms answered the same questions, so their differences are taken question by question.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from timeviper_jax.evals import report
from timeviper_jax.evals.base import Record

ARMS = ("none", "drop", "transv")
COMPARED = ("when", "mcq", "what")


def read_arms(workdir: pathlib.Path, seeds: int) -> dict[str, list[list[Record]]]:
    """The answers of each arm, seed by seed."""
    return {
        arm: [
            report.read_records(workdir / name / "eval" / "records.json")
            for name in [arm, *(f"{arm}_{seed}" for seed in range(1, seeds))]
        ]
        for arm in ARMS
    }


def differences(arms: Mapping[str, Sequence[Sequence[Record]]]) -> list[dict[str, Any]]:
    """TransV less dropping at the same rate, over all seeds and for each."""
    found = []
    for kind in COMPARED:
        pairs = list(zip(arms["transv"], arms["drop"], strict=True))
        by_seed = [report.paired([pair], kind=kind) for pair in pairs]
        for i, result in enumerate(report.paired(pairs, kind=kind)):
            values = [seed[i]["value"] for seed in by_seed]
            found.append({**result, "by_seed": values})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args(argv)

    by_seed = read_arms(args.workdir, args.seeds)
    arms = {arm: sum(answers, []) for arm, answers in by_seed.items()}
    results = [
        r for arm, records in arms.items() for r in report.summarise(records, arm)
    ]
    paired = differences(by_seed)
    controls = json.loads(
        (args.workdir / ARMS[0] / "eval" / "results.json").read_text("utf-8")
    )["controls"]
    report.write_json(
        args.workdir / "report.json",
        {
            "results": [dataclasses.asdict(result) for result in results],
            "controls": controls,
            "transv_minus_drop": paired,
        },
    )
    report.plot(arms, args.workdir / "needles.png")

    print(report.table(results))
    print("\nTransV − dropping at the same rate, the same questions:")
    for row in paired:
        seeds = ", ".join(f"{100 * value:+.1f}" for value in row["by_seed"])
        print(
            f"  {row['question']} {row['metric']}, {row['frames']} frames:"
            f" {report.percent(row)} ({row['count']} questions; by seed {seeds})"
        )
    print("\nMultiple choice without the right video (chance 25 %):")
    for name, control in controls.items():
        print(f"  {name}: {report.percent(control)} ({control['count']} questions)")


if __name__ == "__main__":
    main()
