"""A whole model of three layers and batches for it, for tests of training."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.tiny import build
from timeviper_jax.data.examples import Batch, Role
from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.llm.transv import Stage
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.training import experiment
from timeviper_jax.training.optimizer import OptimizerConfig, make_optimizer
from timeviper_jax.training.parameters import split

FRAMES, TEXT = 4, 16
ROWS, STEPS = 8, 8
OPTIMIZER = OptimizerConfig(
    muon=True,
    b1=0.9,
    b2=0.95,
    eps=1e-3,  # Adam's usual one turns rounding noise into steps of full size.
    weight_decay=0.01,
    clip_norm=1.0,
    warmup=0.1,
    final_lr=0.0,
)

_TINY = PRESETS["tiny"]
CONFIG = dataclasses.replace(
    _TINY,
    vision=dataclasses.replace(_TINY.vision, depth=2, image_size=16),
    llm=dataclasses.replace(
        _TINY.llm,
        pattern="M*-",
        vocab_size=40,
        transv=(Stage(layer=1, keep=0.5, select="uniform"),),
    ),
)


def make_model():
    """The structure, and parameters of which none is special."""
    return split(build(lambda: TimeViper(CONFIG, rngs=nnx.Rngs(0))))


def make_batch(rows: int, seed: int = 0) -> Batch:
    """Pixels and text; the rows' answers are of different lengths."""
    rng = np.random.default_rng(seed)
    vision = FRAMES * CONFIG.tokens_per_frame
    T = vision + TEXT
    roles = np.full((rows, T), Role.INSTRUCTION, np.int32)
    roles[:, 1 : 1 + vision] = Role.VISION
    roles[:, 0] = Role.TEXT
    for row, answer in enumerate(rng.integers(1, 7, rows)):
        roles[row, T - answer :] = Role.ANSWER
    size = CONFIG.vision.image_size
    return Batch(
        tokens=rng.integers(0, 40, (rows, T)).astype(np.int32),
        roles=roles,
        segment_ids=np.ones((rows, T), np.int32),
        loss_mask=roles == Role.ANSWER,
        frames=rng.integers(0, 256, (rows, FRAMES, size, size, 3)).astype(np.uint8),
        frame_times=np.tile(np.arange(FRAMES, dtype=np.float32), (rows, 1)),
    )


def make_task(**changes) -> experiment.TextTask:
    options = dict(
        num_frames=FRAMES,
        text_tokens=TEXT,
        answer_tokens=8,
        num_segments=1,
        cached=False,
        split="train",
        where=(),
    )
    return experiment.TextTask(**options | changes)


def make_objective(**changes):
    return make_task(**changes).objective(ByteTokenizer())


def optimizer_of(params, lr: float = 1e-2):
    return make_optimizer(params, lambda _: jnp.float32(lr), OPTIMIZER)
