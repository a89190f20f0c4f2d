r"""The whole path on real video: data, training, evaluation, questions, one command.

python -m timeviper_jax.benchmarks.needles --workdir runs/demo --data data/needles
python -m timeviper_jax.benchmarks.needles --seeds 3

From one trained model three arms go on under the same budget: without compression, with
plain dropping of vision tokens, and with TransV at the same rate; with `--seeds`, that
many times over. Each step is one of the project's commands in a process of its own.
Steps that are done are not done again, and one that was stopped goes on: repeat the
command.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

ARMS = ("none", "drop", "transv")
CONFIG = "configs/needles.py"
STOPPED = 75  # How train.py says that it can go on.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One command; `makes` is where to find what it leaves, `says` what that is."""

    name: str
    says: str
    command: tuple[str, ...]
    makes: pathlib.Path
    again: bool = False  # Cheap, and worth seeing every time.


def steps(args: argparse.Namespace) -> Iterator[Step]:
    """Everything that is to be done, in order."""
    work, base = args.workdir, args.workdir / "base"
    yield make_data(args)
    yield train("base", "a model that answers", CONFIG, base, args, args.seed)
    runs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS]
    for arm, seed in runs:
        name = run_name(arm, seed)
        yield train(
            *(f"train {name}", f"the arm {arm}", f"{CONFIG}:arm={arm}", work / name),
            *(args, args.seed + seed, f"--config.init_from={base}"),
        )
    for arm, seed in runs:
        yield _evaluate(arm, seed, args)
    yield Step(
        name="report",
        says="the arms beside each other",
        command=(
            *(sys.executable, "-m", "timeviper_jax.evals.compare"),
            *("--workdir", str(work), "--seeds", str(args.seeds)),
        ),
        makes=work / "report.json",
        again=True,
    )
    yield _ask(args)


def make_data(args: argparse.Namespace) -> Step:
    return Step(
        name="data",
        says="long videos in which photographs appear, and questions about them",
        command=(
            *(sys.executable, "-m", "timeviper_jax.data.needles"),
            *("--out", str(args.data), "--seed", str(args.data_seed)),
            *("--scale", str(args.scale)),
        ),
        makes=args.data,
    )


def run_name(arm: str, seed: int) -> str:
    return arm if seed == 0 else f"{arm}_{seed}"


def train(
    name: str,
    says: str,
    config: str,
    workdir: pathlib.Path,
    args: argparse.Namespace,
    seed: int,
    *more: str,
) -> Step:
    """One run of train.py on the demo's data."""
    data = args.data
    return Step(
        name=name,
        says=says,
        command=(
            *(sys.executable, "train.py", "--config", config),
            *("--workdir", str(workdir), f"--config.seed={seed}"),
            f"--config.data.manifest={data}/data.yaml",
            f"--config.data.features={data}/features",
            f"--config.data.tokenizer={data}/tokenizer.json",
            f"--compilation_cache={args.workdir}/compiled",
            *more,
        ),
        makes=workdir,
    )


def _evaluate(arm: str, seed: int, args: argparse.Namespace) -> Step:
    name = run_name(arm, seed)
    return Step(
        name=f"evaluate {name}",
        says="answers to the held-out questions, scored",
        command=(
            *(sys.executable, "eval.py", "--workdir", str(args.workdir / name)),
            *("--data", str(args.data), "--frames", args.frames),
            *("--seed", str(args.seed)),
            f"--compilation_cache={args.workdir}/compiled",
            *(("--controls",) if name == ARMS[0] else ()),
        ),
        makes=args.workdir / name / "eval" / "results.json",
    )


def _ask(args: argparse.Namespace) -> Step:
    """Three questions about one held-out video, read when the data are there."""
    command = [sys.executable, "eval.py", "--workdir", str(args.workdir / ARMS[-1])]
    command += [f"--compilation_cache={args.workdir}/compiled"]
    for flag, value in _questions(args.data):
        command += [f"--{flag}", value]
    return Step(
        name="ask",
        says="three questions about a held-out video",
        command=tuple(command),
        makes=args.workdir / "report.json",
        again=True,
    )


def _questions(data: pathlib.Path) -> Iterator[tuple[str, str]]:
    """The flags that ask one question of each of three kinds about the first video."""
    lines = (data / "heldout.jsonl").read_text("utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    first = items[0]["image"]
    yield "video", str(data / first)
    for kind in ("mcq", "what", "when"):
        chosen = [
            item
            for item in items
            if item["image"] == first and item["needle"]["kind"] == kind
        ]
        if chosen:
            question, answer = chosen[0]["conversations"]
            yield "ask", question["value"].removeprefix("<image>\n")
            yield "truth", answer["value"]


class Ledger:
    """What is done, by which command, and how long it took; kept in `steps.json`."""

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / "steps.json"
        known = self._path.exists()
        self._steps = json.loads(self._path.read_text("utf-8")) if known else {}

    @property
    def seconds(self) -> float:
        return sum(entry["seconds"] for entry in self._steps.values())

    def done(self, step: Step) -> float | None:
        """The seconds that a finished step took, if it made what it should."""
        entry = self._steps.get(step.name)
        if entry is None or not entry["done"] or not step.makes.exists():
            return None
        return entry["seconds"] if entry["command"] == list(step.command) else None

    def add(self, step: Step, seconds: float, done: bool) -> None:
        """Adds to what an interrupted step has taken, or begins a new account."""
        entry = self._steps.get(step.name)
        goes_on = entry and entry["command"] == list(step.command) and not entry["done"]
        before = entry["seconds"] if goes_on else 0.0
        self._steps[step.name] = {
            "command": list(step.command),
            "seconds": round(before + seconds, 1),
            "done": done,
        }
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self._steps, indent=1), encoding="utf-8")
        part.replace(self._path)


def perform(step: Step, ledger: Ledger, lock: int) -> None:
    """Runs a step unless it is done; ends the program where the step fails."""
    seconds = ledger.done(step)
    if seconds is not None and not step.again:
        print(f"== {step.name}: done ({step.says}; {seconds:.0f} s): {step.makes}")
        return
    print(f"\n== {step.name}: {step.says}\n   {' '.join(step.command)}", flush=True)
    start = time.monotonic()
    # The child holds the lock as well: none but it may go on while it lives. It has a
    # group of its own, so that it is told to stop once and not twice.
    child = subprocess.Popen(step.command, pass_fds=(lock,), process_group=0)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        code = STOPPED
    ledger.add(step, time.monotonic() - start, done=code == 0)
    if code == STOPPED or code < 0:
        raise SystemExit(f"Stopped in {step.name}; the same command goes on from here.")
    if code:
        raise SystemExit(f"error: {step.name} failed with status {code}; see above.")


def perform_all(steps: Iterator[Step], workdir: pathlib.Path) -> float:
    """Does what is left to do in a directory; the seconds that all of it took."""
    signal.signal(signal.SIGTERM, _interrupt)
    with only_one(workdir) as lock:
        ledger = Ledger(workdir)
        for step in steps:
            perform(step, ledger, lock)
    return ledger.seconds


@contextlib.contextmanager
def only_one(workdir: pathlib.Path) -> Iterator[int]:
    """Holds the directory's lock; the system frees it when the last holder ends."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"error: {workdir} is in use by another process; wait, or end it."
            ) from None
        yield lock.fileno()


def _note_seconds(report: pathlib.Path, seconds: float) -> None:
    values = json.loads(report.read_text("utf-8"))
    report.write_text(
        json.dumps({"seconds": round(seconds), **values}, indent=1) + "\n", "utf-8"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, frames="32,512,2048,10240")
    return parser.parse_args(argv)


def add_flags(parser: argparse.ArgumentParser, *, frames: str) -> None:
    """What the demo and all that goes on from it can be told."""
    add, folder = parser.add_argument, pathlib.Path
    add("--workdir", type=folder, default=folder("runs/demo"), help="all that is made")
    add("--data", type=folder, default=folder("data/needles"), help="the videos")
    add("--seed", type=int, default=0, help="of training")
    add("--data_seed", type=int, default=0, help="of the videos")
    add("--scale", type=float, default=1.0, help="times the counts of videos")
    add("--seeds", type=int, default=1, help="trainings of each arm")
    add("--frames", default=frames, help="lengths that are evaluated")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    seconds = perform_all(steps(args), args.workdir)
    report = args.workdir / "report.json"
    _note_seconds(report, seconds)
    print(f"\n{seconds:.0f} seconds in all. Written:")
    print(f"  {report}\n  {report.with_name('needles.png')}")


if __name__ == "__main__":
    main()
