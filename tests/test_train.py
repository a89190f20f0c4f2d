"""A run that is stopped and continued is the run that never stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

import train
from configs import stage2_video
from timeviper_jax import sharding
from timeviper_jax.conversion import __main__ as conversion
from timeviper_jax.conversion.files import open_files
from timeviper_jax.conversion.folder import save_published
from timeviper_jax.data import shapes
from timeviper_jax.data.quarantine import Quarantine
from timeviper_jax.llm.transv import Stage
from timeviper_jax.training import experiment
from timeviper_jax.training.checkpoint import (
    Checkpoints,
    RunRecord,
    load_model,
    load_params,
    open_run,
)
from timeviper_jax.training.metrics import MetricsWriter
from timeviper_jax.training.speed import OF_THE_MACHINE

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
    """A run of which some steps are traced, unlike of those that are to be equal."""
    workdir = folder / "unbroken"
    train.run(_config(folder), str(workdir), traced=range(2, 4))
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
        {k: v for k, v in json.loads(line).items() if not k.startswith(OF_THE_MACHINE)}
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


def test_a_trace_holds_the_steps_by_number(unbroken):
    (path,) = (unbroken / "profile").glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    lines = [line for plane in planes for line in plane.lines]
    steps = [event for line in lines for event in line.events if event.name == "train"]
    assert [dict(event.stats)["step_num"] for event in steps] == [2, 3]


def test_it_says_how_fast_it_is(unbroken):
    """The videos have six frames each, which all fit; a row holds 24 + 120 tokens."""
    lines = [
        json.loads(x) for x in (unbroken / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    for line in lines:
        frames = line["frames_per_second"] / line["steps_per_second"]
        tokens = line["tokens_per_second"] / line["steps_per_second"]
        assert frames == pytest.approx(2 * 6)
        assert 12 * 4 < tokens < 2 * (24 + 120)
        assert 0 <= line["input_bound"] < 1
        assert "mfu" not in line  # Nobody knows the peak of this processor.


def test_a_run_that_is_killed_continues_bit_for_bit(folder, unbroken):
    workdir = folder / "killed"
    process = _start(folder, workdir)
    # A step's save begins once the one before is whole.
    _wait_for(workdir / "metrics.jsonl", 3, process)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert 1 <= Checkpoints(workdir).latest().stage_step < STEPS
    train.run(_config(folder), str(workdir))
    _assert_same_run(workdir, unbroken)


def test_a_signal_saves_the_step_it_finishes(folder, unbroken, monkeypatch):
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
    with pytest.raises(ValueError, match=r"differs in \['optimizer.weight_decay'\]"):
        train.run(c, str(unbroken))


def test_how_a_run_is_computed_may_change():
    before = _config(pathlib.Path()).to_dict()
    after = _config(pathlib.Path())
    after.mesh.update(data=-1, fsdp=1)
    after.max_redone, after.data.num_threads, after.data.workers.count = 900, 5, 2
    record = RunRecord(step=1, stage="instruct", stage_step=1, config=before)
    train.check_same_run(after.to_dict(), record, "here")
    after.data.lanes = 2
    with pytest.raises(ValueError, match=r"config differs in \['data.lanes'\]"):
        train.check_same_run(after.to_dict(), record, "here")


def test_a_run_can_begin_with_the_parameters_of_another(folder, unbroken, monkeypatch):
    c = _config(folder)
    c.init_from = str(unbroken)
    c.seed = 7  # Else the initial values would be the same anyway.
    monkeypatch.setattr(train.StopRequest, "__bool__", lambda _: True)
    with pytest.raises(SystemExit):
        train.run(c, str(folder / "second"))
    mesh = sharding.make_mesh(fsdp=-1)
    first, second = load_params(unbroken, mesh), load_params(folder / "second", mesh)
    for path in first:
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)


def test_a_run_can_begin_with_parts_of_another_or_of_a_checkpoint(
    folder, unbroken, tmp_path
):
    mesh = sharding.make_mesh(fsdp=-1)
    cfg = experiment.model_config(**_config(folder).model)
    params = load_params(unbroken, mesh)
    some = train.first_params(str(unbroken), ["^projector/"], cfg, mesh)
    assert some.keys() == {path for path in params if path.startswith("projector/")}
    with pytest.raises(ValueError, match="'projektor' names no parameter"):
        train.first_params(str(unbroken), ["projektor"], cfg, mesh)

    llm = {path: a for path, a in params.items() if path.startswith("llm/")}
    llm = {path: a for path, a in llm.items() if "transv" not in path}
    save_published(tmp_path / "published", llm, cfg, "nano")
    for first in (
        train.first_params(str(tmp_path / "published"), [], cfg, mesh),
        train.first_params(str(tmp_path / "published"), ["norm"], cfg, mesh),
    ):
        assert first
        for path, array in first.items():
            np.testing.assert_array_equal(array, llm[path], err_msg=path)
    stages = _config(folder).to_dict()["stages"]["instruct"]["transv"]
    cfg = cfg.with_transv(tuple(Stage(**stage) for stage in stages))
    begun = experiment.fill(cfg, llm, seed=3, mesh=mesh)
    for index in (0, 1):  # Layers 1 and 6 stand before attention 0 and 1.
        np.testing.assert_array_equal(
            begun[f"llm/transv/{index}/q/kernel"],
            llm["llm/attention/mixer/q/kernel"][index],
        )


def test_a_run_that_is_not_there_is_an_error(folder, tmp_path):
    c = _config(folder)
    c.init_from = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere holds no run"):
        train.run(c, str(tmp_path / "run"))
    assert not pathlib.Path(c.init_from).exists()


def _deadly_config(folder, memory_bytes):
    """A run whose fifth item asks a worker for 144 MB.

    Draws 4 and 7 are of it, and what replaces it in draw 4 at first.
    """
    c = _config(folder)
    c.seed, c.checkpoint_every, c.max_redone = 3, 2, 2
    c.data.workers.update(count=1, memory_bytes=memory_bytes)
    return c


@pytest.mark.slow
def test_a_resumed_run_makes_the_choices_of_one_whose_worker_died(
    tmp_path, monkeypatch, caplog
):
    shapes.make(tmp_path / "data")
    Image.new("RGB", (6_000, 6_000)).save(tmp_path / "data" / "large.png")
    items = json.loads((tmp_path / "data" / "videos.json").read_text())
    items.append({**items[0], "id": "large", "image": "large.png"})
    (tmp_path / "data" / "videos.json").write_text(json.dumps(items))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    last_steps = {(4, 0), (4, 1), (7, 0)}
    died: set[tuple[int, int]] = set()
    all_died, add, write = threading.Event(), Quarantine.add, MetricsWriter.write

    def add_and_tell(self, path, position, attempt):
        add(self, path, position, attempt)
        died.add((position, attempt))
        if died >= last_steps:
            all_died.set()

    monkeypatch.setattr(Quarantine, "add", add_and_tell)
    train.run(_deadly_config(tmp_path, 1 << 27), str(whole))
    assert "asked for more than 0.125 GiB of memory" in caplog.text
    assert [line["samples_replaced"] for line in _metrics(whole)] == [0, 0, 2, 3]
    all_died.clear()
    died.clear()

    def write_and_ask(self, step, *args, **labels):
        write(self, step, *args, **labels)
        if step == 1:
            assert all_died.wait(60)  # Input for the last steps has been read ahead.
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "write", write_and_ask)
    with pytest.raises(SystemExit):
        train.run(_deadly_config(tmp_path, 1 << 27), str(stopped))
    monkeypatch.setattr(MetricsWriter, "write", write)
    saved = stopped / "checkpoints" / "2" / "input" / "process_0-of-1.json"
    deaths = json.loads(saved.read_text())["deaths"]["0"]
    assert {tuple(death[1:]) for death in deaths} >= last_steps
    # With as much memory no worker would die.
    caplog.clear()
    train.run(_deadly_config(tmp_path, 4 << 30), str(stopped))
    assert "large.png: in quarantine" in caplog.text
    _assert_same_run(stopped, whole)


def _lora_config(folder):
    c = _config(folder)
    c.lora.update(targets=(r"^llm/attention/.*kernel", "^llm/head"), rank=2, alpha=4.0)
    c.stages.instruct.update(frozen=(r"^(?!.*lora_)",), lr_multipliers=(), lr=1e-2)
    return c


@pytest.mark.slow
def test_lora_alone_learns_continues_bit_for_bit_and_is_merged_on_export(
    folder, tmp_path, monkeypatch
):
    whole, stopped, write = (
        tmp_path / "whole",
        tmp_path / "stopped",
        MetricsWriter.write,
    )
    train.run(_lora_config(folder), str(whole))

    def write_and_ask(self, step, *args, **labels):
        write(self, step, *args, **labels)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "write", write_and_ask)
    with pytest.raises(SystemExit):
        train.run(_lora_config(folder), str(stopped))
    monkeypatch.setattr(MetricsWriter, "write", write)
    train.run(_lora_config(folder), str(stopped))
    _assert_same_run(stopped, whole)

    mesh = sharding.make_mesh(fsdp=-1)
    params, model = load_params(whole, mesh), load_model(open_run(whole), mesh)
    begun = experiment.fill(model.cfg, {}, seed=0, mesh=mesh)
    for path, array in begun.items():
        np.testing.assert_array_equal(params[path], array, err_msg=path)
    a, b = (params[f"llm/head/kernel/lora_{z}"] for z in "ab")
    assert np.any(b)
    np.testing.assert_allclose(
        model.llm.head.kernel[...], begun["llm/head/kernel"] + 2 * a @ b, atol=1e-6
    )
    conversion.main(["save", str(whole), str(tmp_path / "out"), "--family", "nano"])
    head = open_files(tmp_path / "out").read("lm_head.weight")
    np.testing.assert_array_equal(head.T, model.llm.head.kernel[...])


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
        (["--config=configs/stage2_video.py", "--profile=4:2"], "FIRST:LAST"),
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
    train.apply_sweep(c, 0, f"{path}:smoke")
    assert c.stages.instruct.lr == 0.5
    with pytest.raises(KeyError, match="lrr"):
        train.apply_sweep(c, 1, str(path))
    with pytest.raises(ValueError, match=r"sweep_index=2 is outside 0\.\.1"):
        train.apply_sweep(c, 2, str(path))


def test_a_model_must_know_the_tokenizers_ids():
    with pytest.raises(ValueError, match="has 265 ids, the model only 200"):
        train.make_tokenizer("bytes", 200)
