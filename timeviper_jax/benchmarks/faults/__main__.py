r"""Injects faults into training and says what came of each.

python -m timeviper_jax.benchmarks.faults --json
python -m timeviper_jax.benchmarks.faults --short
python -m timeviper_jax.benchmarks.faults --only kills,hang

Each is done to processes of `train.py` on a tiny model, from outside. What is done
already is not done again (`WORKDIR/results.json`): repeat the command to go on.
`--json` prints the report; without it which are ok. Exits with 1 unless all are ok.
"""

import argparse
import functools
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from timeviper_jax.benchmarks import trial
from timeviper_jax.benchmarks.faults import cost, damage, devices, kills, places
from timeviper_jax.benchmarks.faults.training import Run, Setting
from timeviper_jax.data import shapes
from timeviper_jax.training.checkpoint import versions


def faults(
    setting: Setting, unbroken: Run, short: bool
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every fault by its name, in order."""
    counts = dict(training=30, saving=10, total=50)
    if short:
        counts = dict(training=1, saving=1, total=2)
    part = functools.partial
    chosen = {
        "kills": part(kills.kill_often, setting, unbroken, **counts),
        "signals": part(places.ask_everywhere, setting, unbroken),
        "second_signal": part(places.ask_twice, setting),
        "two_processes": part(places.ask_one_of_two, setting, unbroken),
        "files": part(
            damage.damage_files, setting, unbroken, times=50 if short else 1000
        ),
        "full_disk": part(damage.fill_disk, setting, unbroken),
        "hang": part(damage.hang, setting, limit=20.0),
        "nan": part(devices.inject, "nan", setting, unbroken),
        "meshes": part(devices.inject, "meshes", setting, unbroken, devices=8),
        "cost": part(cost.inject, setting, unbroken),
    }
    if short:  # The others compile anew, or tests have their like.
        return {name: chosen[name] for name in ("kills", "files", "full_disk")}
    return chosen


class Results:
    """What came of each fault so far, kept on disk."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._found = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, inject: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What came of it before, or comes of it now."""
        if name not in self._found:
            print(f"== {name}", file=sys.stderr, flush=True)
            began = time.monotonic()
            found = inject()
            self._found[name] = found | {"seconds_in_all": _since(began)}
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(self._found, indent=1))
            part.replace(self._path)
        return self._found[name]


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def _train_unbroken(run: Run) -> dict[str, Any]:
    status = run.finish()
    return dict(status=status, steps=run.last(), ok=status == 0)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = trial.parser(__doc__, "runs/faults")
    parser.add_argument("--only", default="", help="faults, with commas between")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    if args.again:
        shutil.rmtree(args.workdir, ignore_errors=True)
    setting = Setting(work=args.workdir.absolute(), steps=20 if args.short else 60)
    unbroken = setting.run("unbroken")
    chosen = faults(setting, unbroken, args.short)
    if unknown := set(filter(None, args.only.split(","))) - {*chosen}:
        raise SystemExit(f"error: no faults {sorted(unknown)}; there are {[*chosen]}.")
    if not (setting.data / "data.yaml").exists():
        shapes.make(setting.data)
    results = Results(setting.work / "results.json")
    names = [name for name in chosen if not args.only or name in args.only.split(",")]
    found = {"unbroken": results.get("unbroken", lambda: _train_unbroken(unbroken))}
    for name in names:
        found[name] = results.get(name, chosen[name])
        if not args.json and not found[name]["ok"]:
            print(f"{name}: {found[name]}")
    trial.conclude(found, dict(versions=versions(), faults=found), args.json)


if __name__ == "__main__":
    main()
