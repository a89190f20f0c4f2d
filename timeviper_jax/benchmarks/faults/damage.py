"""Files that change on disk, a disk that is full, data that never come, data of NaN."""

import pathlib
import random
import shutil
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from timeviper_jax import checksums, sharding
from timeviper_jax.benchmarks.faults.places import stalled_after_a_step, still_since
from timeviper_jax.benchmarks.faults.training import (
    DECODING_APART,
    EVERY,
    STRICT,
    Run,
    Setting,
    differing,
    wait_for,
)
from timeviper_jax.training.checkpoint import load_params

NOT_WRITTEN, HUNG = 74, 124
# Restoring all of a model takes longer than to see that it must not be restored.
_RESTORED_EVERY = 100


def damage_files(setting: Setting, unbroken: Run, *, times: int) -> dict[str, Any]:
    """Flips a bit of, or cuts, one file of the newest of two checkpoints at a time."""
    run = setting.run("damaged")
    shutil.rmtree(run.folder, ignore_errors=True)
    shutil.copytree(unbroken.folder, run.folder)
    older, newer = sorted(checksums.steps(run.folder / "checkpoints"), key=_number)
    files = sorted(path for path in newer.rglob("*") if path.is_file())
    rng, silent, named, mesh = random.Random(0), [], 0, sharding.make_mesh(fsdp=-1)
    shutil.move(newer, aside := run.folder / "aside")
    want = load_params(run.folder, mesh)
    shutil.move(aside, newer)
    for number in tqdm(range(times), desc="damage"):
        path = rng.choice(files)
        whole = path.read_bytes()
        path.write_bytes(_broken(whole, rng))
        found = checksums.newest(run.folder / "checkpoints")
        name = str(path.relative_to(newer))
        named += name in "".join(found.problems.values())
        good = found.folder == older
        if number % _RESTORED_EVERY == 0:
            got = load_params(run.folder, mesh)
            good &= all(np.array_equal(got[key], want[key]) for key in want)
        if not good:
            silent.append(name)
        path.write_bytes(whole)
    return dict(
        damaged=times,
        files=len(files),
        loaded_silently=silent,
        named_the_file=named,
        ok=not silent,
    )


def _number(path: pathlib.Path) -> int:
    return int(path.name)


def _broken(whole: bytes, rng: random.Random) -> bytes:
    """One bit flipped, or the end missing; an empty file grows by a byte."""
    if not whole:
        return b"?"
    place = rng.randrange(len(whole))
    if rng.randrange(2):
        return whole[:place]
    flipped = whole[place] ^ (1 << rng.randrange(8))
    return whole[:place] + bytes([flipped]) + whole[place + 1 :]


def fill_disk(setting: Setting, unbroken: Run) -> dict[str, Any]:
    """No file may grow beyond what metrics take: the next checkpoint fails."""
    run = setting.run("full")
    # Where each save is waited for, no step is made beyond one that fails.
    with run.process(max_redone=STRICT) as process:
        wait_for(lambda: run.last() > EVERY, process)
        process.kill()
    before = run.saved()
    with run.process(max_redone=STRICT, max_file_bytes=1 << 16) as process:
        status = process.wait()
    told = [x for x in run.log().splitlines() if "could not be written" in x]
    beyond = run.last() - (before + EVERY)
    kept = run.saved()
    finished, wrong = run.finish(), differing(run, unbroken)
    return dict(
        status=status,
        told=told[-1:],
        steps_after_the_save=beyond,
        saved_before=before,
        saved_after=kept,
        ok=status == NOT_WRITTEN
        and bool(told)
        and kept == before
        and beyond == 0
        and not finished
        and not wrong,
    )


def hang(setting: Setting, *, limit: float) -> dict[str, Any]:
    """Data that never come: past the limit all stacks are printed and it ends."""
    run = setting.run("hung")
    with run.process(DECODING_APART, f"limits.data={limit}") as process:
        with stalled_after_a_step(run, process):
            since = still_since(run, lambda _: process.poll() is not None)
            seconds = time.monotonic() - since
            status = process.wait()
    log = run.log()
    stacks = log.count("Thread 0x") + log.count("Current thread 0x")
    return dict(
        status=status,
        limit=limit,
        seconds=round(seconds, 2),
        stacks=stacks,
        ok=status == HUNG and stacks > 1 and seconds <= 1.1 * limit,
    )
