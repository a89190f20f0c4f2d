"""eval.py: scores a model, answers about any file, says what it cannot do."""

import dataclasses
import io
import json
import pathlib
import sys

import av
import numpy as np
import pytest
import tiny
from absl import flags
from flax import nnx

import eval as program
from timeviper_jax import sharding
from timeviper_jax.data import frames, needles
from timeviper_jax.data.conversation import NANO
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.data.video import read_frames
from timeviper_jax.evals import run
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeViper


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> run.Run:
    """A run with random parameters in place of a checkpoint's."""
    folder = tmp_path_factory.mktemp("features")
    return run.Run(
        model=tiny.build(lambda: TimeViper(PRESETS["tiny"], rngs=nnx.Rngs(0))),
        tokenizer=ByteTokenizer(),
        template=NANO,
        features=FeatureStore(folder, "random"),
        mesh=sharding.make_mesh(),
        config={"data": {"encode_batch": 8, "num_threads": 1, "features": str(folder)}},
    )


@pytest.fixture
def execute(trained, monkeypatch):
    """Runs the program on `trained`, whatever the workdir."""
    monkeypatch.setattr(run, "load", lambda workdir: trained)
    return _execute


def _execute(*args: str) -> None:
    values = flags.FlagValues()
    program.define_flags(values)
    values(["eval.py", "--workdir=run", *args])
    program.execute(values)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> pathlib.Path:
    return _write_video(tmp_path_factory.mktemp("videos") / "three.mp4", 3)


def _write_video(path: pathlib.Path, frames: int) -> pathlib.Path:
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(frames):
            pixels = rng.integers(0, 255, (64, 64, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_questions_are_answered_in_order_and_frames_encoded_once(
    execute, video, trained, monkeypatch, capsys
):
    ask = [f"--video={video}", "--ask=What?", "--ask=When?", "--max_tokens=3"]
    execute(*ask, "--truth=cat", "--truth=now")
    first = capsys.readouterr().out
    assert first.index("What?\n") < first.index("(true: cat)") < first.index("When?\n")
    assert video in trained.features
    monkeypatch.delattr(frames, "iter_frames")
    execute(*ask, "--truth=cat", "--truth=now")
    assert capsys.readouterr().out == first
    lines = io.StringIO("What?\n" + "long " * 200 + "\nWhen?\n\nnot read\n")
    monkeypatch.setattr(sys, "stdin", lines)
    execute(f"--video={video}", "--interactive", "--max_tokens=3")
    what, too_long, when = capsys.readouterr().out.splitlines()
    assert too_long.startswith("error: The question is ")
    answers = [line.split("    (true")[0].strip() for line in first.splitlines()]
    assert [what.strip(), when.strip()] == [answers[1], answers[3]]


def test_long_videos_are_encoded_a_batch_at_a_time(trained, tmp_path):
    short = _write_video(tmp_path / "short.mp4", 5)
    long = _write_video(tmp_path / "long.mp4", 70)
    run.encode_missing(trained, [str(short), str(long)])
    assert trained.features.get(long).shape == (70, 4, 32)
    got = trained.features.get(long)[66:]
    pixels = read_frames(long, [66.5, 67.5, 68.5, 69.5], 32)
    np.testing.assert_allclose(got, trained.encoder()(pixels), rtol=2e-3, atol=2e-3)
    assert short in trained.features


def test_a_video_of_one_frame_is_answered(execute, tmp_path, capsys):
    one = _write_video(tmp_path / "one.mp4", 1)
    execute(f"--video={one}", "--ask=What?", "--max_tokens=3")
    assert capsys.readouterr().out.startswith("What?\n")


def _cut(path: pathlib.Path, video: pathlib.Path) -> None:
    path.write_bytes(video.read_bytes()[:2000])


@pytest.mark.parametrize(
    "write, says",
    [
        (_cut, "cut short|cannot|can be decoded"),
        (lambda path, _: path.write_text("hello"), "not a video"),
        (lambda path, _: None, "no such file"),
    ],
    ids=["truncated", "text", "missing"],
)
def test_a_file_that_is_no_whole_video_is_one_clear_line(
    execute, video, tmp_path, write, says
):
    path = tmp_path / "bad.mp4"
    write(path, video)
    with pytest.raises(SystemExit, match=says) as error:
        execute(f"--video={path}", "--ask=What?")
    assert str(error.value).startswith("error: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--video=v.mp4", "--ask= "], "is empty"),
        (["--video=v.mp4"], "together"),
        (["--video=v.mp4", "--ask=a", "--truth=b", "--truth=c"], "2 --truth for 1"),
        (["--kinds=who"], "who"),
    ],
)
def test_flags_that_cannot_be_meant_are_one_clear_line(execute, args, says):
    with pytest.raises(SystemExit, match=says):
        execute(*args)


def test_an_unknown_flag_is_an_error():
    with pytest.raises(flags.UnrecognizedFlagError):
        _execute("--framse=32")


def test_a_run_without_checkpoint_is_one_clear_line(tmp_path, video):
    with pytest.raises(SystemExit, match="holds no checkpoint; train into it first"):
        _execute(f"--workdir={tmp_path}/none", f"--video={video}", "--ask=What?")
    assert not (tmp_path / "none").exists()
    # Killed within its first save.
    (tmp_path / "cut" / "checkpoints" / "4" / "params").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds no checkpoint; train into it first"):
        _execute(f"--workdir={tmp_path}/cut", f"--video={video}", "--ask=What?")


def test_scores_and_controls_are_written(execute, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    counts = {"train_32": 1, "heldout_32": 2} | dict.fromkeys(
        ("train_512", "train_files_32", "heldout_512", "heldout_2048")
        + ("heldout_10240", "heldout_views_32"),
        0,
    )
    needles.make(data, needles.NeedlesConfig(**counts, reel=32), workers=1)
    execute(f"--data={data}", "--frames=32", f"--out={out}", "--controls")
    written = json.loads((out / "results.json").read_text())
    fields = {"frames", "compression", "question", "metric"}
    fields |= {"value", "low", "high", "count"}
    assert all(set(result) == fields for result in written["results"])
    assert {r["question"] for r in written["results"]} >= {"mcq", "what", "when"}
    assert {r["compression"] for r in written["results"]} == {"transv"}
    assert set(written["controls"]) == {"text_only", "vision_shuffled"}
    assert (out / "needles.png").exists()
    assert "when mIoU" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags_, encoded",
    [((), 3), (("--redundancy=1",), 1), (("--redundancy=1", "--repeats=skip"), 1)],
)
def test_frames_that_repeat_are_not_encoded(
    trained, execute, tmp_path, monkeypatch, capsys, flags_, encoded
):
    given = []

    def encode(frames):
        given.append(len(frames))
        return np.ones((len(frames), 4, 32), np.float16)

    # Another value each time, which has no encoder yet, as after loading.
    monkeypatch.setattr(run, "load", lambda workdir: dataclasses.replace(trained))
    monkeypatch.setattr(run, "make_encoder", lambda *_, **__: encode)
    still = _write_video(tmp_path / "still.mp4", 3)
    still.write_bytes(still.read_bytes() + repr(flags_).encode())  # Not seen before.
    execute(f"--video={still}", "--ask=What?", "--max_tokens=3", *flags_)
    assert sum(given) == encoded
    capsys.readouterr()
    with pytest.raises(SystemExit, match="error: threshold=2.0 is not a share"):
        execute(f"--video={still}", "--ask=What?", "--redundancy=2")
