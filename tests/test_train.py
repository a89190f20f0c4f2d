"""A run that is stopped and continued is the run that never stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags

import train
from configs import stage2_video
from timeviper_jax import sharding
from timeviper_jax.training.checkpoint import Checkpoints, load_params
from timeviper_jax.training.metrics import MetricsWriter

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


def _config(folder):
    c = stage2_video.get_config("smoke")
    c.data.manifest = str(folder / "data" / "data.yaml")
    c.checkpoint_every = 1
    c.keep_checkpoints = 10
    return c


def _flags(folder):
    """The command line that says what `_config` says."""
    return [
        "--config=configs/stage2_video.py:smoke",
        f"--config.data.manifest={folder / 'data' / 'data.yaml'}",
        "--config.checkpoint_every=1",
        "--config.keep_checkpoints=10",
    ]


@pytest.fixture(scope="module")
def unbroken(folder):
    workdir = folder / "unbroken"
    train.run(_config(folder), str(workdir))
    return workdir


def _start(folder, workdir):
    return subprocess.Popen(
        [sys.executable, "train.py", *_flags(folder), f"--workdir={workdir}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(path, count, process):
    """Returns when the file has `count` lines, or the process has ended."""
    while process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)


def _metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "steps_per_second"}
        for line in lines
    ]


def _assert_same_run(workdir, unbroken):
    mesh = sharding.make_mesh(fsdp=-1)
    got, want = load_params(workdir, mesh), load_params(unbroken, mesh)
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)
    assert _metrics(workdir) == _metrics(unbroken)


def test_it_learns_and_logs_every_step(unbroken):
    lines = _metrics(unbroken)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert Checkpoints(unbroken).latest().stage_step == STEPS


def test_a_run_that_is_killed_continues_bit_for_bit(folder, unbroken):
    workdir = folder / "killed"
    process = _start(folder, workdir)
    _wait_for(workdir / "metrics.jsonl", 2, process)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert 1 <= Checkpoints(workdir).latest().stage_step < STEPS
    train.run(_config(folder), str(workdir))
    _assert_same_run(workdir, unbroken)


@pytest.fixture
def handlers():
    """Leaves the signals as they were."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_saves_the_step_it_finishes(folder, unbroken, monkeypatch, handlers):
    workdir, write = folder / "asked", MetricsWriter.write

    def write_and_ask(self, step, *args, **labels):
        write(self, step, *args, **labels)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "write", write_and_ask)
    with pytest.raises(SystemExit) as stopped:
        train.run(_config(folder), str(workdir))
    assert stopped.value.code == train.STOPPED
    assert Checkpoints(workdir).latest().stage_step == 1
    train.run(_config(folder), str(workdir))
    _assert_same_run(workdir, unbroken)


def test_a_finished_run_is_left_alone(folder, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    train.run(_config(folder), str(unbroken))
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_another_config_does_not_continue_a_run(folder, unbroken):
    c = _config(folder)
    c.optimizer.weight_decay = 0.5
    with pytest.raises(ValueError, match=r"config differs in \['optimizer'\]"):
        train.run(c, str(unbroken))


def test_a_run_can_begin_with_the_parameters_of_another(folder, unbroken, monkeypatch):
    c = _config(folder)
    c.init_from = str(unbroken)
    c.seed = 7  # Else the initial values would be the same anyway.
    monkeypatch.setattr(train, "StopRequest", lambda: True)  # Before the first step.
    with pytest.raises(SystemExit):
        train.run(c, str(folder / "second"))
    mesh = sharding.make_mesh(fsdp=-1)
    first, second = load_params(unbroken, mesh), load_params(folder / "second", mesh)
    for path in first:
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)


def test_a_run_that_is_not_there_is_an_error(folder, tmp_path):
    c = _config(folder)
    c.init_from = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere holds no run"):
        train.run(c, str(tmp_path / "run"))
    assert not pathlib.Path(c.init_from).exists()


@pytest.fixture
def parse(monkeypatch):
    """Reads a command line as train.py does, into flags of its own."""

    def parse(*arguments):
        values = flags.FlagValues()
        train.define_flags(values)
        command = ["train.py", "--workdir=w", *arguments]
        monkeypatch.setattr(sys, "argv", command)  # config_flags looks there.
        values(command)
        return values

    return parse


def test_flags_override_fields(parse):
    values = parse(
        "--config=configs/stage2_video.py:frames=64,smoke",
        "--config.stages.instruct.lr=3e-4",
    )
    assert values.config.stages.instruct.lr == 3e-4
    assert values.config.stages.instruct.steps == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/stage2_video.py", "--workdri=x"], "workdri"),
        (["--config=configs/stage2_video.py", "--config.sed=1"], "sed"),
        (["--config=configs/stage2_video.py:smok"], "smok"),
        (["--config=configs/stage2_video.py", "--config.seed=one"], "one"),
        ([], "config"),
    ],
)
def test_a_misspelt_flag_or_field_is_an_error(parse, arguments, message):
    errors = (flags.Error, AttributeError, KeyError, ValueError)
    with pytest.raises(errors, match=message):
        parse(*arguments)


def test_a_sweep_index_applies_its_overrides(tmp_path):
    path = tmp_path / "swept.py"
    path.write_text(
        '"""A sweep."""\ndef sweep():\n    yield {"stages.instruct.lr": 0.5}\n'
        '    yield {"stages.instruct.lrr": 0.5}\n'
    )
    c = stage2_video.get_config().lock()
    train.apply_sweep(c, 0, str(path))
    assert c.stages.instruct.lr == 0.5
    with pytest.raises(KeyError, match="lrr"):
        train.apply_sweep(c, 1, str(path))
    with pytest.raises(ValueError, match=r"sweep_index=2 is outside 0\.\.1"):
        train.apply_sweep(c, 2, str(path))


def test_a_model_must_know_the_tokenizers_ids():
    with pytest.raises(ValueError, match="has 265 ids, the model only 200"):
        train.make_tokenizer("bytes", 200)
