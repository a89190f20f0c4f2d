"""The published families by name: how their configs and tensors become ours."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from timeviper_jax.conversion import nano, qwen2
from timeviper_jax.conversion.rules import Rule
from timeviper_jax.conversion.vision import (
    encoder_rules,
    encoder_unused,
    release_rules,
    release_unused,
)
from timeviper_jax.llm.hybrid import HybridConfig
from timeviper_jax.timeviper import TimeViperConfig
from timeviper_jax.vision.pair import replace_each


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageFamily:
    """A family of language models: its `config.json`, and its names.

    `unused` are patterns of tensors that a file may hold and the model does not need.
    """

    config: Callable[[Mapping[str, Any]], HybridConfig]
    rules: Callable[[HybridConfig], tuple[Rule, ...]]
    unused: Callable[[HybridConfig], tuple[str, ...]] = lambda cfg: ()


LANGUAGE = {
    "nano": LanguageFamily(config=nano.config_from_json, rules=nano.nano_rules),
    "qwen2": LanguageFamily(
        config=qwen2.config_from_json,
        rules=qwen2.qwen2_rules,
        unused=qwen2.qwen2_unused,
    ),
}
# What only one family's tensors have in their names; the first that fits says which.
_MARKS = (
    ("backbone.layers.", "nano"),
    ("model.layers.", "qwen2"),
    ("blocks.0.attn.q_norm.", "internvideo2"),
    ("reg_token", "dinov2"),
    ("blocks.0.", "siglip"),
    ("embeddings.register_tokens", "dinov2_hf"),
    ("embeddings.patch_embedding.", "siglip_hf"),
)
# What `model_type` may say in a config.json of each.
_MODEL_TYPES = {"nano": "nano", "nemotron_h": "nano", "qwen2": "qwen2"}
_LANGUAGE = "llm_backbone.llm."  # Before a language model's names in the release's.
# Encoders, in the names of timm or their authors, or in those of transformers.
VISION = ("siglip", "dinov2", "internvideo2", "siglip_hf", "dinov2_hf")
FAMILIES = (*LANGUAGE, *VISION, "timeviper")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """A table for the parameters of a whole model, and what it passes over."""

    rules: tuple[Rule, ...]
    unused: tuple[str, ...]

    def under(self, name: str, path: str) -> "Names":
        """The same for a part that stands under these prefixes."""
        return Names(
            rules=tuple(nano.under(re.escape(name), path, self.rules)),
            unused=tuple(re.escape(name) + pattern for pattern in self.unused),
        )

    def __add__(self, other: "Names") -> "Names":
        return Names(rules=self.rules + other.rules, unused=self.unused + other.unused)


def names_of(family: str, cfg: TimeViperConfig) -> Names:
    """How a family names the parameters of this model."""
    if family in LANGUAGE:
        return _language(family, cfg.llm).under("", "llm/")
    if family == "timeviper":
        vision = Names(
            rules=release_rules(cfg.vision), unused=release_unused(cfg.vision)
        )
        language = _language(language_of(cfg.llm), cfg.llm)
        return vision + language.under(_LANGUAGE, "llm/")
    if family not in VISION:
        raise ValueError(f"{family=} is not one of {sorted(FAMILIES)}.")
    source = "transformers" if family.endswith("_hf") else "release"
    names = Names(
        rules=encoder_rules(cfg.vision, source), unused=encoder_unused(cfg.vision)
    )
    return names.under("", "vision/")


def _language(family: str, cfg: HybridConfig) -> Names:
    own = LANGUAGE[family]
    return Names(rules=own.rules(cfg), unused=own.unused(cfg))


def language_of(cfg: HybridConfig) -> str:
    """The family that publishes language models of this form."""
    return "qwen2" if cfg.rope_theta else "nano"


def family_of(names: Iterable[str], config: Mapping[str, Any] | None) -> str:
    """The family of a checkpoint, by its tensors' names and its `config.json`."""
    names = list(names)
    if any(name.startswith(_LANGUAGE) for name in names):
        return "timeviper"
    if config and config.get("model_type") in _MODEL_TYPES:
        return _MODEL_TYPES[config["model_type"]]
    for part, family in _MARKS:
        if any(part in name for name in names):
            return family
    raise ValueError(
        f"Tensors such as {names[:3]} are of no family that is known; say which of"
        f" {sorted(FAMILIES)} they are."
    )


def sized(
    family: str, base: TimeViperConfig, config: Mapping[str, Any] | None
) -> TimeViperConfig:
    """`base` with the language model that a checkpoint's own `config.json` says.

    How it is computed (dtypes, rolled or not) stays the base's.
    """
    language = family
    if family == "timeviper" and config:
        language = _MODEL_TYPES.get(config.get("model_type"), language_of(base.llm))
    if language not in LANGUAGE or not config:
        return base
    llm = dataclasses.replace(
        LANGUAGE[language].config(config),
        **{
            name: getattr(base.llm, name)
            for name in ("dtype", "param_dtype", "rolled", "remat", "ssd")
        },
    )
    projector = replace_each(base.projector, llm_dim=llm.embed_dim)
    return dataclasses.replace(base, llm=llm, projector=projector)
