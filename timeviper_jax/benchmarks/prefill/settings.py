"""The settings that are measured, by a few plain values."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from timeviper_jax import presets
from timeviper_jax.benchmarks.prefill.calls import Setting
from timeviper_jax.inference.reader import LARGE, ViewerConfig
from timeviper_jax.llm.transv import Stage
from timeviper_jax.timeviper import TimeViperConfig
from timeviper_jax.vision.pair import replace_each


def make(
    *,
    preset: str,
    transv: bool | Sequence[Mapping[str, Any]],
    frames: int,
    batch: int,
    viewer: dict[str, int],
) -> Setting:
    """A preset in the dtype of its language model, with or without its TransV.

    `transv` may also be other stages than the preset's, each as its fields; `viewer`
    changes what suits a model of this size.
    """
    sizes = in_one_dtype(presets.find_config(preset))
    if transv is not True:
        sizes = sizes.with_transv(tuple(Stage(**stage) for stage in transv or ()))
    suited = dataclasses.replace(viewer_of(sizes), **viewer)
    return Setting(sizes=sizes, viewer=suited, frames=frames, batch=batch)


def viewer_of(sizes: TimeViperConfig) -> ViewerConfig:
    """Large calls for a large model, which is one whose layers run rolled."""
    return LARGE if sizes.llm.rolled else ViewerConfig()


def in_one_dtype(sizes: TimeViperConfig) -> TimeViperConfig:
    """All parameters, and all that is computed, in the language model's dtype."""
    one = dict(dtype=sizes.llm.dtype, param_dtype=sizes.llm.dtype)
    return dataclasses.replace(
        sizes,
        vision=replace_each(sizes.vision, **one),
        projector=replace_each(sizes.projector, **one),
        llm=dataclasses.replace(sizes.llm, **one),
    )
