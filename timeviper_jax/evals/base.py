"""What a benchmark is: questions about videos, and a score for each answer."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

from timeviper_jax.data.conversation import Turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question about the frames of a video at `times`.

    `turns` end where the model is to speak; `answer_prefix` are its first words.
    `notes` say under what the question is filed. One with `choices` can also be
    answered by the likeliest of them.
    """

    id: str
    video: str
    times: Float64[np.ndarray, "F"]
    turns: tuple[Turn, ...]
    answer: str
    notes: dict[str, Any]
    answer_prefix: str = ""
    choices: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.notes["kind"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A question that was answered, and what the answer is worth by each metric."""

    id: str
    video: str
    frames: int
    kind: str
    depth: float | None  # Where in the video the answer lies, 0 to 1, if known.
    answer: str
    given: str
    scores: dict[str, float]


@runtime_checkable
class Benchmark(Protocol):
    """A family of questions; `runner.run` asks them."""

    def questions(self) -> Sequence[Question]:
        """All of them, in a fixed order."""

    def score(self, question: Question, given: str) -> dict[str, float]:
        """What an answer is worth, by metric."""
