"""A trace of some steps for XProf: what host and devices did, and when.

https://openxla.org/xprof shows it: `xprof --logdir=WORKDIR/profile`.
"""

import os
import pathlib
import re
from typing import Any

import jax
from absl import logging


def read_steps(text: str) -> range:
    """`10:12` as the steps 10, 11 and 12, counted from 1 over the whole run.

    Raises:
      ValueError: Says what it is not.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(
            f"{text!r} is not FIRST:LAST of a run's steps, counted from 1; try 10:12."
        )
    return range(first, last + 1)


class Trace:
    """Traces `steps` of a run of `total`, into a folder that hosts may share.

    A run that continues within them traces those that are left.
    """

    def __init__(
        self,
        steps: range = range(0),
        *,
        total: int = 0,
        folder: str | os.PathLike = "profile",
    ):
        if steps and steps[-1] > total:
            raise ValueError(
                f"The steps {steps[0]}:{steps[-1]} to trace end behind the last of the"
                f" run, {total}; trace earlier ones."
            )
        self._steps, self._folder = steps, pathlib.Path(folder)
        self._under_way = False

    def before(self, step: int) -> None:
        """To be called before a step's batch is waited for."""
        if step in self._steps and not self._under_way:
            jax.profiler.start_trace(self._folder)
            self._under_way = True

    def after(self, step: int, results: Any) -> None:
        """To be called when a step is on its way; waits for the last one's results."""
        if self._under_way and step + 1 not in self._steps:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced, if anything was."""
        if self._under_way:
            self._under_way = False
            jax.profiler.stop_trace()
            logging.info("A trace for XProf is in %s.", self._folder)
