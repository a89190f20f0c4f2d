"""What the benchmark of open-ended video says of its policies."""

import numpy as np
import pytest

from timeviper_jax.benchmarks import open_ended
from timeviper_jax.data.conversation import Media, Turn
from timeviper_jax.evals.base import Question
from timeviper_jax.evals.needles import NeedleBenchmark
from timeviper_jax.inference.open_ended import OpenEndedConfig

QUESTION = Question(
    id="q",
    video="v.mp4",
    times=np.arange(8) + 0.5,
    turns=(Turn("user", (Media(8), "What is shown?")),),
    answer="cat",
    notes={"kind": "what", "depth": 0.5},
)


def tally(half: str, end: str, first: float, residual: int) -> open_ended.Tally:
    likely = np.array([first, 1 - first])
    return open_ended.Tally(
        said={("q", 0.5): (half, likely), ("q", 1.0): (end, likely)},
        feeding=0.4,
        asking=3.0,
        frames=8,
        kept={"attention": 80, "residual": residual},
    )


def test_a_policy_is_held_against_the_exact_one():
    exact = tally("dog", "cat", 0.75, 800)
    blocks = tally("cat", "cat", 0.5, 0)
    row = open_ended.row(
        NeedleBenchmark(data="data"),
        [QUESTION],
        OpenEndedConfig(policy="blocks", block_frames=4),
        blocks,
        exact,
    )
    assert (row["policy"], row["block_frames"], row["frames"]) == ("blocks", 4, 8)
    (score,) = row["scores"]
    assert score["value"] == 1.0
    assert (row["same_answers"], row["distance"]) == (0.5, 0.25)
    assert (row["feed_seconds_per_frame"], row["ask_seconds"]) == (0.05, 1.5)
    assert row["kept_bytes_per_frame"] == {"attention": 10, "residual": 0}


def test_a_missing_run_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="error: .* holds no checkpoint"):
        open_ended.main(["--workdir", str(tmp_path / "none")])
