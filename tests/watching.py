"""Small models that watch, what they are shown, and what one pass makes of it."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests import tiny
from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Example, Role, RowSize, collate
from timeviper_jax.inference.viewer import ViewerConfig, split_prompt
from timeviper_jax.llm.stream import take
from timeviper_jax.llm.transv import Stage
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeViper

FLOAT32 = dict(atol=1e-5, rtol=1e-5)
UNIFORM = Stage(layer=1, keep=0.5)
ATTENTION = Stage(layer=3, keep=0.25, select="attention")
STAGES = {
    "none": (),
    "drop": (dataclasses.replace(UNIFORM, transfer=False),),
    "uniform_attention": (UNIFORM, ATTENTION),
    "attention_uniform": (
        Stage(layer=1, keep=0.5, select="attention"),
        Stage(layer=3, keep=0.2),
    ),
    "layer0": (Stage(layer=0, keep=0.3),),
    "plain": (),
    "plain_uniform_attention": (UNIFORM, ATTENTION),
}
V = 2  # Tokens a frame.
SIZES = dataclasses.replace(
    PRESETS["tiny"],
    tokens_per_frame=V,
    time_digits=3,
    llm=dataclasses.replace(
        PRESETS["tiny"].llm, log_base=8.0, pattern="M*-*", transv=()
    ),
)
# The same with a plain transformer, which attends and ranks at the same layers.
PLAIN = dataclasses.replace(
    SIZES,
    llm=dataclasses.replace(
        tiny.QWEN, pattern="-*-*", vocab_size=272, embed_dim=32, tied=True
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
def model(stages: str, dtype: str = "float32") -> TimeViper:
    sizes = PLAIN if stages.startswith("plain") else SIZES
    cfg = sizes.with_transv(STAGES[stages])
    llm = dataclasses.replace(cfg.llm, dtype=dtype)
    cfg = dataclasses.replace(cfg, llm=llm)
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


def text_of(example: Example) -> EncodedText:
    return EncodedText(
        tokens=example.tokens, roles=example.roles, loss_mask=example.loss_mask
    )


def parts(example: Example) -> tuple[Example, EncodedText]:
    """What is watched and what is asked of an example."""
    before, after = split_prompt(text_of(example))
    watched = dataclasses.replace(
        example, tokens=before.tokens, roles=before.roles, loss_mask=before.loss_mask
    )
    return watched, after


@tiny.quick_jit
def _last_logits(model, batch, choices=()):
    output = model.llm(model.embed(batch), choices=choices)
    last = jnp.sum(output.stream.roles > 0, axis=1) - 1
    hidden = take(output.hidden, last[:, None])
    return model.llm.logits(hidden)[:, 0]


SIZE = RowSize(num_frames=12, text_tokens=24, tokens_per_frame=V)


def one_pass(
    stages: str,
    examples: list[Example],
    *choices: np.ndarray | None,
    dtype: str = "float32",
) -> np.ndarray:
    """The logits after the last token of each, by the model's forward pass."""
    rows = [[example] for example in examples] + [[]] * (3 - len(examples))
    logits = _last_logits(model(stages, dtype), collate(rows, SIZE), choices)
    return np.asarray(logits)[: len(examples)]
