"""Watching in stages and chunks, asking from a memory: the same as one pass."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Example, Role, RowSize, collate
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer, ViewerConfig, split_prompt
from timeviper_jax.llm.stream import take
from timeviper_jax.llm.transv import Stage
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeViper

FLOAT32 = dict(atol=1e-5, rtol=1e-5)
UNIFORM = Stage(layer=1, keep=0.5)
DROP = Stage(layer=1, keep=0.5, transfer=False)
ATTENTION = Stage(layer=3, keep=0.25, select="attention")
STAGES = {
    "none": (),
    "uniform": (UNIFORM,),
    "drop": (DROP,),
    "attention": (ATTENTION,),
    "uniform_attention": (UNIFORM, ATTENTION),
    "attention_uniform": (
        dataclasses.replace(ATTENTION, keep=0.5),
        Stage(layer=5, keep=0.2),
    ),
    "layer0": (Stage(layer=0, keep=0.3),),
}
V = 2  # Tokens a frame.
SIZES = dataclasses.replace(
    PRESETS["tiny"],
    tokens_per_frame=V,
    time_digits=3,
    llm=dataclasses.replace(
        PRESETS["tiny"].llm, log_base=8.0, pattern="M-M*M*", transv=()
    ),
)
CFG = ViewerConfig(
    video_rows=2,
    question_rows=3,
    chunk=8,
    text_chunk=4,
    text_room=24,
    smallest_cache=32,
    cache_growth=2,
)


@functools.cache
def model(stages: str) -> TimeViper:
    cfg = SIZES.with_transv(STAGES[stages])
    return tiny.build(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))


def prompt(frames: int, question: int, prefix: int = 0, seed: int = 0) -> Example:
    """Two words, a video, a question, and perhaps the beginning of an answer."""
    rng = np.random.default_rng([seed, frames, question])
    roles = [Role.TEXT] * 2 + [Role.VISION] * frames * V
    roles += [Role.INSTRUCTION] * question + [Role.ANSWER] * prefix
    return Example(
        tokens=rng.integers(1, 200, len(roles)).astype(np.int32),
        roles=np.array(roles, np.int32),
        loss_mask=np.zeros(len(roles), bool),
        frame_times=np.arange(frames).astype(np.float32) + 0.5,
        features=np.random.default_rng([seed, frames])
        .normal(size=(frames, V, 32))
        .astype(np.float32),
    )


def parts(example: Example) -> tuple[Example, EncodedText]:
    """What is watched and what is asked of an example."""
    text = EncodedText(
        tokens=example.tokens, roles=example.roles, loss_mask=example.loss_mask
    )
    before, after = split_prompt(text)
    watched = dataclasses.replace(
        example, tokens=before.tokens, roles=before.roles, loss_mask=before.loss_mask
    )
    return watched, after


@tiny.quick_jit
def _last_logits(model, batch):
    output = model.forward(batch)
    last = jnp.sum(output.stream.roles > 0, axis=1) - 1
    hidden = take(output.hidden, last[:, None])
    return model.llm.logits(hidden)[:, 0]


def one_pass(stages: str, examples: list[Example]) -> np.ndarray:
    """The logits after the last token of each, by the model's forward pass."""
    size = RowSize(num_frames=12, text_tokens=24, tokens_per_frame=V)
    return np.asarray(_last_logits(model(stages), collate([[e] for e in examples], size)))
