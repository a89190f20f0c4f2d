"""A training process of a tiny model, looked at from outside as an operator would."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from timeviper_jax import checksums
from timeviper_jax.training.metrics import read_lines
from timeviper_jax.training.speed import OF_THE_MACHINE

EVERY = 5  # Steps between checkpoints.
# Steps that a kill may cost: where each save is waited for, and where steps go on.
STRICT, AHEAD = EVERY, EVERY + 3
_PATIENCE = 600.0  # Seconds that a process may take for anything asked of it here.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the benchmark works, and how long its runs are."""

    work: pathlib.Path
    steps: int

    @property
    def data(self) -> pathlib.Path:
        return self.work / "data"

    def run(self, name: str) -> "Run":
        return Run(self, self.work / name)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's directory and the processes that work on it, one after the other."""

    setting: Setting
    folder: pathlib.Path

    @contextlib.contextmanager
    def process(
        self,
        *changes: str,
        max_redone: int = AHEAD,
        cache: bool = True,
        multihost: bool = False,
        environment: dict[str, str] | None = None,
        max_file_bytes: int | None = None,
        log: str = "log.txt",
    ) -> Iterator[subprocess.Popen]:
        """Starts or continues the run; what it prints is in `log`."""
        work = self.setting.work
        command = [
            *(sys.executable, "train.py", "--verbosity=0"),
            "--config=configs/stage2_video.py:smoke",
            f"--config.stages.instruct.steps={self.setting.steps}",
            f"--config.data.manifest={self.setting.data}/data.yaml",
            "--config.data.lanes=2",
            f"--config.checkpoint_every={EVERY}",
            f"--config.max_redone={max_redone}",
            "--config.validation.split=videos",
            *(f"--config.{change}" for change in changes),
            f"--workdir={self.folder}",
        ]
        if multihost:
            command.append("--multihost")
        if max_file_bytes:  # The shell counts in blocks of 512.
            limited = f'ulimit -S -f {max_file_bytes // 512} && exec "$@"'
            command = ["sh", "-c", limited, "sh", *command]
        if cache:
            command.append(f"--compilation_cache={work}/compiled")
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / log).open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env=os.environ
                | {
                    "XLA_FLAGS": flags,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                }
                | (environment or {}),
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def finish(self) -> int:
        """Continues to the end; the exit status."""
        with self.process() as process:
            return process.wait(_PATIENCE)

    def log(self, name: str = "log.txt") -> str:
        return (self.folder / name).read_text(errors="replace")

    def steps(self) -> dict[int, dict[str, Any]]:
        """What each step so far logged that follows from the config alone."""
        return {
            line["step"]: {
                k: v for k, v in line.items() if not k.startswith(OF_THE_MACHINE)
            }
            for line in read_lines(self.folder / "metrics.jsonl")
            if "loss" in line
        }

    def last(self) -> int:
        """The step that was logged last; 0 before the first."""
        return max(self.steps(), default=0)

    def waited(self) -> float:
        """Seconds of waiting for data, in the newest checkpoint and after its steps."""
        folder = checksums.newest(self.folder / "checkpoints").folder
        seconds = json.loads((folder / "run" / "metadata").read_bytes())["seconds"]
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return seconds["data"] - json.loads(lines[-1])["seconds_data"]

    def saved(self) -> int:
        """The step of the newest whole checkpoint; 0 without one."""
        folder = checksums.newest(self.folder / "checkpoints").folder
        return 0 if folder is None else int(folder.name)

    def saving(self) -> bool:
        """Whether a checkpoint is there that is not finished."""
        found = list((self.folder / "checkpoints").glob("*"))
        return any(not (path / checksums.MANIFEST).exists() for path in found)


def wait_for(
    happened: Callable[[], bool], process: subprocess.Popen, seconds: float = _PATIENCE
) -> bool:
    """Whether it happened before the process ended; looks two hundred times a second.

    Raises:
      TimeoutError: Neither happened in time.
    """
    end = time.monotonic() + seconds
    while not happened():
        if process.poll() is not None:
            return happened()
        if time.monotonic() > end:
            raise TimeoutError(f"Process {process.pid}: nothing within {seconds:g} s.")
        time.sleep(0.005)
    return True


def ask(process: subprocess.Popen, *signals: signal.Signals) -> tuple[int, float]:
    """Sends signals, half a second apart; the exit status and the seconds to it.

    As a shell has it, the status of a process that a signal ended is 128 + its number.
    """
    for number, each in enumerate(signals):
        time.sleep(0.5 * bool(number))
        process.send_signal(each)
    began = time.monotonic()
    status = process.wait(_PATIENCE)
    return 128 - status if status < 0 else status, time.monotonic() - began


def differing(run: Run, unbroken: Run) -> list[int]:
    """The steps whose logged numbers are not, bit for bit, the unbroken run's."""
    want = unbroken.steps()
    return [step for step, line in run.steps().items() if line != want[step]]


# With it, `stalled` can keep a run from its data.
DECODING_APART = "data.workers.count=1"


@contextlib.contextmanager
def stalled(process: subprocess.Popen) -> Iterator[None]:
    """The process that decodes stands still, as it would on a dead file server."""
    command = ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)]
    children = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = children.stdout.splitlines()
    (decoder,) = (int(x.split()[0]) for x in lines if "timeviper_jax.data.worker" in x)
    os.kill(decoder, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(decoder, signal.SIGKILL)
