"""Models that hold the recorded cases' parameters."""

from typing import Any

import numpy as np
from flax import nnx
from golden_cases import under

from timeviper_jax.conversion.load import load_params
from timeviper_jax.conversion.nano import config_from_json, nano_rules
from timeviper_jax.conversion.vision import (
    PROJECTOR_RULES,
    timm_vit_rules,
    timm_vit_unused,
)
from timeviper_jax.data.examples import Role
from timeviper_jax.llm.hybrid import HybridConfig, HybridLM
from timeviper_jax.timeviper import TimeViper, TimeViperConfig
from timeviper_jax.vision.projector import ProjectorConfig
from timeviper_jax.vision.vit import VitConfig

VIT = VitConfig(
    image_size=58, patch_size=14, embed_dim=64, depth=4, num_heads=4, mlp_dim=239
)


def language_model(cfg: HybridConfig, tensors: dict[str, np.ndarray]) -> HybridLM:
    """A language model filled with parameters, or with their gradients."""
    lm = nnx.eval_shape(lambda: HybridLM(cfg, rngs=nnx.Rngs(0)))
    load_params(lm, tensors, nano_rules(cfg), ignore=(r"in\..*",))
    return lm


def gradients(cfg: HybridConfig, arrays: dict[str, np.ndarray]) -> nnx.State:
    """The recorded gradients; where embeddings came in, their table had none."""
    table = "backbone.embeddings.weight"
    unread = {table: np.zeros_like(arrays[f"param.{table}"])}
    return nnx.state(language_model(cfg, unread | under("grad.", arrays)))


def assert_close_in_scale(got: Any, want: Any) -> None:
    """Each gradient to 2e-5 of its own largest entry; 5e-6 was reached."""

    def check(got, want):
        scale = max(float(np.max(np.abs(want))), 1e-6)
        np.testing.assert_allclose(got / scale, want / scale, atol=2e-5, rtol=0)

    for pair in zip(_leaves(got), _leaves(want), strict=True):
        check(*pair)


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
        timm_vit_rules(VIT.num_heads, VIT.patch_size),
        ignore=timm_vit_unused(VIT.depth),
    )
    load_params(model.projector, under("projector.", published), PROJECTOR_RULES)
    llm = under("llm_backbone.llm.", published)
    load_params(model.llm, llm, nano_rules(cfg.llm))
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
