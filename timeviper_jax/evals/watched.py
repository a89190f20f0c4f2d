"""A video that a run's model has watched, to be asked any number of questions."""

import dataclasses
import os

import numpy as np
from jaxtyping import Float64

from timeviper_jax.data.conversation import EncodedText, Media, Turn, encode_prompt
from timeviper_jax.data.examples import Example, FrameFeatures
from timeviper_jax.evals import run
from timeviper_jax.inference.memory import Memory
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import (
    OnTokens,
    Viewer,
    ViewerConfig,
    split_prompt,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are put and answered, and room for the longest of both."""

    decoding: Decoding
    question_tokens: int = 512
    answer_prefix: str = ""
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched:
    """A model that remembers a video."""

    run: run.Run
    asking: Asking
    num_frames: int
    viewer: Viewer
    memory: Memory

    def ask(self, question: str, on_tokens: OnTokens | None = None) -> str:
        """The answer; `on_tokens` hears of it as it comes.

        Raises:
          ValueError: The question is empty, or longer than there is room for.
        """
        prompt = make_prompt(self.run, self.asking, self.num_frames, question)
        _, asked = split_prompt(prompt)
        most = self.asking.question_tokens
        if not question.strip():
            raise ValueError(f"The question {question!r} is empty; ask something.")
        if len(asked.tokens) > most:
            raise ValueError(
                f"The question is {len(asked.tokens)} tokens long; ask in {most}."
            )
        (ids,) = self.viewer.ask(
            self.memory,
            [asked],
            decoding=self.asking.decoding,
            seed=self.asking.seed,
            on_tokens=on_tokens,
        )
        return self.run.tokenizer.decode(ids)


def watch(
    run_: run.Run,
    path: str | os.PathLike,
    times: Float64[np.ndarray, "F"],
    asking: Asking,
) -> Watched:
    """Watches the frames at `times`, while they are decoded and encoded."""
    viewer = make_viewer(run_, asking)
    with run.encoded(run_, path, times) as features:
        memory = viewer.watch([watched_example(run_, asking, times, features)])
    return Watched(
        run=run_, asking=asking, num_frames=len(times), viewer=viewer, memory=memory
    )


def make_viewer(run_: run.Run, asking: Asking) -> Viewer:
    sizes = ViewerConfig(chunk=256)
    # A question's last chunk takes whole slots.
    room = asking.question_tokens + sizes.text_chunk + asking.decoding.max_tokens
    return Viewer(run_.model, dataclasses.replace(sizes, text_room=room))


def watched_example(
    run_: run.Run,
    asking: Asking,
    times: Float64[np.ndarray, "F"],
    features: FrameFeatures,
) -> Example:
    """What is watched, which is the same whatever is asked."""
    before, _ = split_prompt(make_prompt(run_, asking, len(times), "?"))
    return Example(
        tokens=before.tokens,
        roles=before.roles,
        loss_mask=before.loss_mask,
        frame_times=times.astype(np.float32),
        features=features,
    )


def make_prompt(
    run_: run.Run, asking: Asking, num_frames: int, question: str
) -> EncodedText:
    return encode_prompt(
        [Turn("user", (Media(num_frames), question))],
        run_.tokenizer,
        run_.template,
        tokens_per_frame=run_.model.cfg.tokens_per_frame,
        answer_prefix=asking.answer_prefix,
    )
