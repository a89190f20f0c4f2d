"""Scoring a published benchmark: stopped, shared, cut short, and looked at."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import published_fixtures as fixtures
import pytest
from flax import nnx
from PIL import Image

from timeviper_jax.evals import runner, scoring
from timeviper_jax.evals.base import Question
from timeviper_jax.evals.lines import Lines
from timeviper_jax.evals.published import PublishedBenchmark
from timeviper_jax.evals.run import Run

TIMES = np.arange(4) + 0.5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("videomme")
    video = fixtures.write_video(root / "v.mp4")
    fixtures.videomme(fixtures.Folder(root, video))
    return root


class Parrot:
    """Answers "A) é", and notes whom it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, group: runner.Group) -> runner.Answered:
        questions = [question for same in group for question in same]
        self.asked += [question.id for question in questions]
        return [(question, "A) é") for question in questions]


@pytest.fixture
def parrot(monkeypatch):
    bird = Parrot()
    monkeypatch.setattr(scoring, "_askers", lambda *_: [bird])
    one = lambda questions, _, each=runner.groups: each(questions, 1)
    monkeypatch.setattr(scoring.runner, "groups", one)
    return bird


class Model(nnx.Module):
    """Something with sizes and weights."""

    def __init__(self, weight: float):
        self.cfg, self.weight = "tiny", nnx.Param(jnp.float32(weight))


def score(data, out, *, shard=(0, 1), step=7, weight=1.0, **options) -> str:
    benchmark = PublishedBenchmark(name="videomme", data=str(data), **options)
    plan = scoring.Plan(out=out, shard=shard)
    run = object.__new__(Run)  # No model is asked here.
    object.__setattr__(run, "step", step)
    object.__setattr__(run, "model", Model(weight))
    return scoring.score(run, benchmark, plan)


def results(out) -> dict:
    return json.loads((out / "results.json").read_text())


def test_a_stopped_run_goes_on_to_the_same_files(data, parrot, tmp_path, monkeypatch):
    score(data, tmp_path / "whole")
    append = Lines.append

    def stop_at_second(self, values):
        if "601-1" in str(values):
            with self.path.open("ab") as file:
                file.write(b'{"id": "601-1", "gi')  # Torn by the kill.
            raise KeyboardInterrupt
        append(self, values)

    monkeypatch.setattr(Lines, "append", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        score(data, tmp_path / "stopped")
    monkeypatch.setattr(Lines, "append", append)
    assert not (tmp_path / "stopped/results.json").exists()
    parrot.asked.clear()
    score(data, tmp_path / "stopped")
    assert parrot.asked == ["601-1", "601-2"]
    for name in ("answers.jsonl", "records.json", "results.json", "worst.html"):
        whole, stopped = (tmp_path / run / name for run in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes(), name
    parrot.asked.clear()
    score(data, tmp_path / "stopped")
    assert not parrot.asked


def test_shards_answer_apart_and_are_scored_together(data, parrot, tmp_path):
    whole = score(data, tmp_path / "one")
    parrot.asked.clear()
    said = score(data, tmp_path / "two", shard=(1, 2))
    assert said.startswith("2 of 4 questions are answered") and "--shard" in said
    assert parrot.asked == ["601-1", "601-2"]
    score(data, tmp_path / "two", shard=(0, 2))
    together = score(data, tmp_path / "two")
    assert sorted(parrot.asked) == ["001-1", "001-2", "601-1", "601-2"]
    assert together.replace("/two/", "/one/") == whole
    assert results(tmp_path / "two") == results(tmp_path / "one")


def test_some_questions_can_be_answered_before_the_rest(data, parrot, tmp_path):
    score(data, tmp_path, only=("duration=long",))
    assert {s["count"] for s in results(tmp_path)["scores"]} == {1, 2}
    score(data, tmp_path)
    assert parrot.asked == ["601-1", "601-2", "001-1", "001-2"]
    overall = results(tmp_path)["scores"][0]
    assert (overall["group"], overall["value"], overall["count"]) == ("all", 0.25, 4)


def test_answers_of_another_checkpoint_are_not_mixed_in(data, parrot, tmp_path):
    score(data, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint=7 \(now 8\).*another --out"):
        score(data, tmp_path, step=8)
    with pytest.raises(ValueError, match=r"other settings: model='\w+' \(now '\w+'\)"):
        score(data, tmp_path, weight=2.0)
    with pytest.raises(ValueError, match=r"max_frames=256 \(now 64\)"):
        score(data, tmp_path, max_frames=64)


def test_the_page_shows_the_worst_answers_with_their_frames(data, parrot, tmp_path):
    score(data, tmp_path)
    page = (tmp_path / "worst.html").read_text()
    order = re.findall(r"<h2>(.*?)</h2>", page)
    assert order == ["001-2", "601-1", "601-2", "001-1"]  # The only "A" comes last.
    assert "Best Option: (A) é" in page and "What colour is 601-2?" in page
    # Nothing is fetched when it is opened, and every picture is one.
    assert not re.search(r"(?:src|href)=.(?!data:)|<script|https?://", page)
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 4 * 8
    image = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    assert image.size == (144, 144) and np.asarray(image).std() > 5


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    program = (
        "import sys; from timeviper_jax.evals.lines import Lines\n"
        "lines = Lines(sys.argv[1], settings={})\n"
        "for i in range(1_000_000): lines.append([{'i': i, 'text': 'x' * 5000}] * 3)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
    while not (path.exists() and path.stat().st_size > 100_000):
        assert writer.poll() is None
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with path.open("ab") as file:
        file.write(b'{"i": 5')
    lines = Lines(path, settings={})
    before = lines.read()
    assert len(before) >= 6
    lines.append([{"i": -1}])
    assert Lines(path, settings={}).read() == [*before, {"i": -1}]
    assert path.read_bytes().endswith(b'\n{"i": -1}\n')


@pytest.mark.parametrize("text", ["2", "2/2", "a/b", "-1/2", ""])
def test_a_shard_that_cannot_be_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="shard="):
        scoring.Plan(out=tmp_path, shard=scoring.parse_shard(text))


def test_groups_are_of_like_length_and_one_order(data):
    questions = PublishedBenchmark(name="videomme", data=str(data)).questions()
    once = runner.groups(questions, 4)
    assert [[q.id for q in same] for same in once[0]] == [
        ["001-1", "001-2"],
        ["601-1", "601-2"],
    ]
    assert runner.groups(questions[::-1], 1)[0][0][0].video.endswith("a.mp4")
    short = PublishedBenchmark(
        name="videomme", data=str(data), max_frames=4, min_frames=4
    ).questions()
    assert len(runner.groups([*questions, *short], 4)) == 2


def test_a_video_that_has_no_other_cannot_be_shuffled(data):
    questions = PublishedBenchmark(name="videomme", data=str(data)).questions()
    run = object.__new__(Run)
    with pytest.raises(ValueError, match="a.mp4 is the only video of 40 frames"):
        runner.shuffled(run, [q for q in questions if q.video.endswith("a.mp4")])


def numbered(count: int) -> list[runner.Group]:
    """Groups of a question each, which know their number."""
    return [
        [[Question(id=str(i), video="", times=TIMES, turns=(), answer="", notes={})]]
        for i in range(count)
    ]


def test_askers_share_groups_and_answers_keep_their_order():
    def slow(group):
        ((question,),) = group
        time.sleep(0.05 if question.id == "0" else 0)
        return [(question, question.id)]

    found = list(runner.answer([slow, slow], numbered(8)))
    assert [text for ((_, text),) in found] == [str(i) for i in range(8)]


def test_an_error_of_an_asker_is_raised():
    def asker(group):
        ((question,),) = group
        if question.id == "2":
            raise ValueError("group 2")
        return [(question, "")]

    with pytest.raises(ValueError, match="group 2"):
        list(runner.answer([asker], numbered(100)))
