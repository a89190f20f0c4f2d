r"""Runs the sweep of a config on this machine, one index after the other.

python -m timeviper_jax.training.sweep --config configs/needles.py --workdir runs/seeds
python -m timeviper_jax.training.sweep --config configs/stage2_video.py:smoke \
    --workdir runs/lr --only 0,3 -- --compilation_cache=runs/compiled

Each index is a process of `train.py` with a working directory of its own,
`WORKDIR/00` and so on, and prints into its `log.txt`; what follows `--` goes to all of
them. Those that are done are skipped. SIGTERM or SIGINT is passed on: the run saves,
and this ends with status 75; the same command continues. A run that fails is told, and
the others go on; then this ends with status 1. Last of all comes the table of results.
"""

import argparse
import contextlib
import importlib.util
import json
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from timeviper_jax.training import compare
from timeviper_jax.training.signals import SIGNALS, STOPPED

_TRAIN = pathlib.Path(__file__).parents[2] / "train.py"
RECORD = "sweep.json"  # What an index runs, and how its last process ended.


def overrides(config: str) -> list[dict[str, Any]]:
    """What each index of the `sweep()` of FILE.py or FILE.py:ARG changes.

    Raises:
      ValueError: There is no such file, or it has no sweep.
    """
    path, _, _ = config.partition(":")
    if not pathlib.Path(path).exists():
        raise ValueError(f"There is no config {path!r}; give a file such as FILE.py.")
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise ValueError(f"{path} has no sweep(); add one that yields overrides.")
    return list(module.sweep())


class Index:
    """One run of a sweep: what it is to do, and what came of it."""

    def __init__(self, number: int, folder: pathlib.Path, **wanted: Any):
        self.number, self.folder = number, folder
        self._path = folder / RECORD
        # Through JSON, so that it compares with what was written.
        self._wanted = json.loads(json.dumps(wanted))
        self._found = json.loads(self._path.read_text()) if self._path.exists() else {}
        then = {name: self._found.get(name) for name in wanted}
        if self._found and then != self._wanted:
            raise ValueError(
                f"{folder} was begun with {then}, and is now to have {self._wanted};"
                " give the sweep another --workdir."
            )

    @property
    def done(self) -> bool:
        return self._found.get("status") == 0

    def write(self, status: int | None) -> None:
        """Notes how its process ended; None while it runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._found = {**self._wanted, "status": status}
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._found, indent=1))
        part.replace(self._path)

    def run(self, stop: "Stop") -> int:
        """The status of a process that begins it, or goes on with it."""
        self.write(None)
        command = [
            *(sys.executable, str(_TRAIN), f"--config={self._wanted['config']}"),
            *(f"--sweep_index={self.number}", f"--workdir={self.folder}"),
            *self._wanted["arguments"],
        ]
        with (self.folder / "log.txt").open("a") as log:
            print("$", shlex.join(command), file=log, flush=True)
            # In a session of its own, where control-C does not come to it as well.
            process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True
            )
            status = stop.wait(process)
        self.write(status)
        return status


class Stop:
    """True once a signal asked to stop; each is passed on to the process waited for."""

    def __init__(self):
        self._asked, self._process = False, None
        self._before = {n: signal.signal(n, self._hear) for n in SIGNALS}

    def _hear(self, number: int, _: Any) -> None:
        self._asked = True
        if self._process is not None:
            self._process.send_signal(number)

    def __bool__(self) -> bool:
        return self._asked

    def wait(self, process: subprocess.Popen) -> int:
        """The status of the process; of one that a signal ended, minus its number."""
        self._process = process
        if self:  # It came before there was a process to tell.
            process.terminate()
        status = process.wait()
        self._process = None
        return status

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run(indices: Sequence[Index]) -> int:
    """Runs those that are not done; the status to end with."""
    failed = False
    with (
        contextlib.closing(Stop()) as stop,
        tqdm(total=len(indices), desc="sweep", unit="run") as bar,
    ):
        for index in indices:
            bar.set_postfix_str(str(index.folder))
            status = 0 if index.done else index.run(stop)
            if status == STOPPED or stop:
                _tell(f"Stopped in {index.folder}; run it again to continue.")
                return STOPPED
            if status:
                told = f"signal {-status}" if status < 0 else f"status {status}"
                _tell(f"{index.folder} failed with {told}: see its log.txt.")
            failed |= bool(status)
            bar.update()
    return int(failed)


def _tell(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def choose(only: Sequence[int], count: int) -> Sequence[int]:
    """The indices that are named, or all of them if none is."""
    if wrong := [index for index in only if not 0 <= index < count]:
        raise ValueError(f"--only names {wrong}, which are outside 0..{count - 1}.")
    return only or range(count)


def numbers(text: str) -> list[int]:
    """`0,3` as a list."""
    return [int(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:ARG")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--only", type=numbers, default=[], help="indices: 0,3")
    parser.add_argument("arguments", nargs="*", help="after --: for train.py")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        changes = overrides(options.config)
        indices = [
            Index(
                *(number, options.workdir / f"{number:02}"),
                config=options.config,
                overrides=changes[number],
                arguments=options.arguments,
            )
            for number in choose(options.only, len(changes))
        ]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    status = run(indices)
    begun = [index.folder for index in indices if index.folder.exists()]
    print(compare.table([compare.read(folder) for folder in begun]))
    sys.exit(status)


if __name__ == "__main__":
    main()
