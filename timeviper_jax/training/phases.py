"""Where a run's time goes, and the end of a run that stands still.

A run is always in one phase: `setup`, `compile`, `data` (waiting for a batch), `step`,
`save` or `eval`. Each has a limit; past it all stacks are printed and the process ends.
`lost` is the time of steps that an earlier process made and did not keep.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

HUNG = 124  # As `timeout` has it.
PHASES = ("setup", "compile", "data", "step", "save", "eval")
USEFUL = "step"


class Phases:
    """A stopwatch of the phases; its watchdog ends the process past a limit.

    `limits` are the seconds that a single stay in each phase may last.
    """

    def __init__(self, limits: Mapping[str, float]):
        if {*limits} != {*PHASES} or min(limits.values()) <= 0:
            raise ValueError(f"limits={dict(limits)} must be seconds of {PHASES}.")
        self._limits = dict(limits)
        self._seconds = dict.fromkeys((*PHASES, "lost"), 0.0)
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._phase, self._since = "setup", time.monotonic()
        self._tick = min(*limits.values(), 10.0) / 50
        self._arm()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str) -> str:
        """Ends the phase before and returns its name."""
        now = time.monotonic()
        with self._lock:
            left = self._phase
            self._seconds[left] += now - self._since
            self._phase, self._since = phase, now
        self._arm()
        return left

    def _arm(self) -> None:
        # A call that never lets Python run holds up the watchdog; this is no Python.
        faulthandler.dump_traceback_later(1.06 * self._limits[self._phase], exit=True)

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A phase in the midst of another, which goes on afterwards."""
        outer = self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def wait_was_free(self, began: float) -> None:
        """Takes a wait for data since `began` as `step`: the device was at work."""
        with self._lock:
            waited = time.monotonic() - began
            self._seconds["data"] -= waited
            self._seconds[USEFUL] += waited

    def resume(self, seconds: Mapping[str, float], told: Mapping[str, Any]) -> None:
        """Adds what earlier processes took up to the checkpoint, and lost after it.

        `told` is the last line of metrics that they wrote and this one took back.
        """
        later = {name: told.get(f"seconds_{name}", 0.0) for name in self._seconds}
        lost = max(sum(later.values()) - sum(seconds.values()), 0.0)
        for name, value in {**seconds, "lost": seconds.get("lost", 0.0) + lost}.items():
            self._seconds[name] += value

    def seconds(self) -> dict[str, float]:
        """What each phase took up to now, over all processes of the run."""
        self.enter(self._phase)
        return dict(self._seconds)

    def scalars(self) -> dict[str, float]:
        """The same for the metrics, and `goodput`: the share that went into steps."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        told = {f"seconds_{name}": round(s, 3) for name, s in seconds.items()}
        return {"goodput": seconds[USEFUL] / total, **told}

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(self._tick):
            with self._lock:
                phase, since = self._phase, self._since
            limit = self._limits[phase]
            if time.monotonic() > since + limit:
                _end(phase, limit)


def _end(phase: str, limit: float) -> None:
    print(f"In {phase} for more than {limit:g} s: ending.", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(all_threads=True)
    os._exit(HUNG)
