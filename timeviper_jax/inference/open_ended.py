"""Video that has no end: feed frames as they come, ask at any moment, feed on.

    video = OpenEndedVideo(viewer, before)
    video.feed(features, times)
    ids, = video.ask([question], decoding=Decoding(stop_ids=stops))
    video.feed(more_features, later_times)

`split_around` makes `before` and `question` of a prompt. A question is read by a copy
of what is remembered, and leaves no trace. Without TransV the answer is that of
watching the same frames at once. With it, a uniform stage would keep other tokens of a
video that goes on than of one that ends here, and so would a stage that ranks by
attention for another question. `policy` says what is selected when:

- "exact": nothing before a question. The residual before the first stage is held, and
  asking runs all later layers over it: the answer is that of watching the same frames
  at once. What is held, and what a question costs, grows with what was fed.
- "blocks": every token is kept or dropped, for good, as it comes. Each stage spreads
  the tokens that it keeps evenly over every `block_frames` frames, as it would over a
  video that ended there; also a stage that ranks by attention, which has no question
  yet to rank by. The caches and what transfers read of dropped tokens grow; feeding
  costs the same for each frame but for attention to what is cached, and so does asking.
- "ranked": as "blocks" up to the first stage that ranks by attention. What comes there
  is held, and ranked when a question is asked; later stages follow as in "exact".
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Role
from timeviper_jax.inference.memory import Memory
from timeviper_jax.inference.selection import spreads
from timeviper_jax.inference.source import Tokens
from timeviper_jax.inference.viewer import Viewer, text_part

POLICIES = ("exact", "blocks", "ranked")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenEndedConfig:
    """How a video without an end is thinned, see above; "exact" has no blocks.

    Caches are made for `expected_frames`, and double whenever they are full; each size
    has its own programs, so that what is expected compiles once.
    """

    policy: Literal["exact", "blocks", "ranked"] = "blocks"
    block_frames: int = 256
    expected_frames: int = 0

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r} is not in {POLICIES}.")
        if self.block_frames < 1:
            raise ValueError(f"block_frames={self.block_frames}; use 1 or more.")
        if self.expected_frames < 0:
            raise ValueError(f"expected_frames={self.expected_frames}; use 0 or more.")


def split_around(prompt: EncodedText) -> tuple[EncodedText, EncodedText]:
    """What a prompt says before its video, of whatever length, and after it."""
    vision = prompt.media_positions
    if not len(vision):
        raise ValueError("A prompt without a place for its video; put a Media in it.")
    before = text_part(prompt, slice(int(vision[0])))
    return before, text_part(prompt, slice(int(vision[-1]) + 1, None))


class OpenEndedVideo:
    """One video that is watched while it comes.

    Raises:
      ValueError: Of each method, once the video is closed.
    """

    def __init__(
        self,
        viewer: Viewer,
        before: EncodedText,
        cfg: OpenEndedConfig = OpenEndedConfig(),  # noqa: B008 (is frozen)
    ):
        if len(before.media_positions):
            raise ValueError("`before` holds vision tokens; feed the frames instead.")
        self.cfg, self.num_frames = cfg, 0
        self._viewer, self._reader = viewer, viewer.reader
        stages = self._reader.llm.transv
        ranks = [stage.select == "attention" for stage in stages]
        exact = [True for _ in stages]
        waits = dict(exact=exact, ranked=ranks, blocks=[False for _ in stages])
        waits, block = waits[cfg.policy], 0
        if cfg.policy != "exact":
            block = cfg.block_frames * self._reader.tokens_per_frame
            _check_block(cfg, stages, waits, block)
        state = self._reader.begin(
            text=np.array([len(before.tokens)]),
            vision=np.array([cfg.expected_frames * self._reader.tokens_per_frame]),
            waits=waits,
            block=block,
        )
        self._state: Memory | None = dataclasses.replace(
            state,
            unread=self._tokens(before.tokens, before.roles),
            vision_counts=np.zeros(1, int),
        )
        self._read()

    @property
    def memory(self) -> Memory:
        """What is remembered now; the next `feed` takes it away."""
        if self._state is None:
            raise ValueError("This video is closed; begin another.")
        return self._state

    def feed(
        self, features: Float[np.ndarray, "F V E"], times: Float[np.ndarray, " F"]
    ) -> None:
        """Reads the next frames, as many as there are, shown at `times` in seconds."""
        state = self.memory
        F, V, E = features.shape
        if not F:
            raise ValueError("No frame to read; feed one or more.")
        wanted = self._reader.tokens_per_frame, self._reader.feature_dim
        if (V, E) != wanted:
            raise ValueError(
                f"Frames of {V} tokens of width {E}, but the model reads {wanted[0]} of"
                f" width {wanted[1]}; encode them with this model."
            )
        new = dataclasses.replace(
            self._tokens(np.zeros(F * V), np.full(F * V, Role.VISION)),
            features=features.reshape(1, F * V, E).astype(np.float32),
            times=np.repeat(times, V)[None].astype(np.float32),
        )
        self._state = dataclasses.replace(
            state,
            unread=state.unread.then(new),
            vision_counts=state.vision_counts + F * V,
        )
        self.num_frames += F
        self._read()

    def ask(self, questions: Sequence[EncodedText], **options: Any) -> list[list[int]]:
        """Answers about what was fed so far; `options` are those of `Viewer.ask`."""
        return self._viewer.ask(
            self.memory, questions, rows=[0] * len(questions), **options
        )

    def logits(self, questions: Sequence[EncodedText]) -> Float[np.ndarray, "B vocab"]:
        """The logits of each answer's next token."""
        return self._viewer.logits(self.memory, questions, rows=[0] * len(questions))

    def converse(
        self, questions: Sequence[EncodedText], **options: Any
    ) -> tuple[list[list[int]], Memory]:
        """Answers, and a memory for follow-up questions about what was fed so far."""
        return self._viewer.converse(
            self.memory, questions, rows=[0] * len(questions), **options
        )

    def close(self) -> None:
        """Forgets the video."""
        self._state = None

    def _tokens(self, tokens: np.ndarray, roles: np.ndarray) -> Tokens:
        """Tokens of one row without features."""
        T = len(tokens)
        return Tokens(
            tokens=tokens[None].astype(np.int32),
            roles=roles[None].astype(np.int32),
            features=np.zeros((1, T, self._reader.feature_dim), np.float32),
            times=np.zeros((1, T), np.float32),
        )

    def _read(self) -> None:
        """Reads what there is in whole chunks; less than one stays unread."""
        state, C = self.memory, self._reader.cfg.chunk
        unread, state = state.unread, dataclasses.replace(state, unread=None)
        whole = unread.length // C * C
        for start in range(0, whole, C):
            chunk = unread.map(lambda array, at=start: array[:, at : at + C])
            state = self._reader.push_tokens(state, chunk)
        rest = unread.map(lambda array: array[:, whole:].copy())
        self._state = dataclasses.replace(state, unread=rest)


def _check_block(
    cfg: OpenEndedConfig, stages: Sequence, waits: Sequence[bool], block: int
) -> None:
    """Raises where a block is so short that a stage would keep none of it."""
    tokens = np.array([block])
    for stage, spread, wait in zip(
        stages, spreads(stages, tokens, tokens), waits, strict=True
    ):
        if wait:
            return
        if stage.keep and not spread.kept[0]:
            raise ValueError(
                f"Blocks of {cfg.block_frames} frames are {block} tokens, of which"
                f" keep={stage.keep} at layer {stage.layer} is none; use larger"
                " block_frames."
            )
