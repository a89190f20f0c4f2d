"""SIGKILL at random moments, some of them within a save: what is left goes on."""

import json
import random
import signal
import time
from typing import Any

from tqdm import tqdm

from timeviper_jax.benchmarks.faults.training import (
    AHEAD,
    EVERY,
    STRICT,
    Run,
    Setting,
    differing,
    wait_for,
)


def kill_often(
    setting: Setting, unbroken: Run, *, training: int, saving: int, total: int
) -> dict[str, Any]:
    """Kills until there were so many in training and within a save, and in all.

    A run that comes to its end makes room for the next one. What was done is kept in
    `kills.json`, so that this can be stopped, too.
    """
    path = setting.work / "kills.json"
    state = json.loads(path.read_text()) if path.exists() else dict(run=0, kills=[])
    kills, rng = state["kills"], random.Random(len(state["kills"]))
    wrong: list[str] = state.setdefault("wrong", [])

    def enough() -> bool:
        in_save = sum(kill["saving"] for kill in kills)
        met = in_save >= saving and len(kills) - in_save >= training
        return met and len(kills) >= total

    def keep() -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(state))
        part.replace(path)

    bar = tqdm(total=total, initial=len(kills), desc="kills")
    while not enough():
        run = setting.run(f"killed_{state['run']}")
        in_save = sum(kill["saving"] for kill in kills)
        within_save = in_save < saving and bool(rng.randrange(2))
        # What a run promises may change whenever it goes on.
        kill = _kill(run, rng, within_save, most=(STRICT, AHEAD)[len(kills) % 2])
        if kill is None or kill["status"] == 0:
            state["run"] += 1
        else:
            kills.append(kill)
            bar.update()
        if kill is not None and kill["status"] not in (0, -signal.SIGKILL):
            wrong.append(f"{run.folder.name} ended with {kill['status']}: {_tail(run)}")
            state["run"] += 1  # Else it might fail without end.
        wrong += [f"{run.folder.name} step {s}" for s in differing(run, unbroken)]
        keep()
    for number in range(state["run"] + 1):
        run = setting.run(f"killed_{number}")
        if run.folder.exists() and run.last() < setting.steps:
            if status := run.finish():
                wrong.append(f"{run.folder.name} ended with {status}: {_tail(run)}")
        wrong += [f"{run.folder.name} step {s}" for s in differing(run, unbroken)]
    keep()
    redone = {
        promise: [kill["redone"] for kill in kills if kill["promised"] == promise]
        for promise in (STRICT, AHEAD)
    }
    return dict(
        kills=len(kills),
        within_a_save=sum(kill["saving"] for kill in kills),
        runs=state["run"] + 1,
        wrong=wrong,
        save_interval=EVERY,
        most_redone={f"of {k}": max(v, default=0) for k, v in redone.items()},
        ok=not wrong and all(kill["redone"] <= kill["promised"] for kill in kills),
    )


def _kill(
    run: Run, rng: random.Random, within_save: bool, most: int
) -> dict[str, Any] | None:
    """Starts the run and kills it; None if it came to its end before.

    The run promises that at most `most` steps are made again.
    """
    begun = run.last()
    with run.process(max_redone=most) as process:
        after = begun + rng.randint(1, 2 * EVERY)
        come = wait_for(lambda: run.last() >= after, process)
        if not within_save:
            time.sleep(rng.random() * 0.5)
        if not come or not wait_for(lambda: run.saving() == within_save, process):
            status = process.wait()
            return None if status == 0 else _told(run, status, most, saving=False)
        if within_save:
            time.sleep(rng.random() * 0.05)
        process.kill()
        status = process.wait()
    return _told(run, status, most, saving=run.saving())


def _told(run: Run, status: int, most: int, *, saving: bool) -> dict[str, Any]:
    redone = run.last() - run.saved()
    return dict(status=status, saving=saving, redone=redone, promised=most)


def _tail(run: Run) -> str:
    return " | ".join(run.log().splitlines()[-2:])
