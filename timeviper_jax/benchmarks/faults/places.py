"""A signal in each place a run can be in: it saves, loses no step, and goes on."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from timeviper_jax.benchmarks.faults.training import (
    DECODING_APART,
    Run,
    Setting,
    ask,
    differing,
    stalled,
    wait_for,
)

STOPPED = 75
# Of a loss after all steps on other devices; other samples change it by hundredths.
_ROUNDING = 1e-6
_STILL = 10.0  # Seconds without a step, after which a run waits for data.


def ask_everywhere(setting: Setting, unbroken: Run) -> dict[str, Any]:
    """One run that is asked to stop in five places, and then comes to its end."""
    run = setting.run("asked")
    places = {
        "compile": _in_compilation(run),
        "step": _in_step(run),
        "save": _in_save(run),
        "eval": _in_validation(run),
        "data": _in_data_wait(run),
    }
    status, wrong = run.finish(), differing(run, unbroken)
    good = all(
        place["status"] == STOPPED and not place["lost"] for place in places.values()
    )
    # Each signal came where it was meant to.
    good &= not places["compile"]["steps_before"]
    good &= places["data"]["waited"] >= _STILL / 2
    return dict(
        places=places, steps_that_differ=wrong, ok=good and not status and not wrong
    )


def _asked(
    run: Run, process: subprocess.Popen, number: signal.Signals
) -> dict[str, Any]:
    status, seconds = ask(process, number)
    return dict(status=status, seconds=round(seconds, 2), lost=run.last() - run.saved())


def _in_compilation(run: Run) -> dict[str, Any]:
    with run.process(cache=False) as process:
        wait_for(lambda: "from step" in run.log(), process)
        time.sleep(1)
        steps = run.last()
        told = _asked(run, process, signal.SIGTERM)
    return dict(told, steps_before=steps)  # 0: the first was still being compiled.


def _in_step(run: Run) -> dict[str, Any]:
    begun = run.last()
    with run.process() as process:
        wait_for(lambda: run.last() >= begun + 2, process)
        return _asked(run, process, signal.SIGINT)


def _in_save(run: Run) -> dict[str, Any]:
    with run.process() as process:
        wait_for(run.saving, process)
        return _asked(run, process, signal.SIGTERM)


def _in_validation(run: Run) -> dict[str, Any]:
    """So many batches that it can be in nothing else."""
    begun = run.last()
    endless = ("validation.every=3", "validation.batches=1000000")
    with run.process(*endless) as process:
        wait_for(lambda: "from step" in run.log(), process)
        # Where it goes on from a third step, it begins with one that is due there.
        due = lambda: run.last() % 3 == 0 and (run.last() > begun or begun > 0)
        wait_for(due, process)
        time.sleep(2)
        return _asked(run, process, signal.SIGTERM)


def _in_data_wait(run: Run) -> dict[str, Any]:
    """What was read ahead is used up, and no more comes."""
    with run.process(DECODING_APART) as process:
        with stalled_after_a_step(run, process):
            still_since(run, lambda since: time.monotonic() > since + _STILL)
            told = _asked(run, process, signal.SIGTERM)
    return dict(told, waited=round(run.waited(), 2))


@contextlib.contextmanager
def stalled_after_a_step(run: Run, process: subprocess.Popen) -> Iterator[None]:
    """Lets a run make a step, and within it no more data come."""
    begun = run.last()
    wait_for(lambda: run.last() > begun, process)
    with stalled(process):
        yield


def still_since(run: Run, enough: Callable[[float], bool]) -> float:
    """Looks until it is enough; when the run logged its last step."""
    last, since = run.last(), time.monotonic()
    while not enough(since):
        time.sleep(0.01)
        if run.last() != last:
            last, since = run.last(), time.monotonic()
    return since


def ask_twice(setting: Setting) -> dict[str, Any]:
    """Two signals during a compilation: the second one ends the process at once."""
    run = setting.run("asked_twice")
    with run.process(cache=False) as process:
        wait_for(lambda: "from step" in run.log(), process)
        time.sleep(1)
        status, seconds = ask(process, signal.SIGTERM, signal.SIGTERM)
    expected = 128 + signal.SIGTERM
    return dict(
        status=status, seconds=round(seconds, 2), ok=status == expected and seconds < 1
    )


def ask_one_of_two(setting: Setting, unbroken: Run) -> dict[str, Any]:
    """Of two processes that train together, one is asked: both stop at one step.

    One process alone then goes on to the end: with the same samples, or its losses
    would be further from those of an unbroken run than rounding takes them.
    """
    run = setting.run("two_processes")
    job = os.getpid()  # The port of the two follows from it.
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                run.process(
                    multihost=True,
                    environment=_as_slurm_has_it(job, number),
                    log=f"log{number}.txt",
                )
            )
            for number in range(2)
        ]
        wait_for(lambda: run.last() >= 2, processes[0])
        first, seconds = ask(processes[1], signal.SIGTERM)
        statuses = [processes[0].wait(60), first]
    stopped = [_stopped_at(run.log(f"log{number}.txt")) for number in range(2)]
    lost, together = run.last() - run.saved(), run.last()
    finished, got, want = run.finish(), run.steps(), unbroken.steps()
    far = max(abs(got[i]["loss"] / want[i]["loss"] - 1) for i in want)
    return dict(
        statuses=statuses,
        stopped=stopped,
        seconds=round(seconds, 2),
        lost=lost,
        steps_of_two=together,
        steps_of_one=run.last() - together,
        relative_loss_difference=far,
        ok=statuses == [STOPPED] * 2
        and stopped[0] == stopped[1] != ""
        and not lost
        and not finished
        and far <= _ROUNDING,
    )


def _as_slurm_has_it(job: int, number: int) -> dict[str, str]:
    return dict(
        SLURM_JOB_ID=str(job),
        SLURM_STEP_NODELIST="localhost",
        SLURM_NTASKS="2",
        SLURM_PROCID=str(number),
        SLURM_LOCALID=str(number),
        SLURM_STEP_NUM_NODES="1",
    )


def _stopped_at(log: str) -> str:
    found = [x.split("Stopped")[1] for x in log.splitlines() if "Stopped before" in x]
    return found[-1] if found else ""
