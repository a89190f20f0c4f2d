"""eval.py --benchmark: a model's answers to published questions, end to end."""

import json
import os
import subprocess
import sys

import published_fixtures as fixtures
import pytest
import tiny
from absl import flags
from flax import nnx

import eval as program
from timeviper_jax import sharding
from timeviper_jax.data.conversation import NANO
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.evals import run
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeViper


def random_run(folder) -> run.Run:
    """A run with random parameters in place of a checkpoint's."""
    return run.Run(
        model=tiny.build(lambda: TimeViper(PRESETS["tiny"], rngs=nnx.Rngs(0))),
        tokenizer=ByteTokenizer(),
        template=NANO,
        features=FeatureStore(folder, "random"),
        mesh=sharding.make_mesh(fsdp=-1),
        config={"data": {"encode_batch": 8, "num_threads": 1}},
    )


def execute(*args: str) -> None:
    values = flags.FlagValues()
    program.define_flags(values)
    values(["eval.py", "--workdir=run", *args])
    program.execute(values)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("videomme")
    fixtures.videomme(fixtures.Folder(root, fixtures.write_video(root / "v.mp4", 6)))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> run.Run:
    return random_run(tmp_path_factory.mktemp("features"))


@pytest.fixture
def asked(trained, data, monkeypatch):
    """Runs the program on `trained` and the questions, whatever the workdir."""
    monkeypatch.setattr(run, "load", lambda workdir: trained)
    # Eight frames, as the model is only asked whether it runs.
    sizes = ["--benchmark_frames=8", "--benchmark=videomme", f"--data={data}"]
    return lambda *args: execute(*sizes, *args)


def test_the_likeliest_option_is_always_an_option(asked, tmp_path, capsys):
    asked("--form=likelihood", f"--out={tmp_path}", "--subtitles")
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["group", "accuracy", "questions"]
    assert "0 of 4 answers unparsed (wrong)" in printed
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["likeliest"] is True
    assert {json.loads(line)["given"] for line in lines[1:]} <= {*"ABCD"}
    records = json.loads((tmp_path / "records.json").read_text())
    right = sum(record["scores"]["accuracy"] for record in records)
    found = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert found[0]["value"] == right / 4


@pytest.mark.slow
def test_answers_in_words_go_on_where_they_stopped(asked, tmp_path, capsys):
    asked(f"--out={tmp_path}", "--limit=2", "--worst=1")
    first = (tmp_path / "answers.jsonl").read_bytes()
    assert "of 2 answers unparsed" in capsys.readouterr().out
    asked(f"--out={tmp_path}")
    assert (tmp_path / "answers.jsonl").read_bytes().startswith(first)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 5
    assert "of 4 answers unparsed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, says",
    [
        (["--benchmark=mvbench"], "Name the folder of mvbench: --data DIR"),
        (["--benchmark=mvbench", "--data=/no/such"], "/no/such: no such folder"),
        (["--benchmark=mvbench", "--data=.", "--shard=3/2"], "shard=3/2"),
        (["--benchmark=mvbench", "--data=.", "--subtitles"], "has no subtitles"),
        (
            ["--benchmark=youcook2", "--data=.", "--meteor_jar=no.jar"],
            "no.jar: no such",
        ),
    ],
)
def test_what_cannot_be_is_one_clear_line(args, says):
    with pytest.raises(SystemExit, match=says) as error:
        execute(*args)
    assert "\n" not in str(error.value)


def test_moments_have_no_likeliest_option(asked, tmp_path, data):
    folder = fixtures.Folder(tmp_path, data / "v.mp4")
    fixtures.activitynet(folder)
    with pytest.raises(SystemExit, match="no options to be likely"):
        asked("--benchmark=activitynet", f"--data={tmp_path}", "--form=likelihood")


@pytest.mark.slow
def test_replicas_on_devices_answer_as_one(asked, data, tmp_path):
    asked("--form=likelihood", f"--out={tmp_path}/one")
    here = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, __file__, str(data), f"{tmp_path}/two", "2"],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)]),
        },
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    one, two = (tmp_path / name / "answers.jsonl" for name in ("one", "two"))
    assert one.read_text() == two.read_text()


if __name__ == "__main__":
    where, out_, replicas_ = sys.argv[1:]
    run.load = lambda workdir: random_run(out_)
    execute(
        *("--benchmark=videomme", f"--data={where}", "--benchmark_frames=8"),
        *(f"--out={out_}", "--form=likelihood", f"--replicas={replicas_}"),
    )
