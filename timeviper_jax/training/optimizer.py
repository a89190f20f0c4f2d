"""AdamW as a run's config says it: what decays, how fast each path learns, when."""

import dataclasses
import re

import optax

from timeviper_jax.training.parameters import Params, Shapes, matching

# Gains, biases and the state space's own numbers: pulling them to zero means nothing.
NO_DECAY = r"(^|/)(scale|bias|a_log|d|dt_bias|alpha)$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW's numbers. `warmup` is a share of the steps, `final_lr` one of the peak."""

    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    warmup: float
    final_lr: float


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
    """AdamW for these parameters. The first pattern found in a path speeds it up.

    Gradients are clipped by their global norm; weight decay follows a parameter's own
    learning rate.
    """
    for pattern, _ in lr_multipliers:
        matching(params, [pattern])
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=decays(params)),
        _multiply(lr_multipliers),
        optax.scale_by_learning_rate(schedule),
    )


def _multiply(
    multipliers: tuple[tuple[str, float], ...],
) -> optax.GradientTransformation:
    def factor(path: str) -> float:
        found = (value for pattern, value in multipliers if re.search(pattern, path))
        return next(found, 1.0)

    def update(updates: Params, params: Params | None) -> Params:
        del params
        return {path: array * factor(path) for path, array in updates.items()}

    return optax.stateless(update)
