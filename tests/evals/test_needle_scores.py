"""Needle answers: parsed, graded, gathered by length and kind."""

import numpy as np
import pytest

from timeviper_jax.evals import report
from timeviper_jax.evals.base import Question, Record
from timeviper_jax.evals.needles import NeedleBenchmark


def question(kind: str, answer: str) -> Question:
    return Question(
        id="q",
        video="v.mp4",
        times=np.arange(4) + 0.5,
        turns=(),
        answer=answer,
        notes={"kind": kind, "depth": 0.5},
    )


def record(number: int, video: int, score: float, kind: str = "mcq", frames: int = 32):
    return Record(
        id=f"{video}/{number}",
        video=f"{video}.mp4",
        frames=frames,
        kind=kind,
        depth=(number % 5) / 5,
        answer="A",
        given="A",
        scores={"mIoU" if kind == "when" else "accuracy": score},
    )


def test_moments_are_graded_and_the_rest_is_right_or_wrong():
    score = NeedleBenchmark(data="").score
    assert score(question("when", "00010 to 00020"), "00010 to 00016") == {
        "mIoU": 0.6,
        "R@1 0.3": 1,
        "R@1 0.5": 1,
        "R@1 0.7": 0,
    }
    assert score(question("what", "cat"), " cat\n") == {"accuracy": 1}
    assert score(question("what", "cat"), "cats") == {"accuracy": 0}


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="who"):
        NeedleBenchmark(data="", kinds=("mcq", "who"))


def test_intervals_are_as_wide_as_the_videos_are_few():
    # Four answers to each video, all alike: 50 videos, not 200 questions.
    scores = [(str(v), float(v % 2)) for v in range(50) for _ in range(4)]
    found = report.interval(scores)
    assert found["value"] == 0.5
    half = 1.96 * 0.5 / np.sqrt(50)
    np.testing.assert_allclose(
        [found["low"], found["high"]], [0.5 - half, 0.5 + half], atol=0.02
    )


def test_differences_are_taken_question_by_question():
    ours = [record(i, v, 1.0, "when") for v in range(4) for i in range(3)]
    theirs = [record(i, v, 0.2 * v, "when") for v in range(4) for i in range(3)]
    (found,) = report.paired([(ours, theirs[::-1])], kind="when")
    assert found["value"] == pytest.approx(0.7)
    assert found["count"] == 12
    assert found["low"] > 0


def test_a_table_and_a_picture_show_every_cell(tmp_path):
    arms = {
        arm: [
            record(i, v, float(v % 2), kind, frames)
            for kind in ("mcq", "when")
            for frames in (32, 512)
            for v in range(4)
            for i in range(5)
        ]
        for arm in ("none", "transv")
    }
    results = [r for arm in arms for r in report.summarise(arms[arm], arm)]
    lines = report.table(results).splitlines()
    assert lines[0].split() == [
        "frames",
        "compression",
        "mcq",
        "accuracy",
        "when",
        "mIoU",
    ]
    assert [line.split()[:2] for line in lines[1:]] == [
        [frames, arm] for frames in ("32", "512") for arm in arms
    ]
    report.plot(arms, tmp_path / "needles.png")
    assert 5_000 < (tmp_path / "needles.png").stat().st_size < 300_000
    lengths, grid = report.depth_map(arms["none"], "mcq")
    assert lengths == [32, 512]
    assert grid.shape == (5, 2) and np.all(grid == 0.5)


def test_records_survive_being_written(tmp_path):
    records = [record(0, 1, 0.5)]
    report.write_records(tmp_path / "new" / "records.json", records)
    assert report.read_records(tmp_path / "new" / "records.json") == records
