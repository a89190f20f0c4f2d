"""What the benchmark of redundancy asks: repeats merged, or skipped at honest times."""

import numpy as np
import pytest

from timeviper_jax.benchmarks import redundancy
from timeviper_jax.data.conversation import Media, Turn
from timeviper_jax.evals.base import Question

CHANGED = np.array([True, False, False, True, True, False])


def watched(skip: bool) -> redundancy.Watched:
    question = Question(
        id="q",
        video="v.mp4",
        times=np.arange(6) + 0.5,
        turns=(Turn("user", (Media(6), "What is shown?")),),
        answer="cat",
        notes={"kind": "what", "depth": 0.5},
    )
    return redundancy.Watched(asked=[question], changed={"v.mp4": CHANGED}, skip=skip)


def second(question: Question) -> np.ndarray:
    """A frame's feature."""
    return np.floor(question.times).astype(np.float16)[:, None, None]


@pytest.mark.parametrize(
    "skip, times, features",
    [
        (False, [0.5, 1.5, 2.5, 3.5, 4.5, 5.5], [0, 0, 0, 3, 4, 4]),
        (True, [0.5, 3.5, 4.5], [0, 3, 4]),
    ],
)
def test_frames_have_their_own_times_and_what_they_repeat(skip, times, features):
    benchmark = watched(skip)
    (question,) = benchmark.questions()
    assert question.times.tolist() == times
    assert question.turns[0].content == (Media(len(times)), "What is shown?")
    found = benchmark.features(second)(question)
    assert found[:, 0, 0].tolist() == features


def test_missing_runs_are_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="error: .*none holds no checkpoint"):
        redundancy.main(["--workdir", str(tmp_path)])
