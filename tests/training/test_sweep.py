"""Sweeps of runs that end in all the ways that runs do."""

import json
import os
import signal
import threading
import time

import pytest

from timeviper_jax.training import compare, sweep
from timeviper_jax.training.signals import STOPPED

# In place of train.py: notes that it was there, and ends as FILE.py's sweep says.
TRAIN = """
import json, pathlib, runpy, sys, time
flags = dict(x.removeprefix("--").split("=", 1) for x in sys.argv[1:])
index, workdir = int(flags["sweep_index"]), pathlib.Path(flags["workdir"])
with open(workdir / "metrics.jsonl", "a") as file:
    print(json.dumps(dict(step=1, stage="only", loss=float(index))), file=file)
config, _, arg = flags["config"].partition(":")
status = list(runpy.run_path(config)["sweep"]())[index]["status"]
again = pathlib.Path(workdir / "log.txt").read_text().count("$") > 1
sys.exit(0 if again and status == 75 else status)
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config whose sweep's runs end with these statuses."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(sweep, "_TRAIN", tmp_path / "train.py")

    def write(*statuses):
        path = tmp_path / "config.py"
        path.write_text(
            f'def sweep():\n    for s in {statuses}:\n        yield {{"status": s}}\n'
        )
        return str(path)

    return write


@pytest.fixture
def run(tmp_path):
    """Runs the command; its status, and how often each index was begun."""

    def run(path, *arguments):
        workdir = tmp_path / "sweep"
        command = ["--config", f"{path}:arg", "--workdir", str(workdir), *arguments]
        with pytest.raises(SystemExit) as ended:
            sweep.main(command)
        made = workdir.glob("*/metrics.jsonl")
        return ended.value.code, {
            path.parent.name: len(path.read_text().splitlines()) for path in made
        }

    return run


def test_a_run_that_fails_is_told_and_the_others_go_on(config, run, capsys):
    path = config(0, 65, 0)
    assert run(path) == (1, {"00": 1, "01": 1, "02": 1})
    told = capsys.readouterr()
    assert "01 failed with status 65: see its log.txt" in told.err
    assert len(told.out.splitlines()) == 4  # The table, with one line for each.
    # Those that are done are left alone.
    assert run(path) == (1, {"00": 1, "01": 2, "02": 1})


def test_a_run_that_stops_ends_the_sweep_and_is_continued(config, run):
    path = config(0, STOPPED, 0)
    assert run(path) == (STOPPED, {"00": 1, "01": 1})
    assert run(path) == (0, {"00": 1, "01": 2, "02": 1})


def test_some_of_the_indices_can_be_chosen(config, run):
    assert run(config(0, 0, 0), "--only", "0,2") == (0, {"00": 1, "02": 1})


def test_what_follows_two_dashes_is_for_train(config, run, tmp_path):
    assert run(config(0), "--", "--config.seed=3", "--x=a b")[0] == 0
    log = (tmp_path / "sweep" / "00" / "log.txt").read_text()
    assert "--sweep_index=0" in log and "--config.seed=3 '--x=a b'" in log


def test_an_index_is_never_continued_as_something_else(config, run):
    assert run(config(0, 0))[0] == 0
    status, _ = run(config(0, 65))
    assert "01 was begun with" in status and "another --workdir" in status
    status, _ = run(config(0, 0), "--", "--config.seed=3")
    assert "00 was begun with" in status


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "0,7"], r"--only names \[7\], which are outside 0..1"),
        (["--config", "nowhere.py:smoke"], "no config 'nowhere.py'"),
        (["--config", "configs/common.py"], "configs/common.py has no sweep"),
    ],
)
def test_what_is_asked_for_wrongly_is_said_in_a_line(
    config, tmp_path, arguments, message
):
    command = ["--config", config(0, 0), "--workdir", str(tmp_path / "sweep")]
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        sweep.main([*command, *arguments])
    assert not (tmp_path / "sweep").exists()


# In place of train.py: one that is asked to stop, and ends as it pleases.
SLOW = """
import pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[3].removeprefix("--workdir="))
def leave(*_):
    (workdir / "asked").write_text("")
    sys.exit({status})
signal.signal(signal.SIGTERM, leave)
(workdir / "begun").write_text("")
time.sleep(60)
"""


def ask_once_there_is(path):
    """Sends this process, while a sweep runs in it, a signal to stop."""

    def ask():
        while not path.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()


@pytest.mark.parametrize("status", [STOPPED, 1, 0])
def test_a_signal_goes_to_the_run_and_ends_the_sweep(config, run, tmp_path, status):
    """However the run then ends: it may not have come to where it listens."""
    path = config(0, 0)
    (tmp_path / "train.py").write_text(SLOW.format(status=status))
    first = tmp_path / "sweep" / "00"

    ask_once_there_is(first / "begun")
    assert run(path)[0] == STOPPED
    assert (first / "asked").exists() and not first.with_name("01").exists()
    assert json.loads((first / sweep.RECORD).read_text())["status"] == status


@pytest.mark.slow
def test_real_runs_are_stopped_continued_and_tabled(tmp_path, capsys):
    workdir = tmp_path / "sweep"
    command = [
        *("--config", "configs/stage1_align.py:smoke", "--only", "1,3"),
        *("--workdir", str(workdir), "--"),
        f"--config.data.manifest={tmp_path / 'data' / 'data.yaml'}",
    ]

    ask_once_there_is(workdir / "01" / "metrics.jsonl")
    for status in (STOPPED, 0):
        with pytest.raises(SystemExit) as ended:
            sweep.main(command)
        assert ended.value.code == status
    capsys.readouterr()
    compare.main([str(workdir / "01"), str(workdir / "03"), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["overrides"] for row in rows] == [
        {"stages.align.lr": 1e-5},
        {"stages.align.lr": 1e-3},
    ]
    for row in rows:
        assert (row["steps"], row["of_steps"], row["stage"]) == (4, 4, "align")
        assert row["loss"] > 0 and row["tokens_per_second"] > 0
        assert row["frames_per_second"] == pytest.approx(2 * row["steps_per_second"])
