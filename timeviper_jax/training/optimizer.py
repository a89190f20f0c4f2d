"""AdamW or Muon as a run's config says it: what decays, and how fast each path learns.

Muon (Jordan et al., 2024) makes the momentum of every matrix between features
orthogonal, so that all its directions learn alike; whatever else there is has AdamW.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers as Axes
from optax.contrib import scale_by_muon

from timeviper_jax.training.parameters import Params, Shapes, matching

# Gains, biases and the state space's own numbers: pulling them to zero means nothing.
NO_DECAY = r"(^|/)(scale|bias|a_log|d|dt_bias|alpha)$"

# The matrices between features, and which of their axes come in and go out; axes before
# them are layers. Embeddings, the head, convolutions and one number a head are others.
_ATTENTION = r"(/attn|/attention/mixer|/transv/\d+)"
MATRICES: tuple[tuple[str, Axes], ...] = (
    (rf"{_ATTENTION}/[qkv]/kernel$", Axes(-3, (-2, -1))),  # D, N H
    (rf"{_ATTENTION}/out/kernel$", Axes((-3, -2), -1)),  # N H, D
    (r"/mlp(/mixer)?/(up|gate|down)/kernel$", Axes(-2, -1)),
    (r"/mamba/mixer/(in_[zxbc]|out)/kernel$", Axes(-2, -1)),
    (r"^projector/.*layers/\d+/kernel$", Axes(-2, -1)),
)
# An update's root mean square, so that a learning rate means to Muon what it means to
# AdamW (Liu et al., arXiv 2502.16982).
_MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The numbers of AdamW, and whether matrices have `muon` in its place.

    `warmup` is a share of the steps, `final_lr` one of the peak. `momentum_dtype` is
    that of the first moments; the second stay in the parameters'.
    """

    muon: bool
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    warmup: float
    final_lr: float
    momentum_dtype: str = "float32"


def make_schedule(lr: float, steps: int, cfg: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up to `lr`, then a cosine down to its final share at the end."""
    warmup = max(1, round(cfg.warmup * steps))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=lr,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=cfg.final_lr * lr,
    )
    # The rate of step 0 would be zero, and the step wasted.
    return lambda step: schedule(step + 1)


def decays(params: Shapes) -> dict[str, bool]:
    """Which parameters weight decay pulls towards zero: the matrices."""
    return {
        path: array.ndim > 1 and not re.search(NO_DECAY, path)
        for path, array in params.items()
    }


def make_optimizer(
    params: Shapes,
    schedule: optax.Schedule,
    cfg: OptimizerConfig,
    lr_multipliers: tuple[tuple[str, float], ...] = (),
) -> optax.GradientTransformation:
    """The optimizer of these paths. The first pattern found in one speeds it up.

    Gradients are clipped by their global norm; weight decay follows a parameter's own
    learning rate.
    """
    for pattern, _ in lr_multipliers:
        matching(params, [pattern])
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        _direction(params, cfg),
        optax.add_decayed_weights(cfg.weight_decay, mask=decays(params)),
        _multiply(lr_multipliers),
        optax.scale_by_learning_rate(schedule),
    )


def updates_made(opt_state: optax.OptState) -> int:
    """How many updates this state has behind it: where its schedule stands."""
    return int(opt_state[-1].count)


def _direction(params: Shapes, cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to updates of the size of Adam's, by Adam or, for matrices, Muon."""
    dtype = cfg.momentum_dtype
    adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=dtype)
    if not cfg.muon:
        return adam
    axes = {path: found for path in params if (found := _axes(path))}
    labels = {path: "muon" if path in axes else "adam" for path in params}
    # What is no matrix is masked, as `partition` masks it.
    masked = {path: axes.get(path, optax.MaskedNode()) for path in params}
    muon = scale_by_muon(weight_dimension_numbers=masked, mu_dtype=dtype)
    sizes = {path: _size(params[path].shape, found) for path, found in axes.items()}
    return optax.chain(
        optax.partition({"adam": adam, "muon": muon}, labels),
        _scale(lambda path: sizes.get(path, 1.0)),
    )


def _axes(path: str) -> Axes | None:
    found = (axes for pattern, axes in MATRICES if re.search(pattern, path))
    return next(found, None)


def _size(shape: tuple[int, ...], axes: Axes) -> float:
    """What gives an orthogonal update the root mean square that Adam's would have."""
    fans = [np.prod(np.take(shape, some)) for some in axes]
    return float(_MUON_RMS * max(fans) ** 0.5)


def _multiply(
    multipliers: tuple[tuple[str, float], ...],
) -> optax.GradientTransformation:
    def factor(path: str) -> float:
        found = (value for pattern, value in multipliers if re.search(pattern, path))
        return next(found, 1.0)

    return _scale(factor)


def _scale(factor: Callable[[str], float]) -> optax.GradientTransformation:
    """Every path's update times a number of its own."""

    def update(updates: Params, params: Params | None) -> Params:
        del params
        return {path: array * factor(path) for path, array in updates.items()}

    return optax.stateless(update)
