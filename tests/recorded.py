"""Models that hold the recorded cases' parameters."""

from typing import Any

import numpy as np
from flax import nnx
from golden_cases import under

from timeviper_jax.conversion import nano, qwen2
from timeviper_jax.conversion.load import load_params
from timeviper_jax.conversion.rules import Rule
from timeviper_jax.conversion.vision import (
    PROJECTOR_RULES,
    encoder_rules,
    encoder_unused,
)
from timeviper_jax.data.examples import Role
from timeviper_jax.llm.hybrid import HybridConfig, HybridLM
from timeviper_jax.timeviper import TimeViper, TimeViperConfig
from timeviper_jax.vision.projector import ProjectorConfig
from timeviper_jax.vision.vit import VitConfig

VIT = VitConfig(
    image_size=58, patch_size=14, embed_dim=64, depth=4, num_heads=4, mlp_dim=239
)


def config_from_json(config: dict[str, Any]) -> HybridConfig:
    """The language model of a recording, by its family."""
    family = qwen2 if config["model_type"] == "qwen2" else nano
    return family.config_from_json(config)


def rules(cfg: HybridConfig) -> tuple[Rule, ...]:
    """The names that such a model is recorded under."""
    return nano.nano_rules(cfg) if "M" in cfg.pattern else qwen2.qwen2_rules(cfg)


def language_model(cfg: HybridConfig, tensors: dict[str, np.ndarray]) -> HybridLM:
    """A language model filled with parameters, or with their gradients."""
    lm = nnx.eval_shape(lambda: HybridLM(cfg, rngs=nnx.Rngs(0)))
    load_params(lm, tensors, rules(cfg), ignore=(r"in\..*",))
    return lm


def gradients(cfg: HybridConfig, arrays: dict[str, np.ndarray]) -> nnx.State:
    """The recorded gradients, where they were kept; NaN in place of the others."""
    absent = {
        name: np.full_like(param, np.nan)
        for name, param in under("param.", arrays).items()
    }
    return nnx.state(language_model(cfg, absent | under("grad.", arrays)))


def assert_close_in_scale(got: Any, want: Any) -> None:
    """Each gradient to 2e-5 of its own largest entry; 5e-6 was reached.

    A gate's is one number, the sum of thousands that nearly cancel; 2.2e-5 was reached.
    One that is 0 but for rounding is measured by the others: without positions a bias
    of all keys moves no softmax.
    """
    pairs = [
        (ours[known], theirs[known])
        for ours, theirs in zip(_leaves(got), _leaves(want), strict=True)
        if (known := ~np.isnan(theirs)).any()
    ]
    assert len(pairs) > len(_leaves(want)) / 2
    largest = [float(np.max(np.abs(theirs))) for _, theirs in pairs]
    least = 1e-3 * max(largest)
    for (ours, theirs), scale in zip(pairs, largest, strict=True):
        scale = scale if scale > 1e-6 else least
        atol = 2e-5 if ours.size > 1 else 5e-5
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=atol, rtol=0)


def _leaves(state: nnx.State) -> list[np.ndarray]:
    return [np.asarray(param[...]) for _, param in nnx.to_flat_state(state)]


def whole_model(
    description: dict[str, Any], arrays: dict[str, np.ndarray]
) -> TimeViper:
    """The model of a recorded generation from six frames of 58 pixels."""
    cfg = TimeViperConfig(
        vision=VIT,
        projector=ProjectorConfig(vision_dim=64, llm_dim=64),
        llm=config_from_json(description["config"]),
        tokens_per_frame=4,
    )
    model = nnx.eval_shape(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    published = under("param.", arrays)
    load_params(
        model.vision,
        under("vision_backbone.featurizer.", published),
        encoder_rules(VIT),
        ignore=encoder_unused(VIT),
    )
    load_params(model.projector, under("projector.", published), PROJECTOR_RULES)
    llm = under("llm_backbone.llm.", published)
    load_params(model.llm, llm, rules(cfg.llm))
    return model


def prompt(
    description: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Its tokens with four in place of each image, and their roles."""
    ids, image_id = arrays["in.input_ids"][0], description["image_token_id"]
    tokens = np.repeat(ids, np.where(ids == image_id, 4, 1)).astype(np.int32)
    roles = np.where(tokens == image_id, Role.VISION, Role.TEXT).astype(np.int32)
    roles[np.flatnonzero(roles == Role.VISION)[-1] + 1 :] = Role.INSTRUCTION
    return tokens, roles
