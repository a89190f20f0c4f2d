"""Sizes of the models, by name or in a file. All else about a run is in its config.

Qwen2 and Qwen2.5 have the same sizes, and so have a base model and its instruct one;
there is no 3B of Qwen2. A checkpoint's own config.json goes before all of this.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
from typing import Any

from timeviper_jax.llm.hybrid import HybridConfig
from timeviper_jax.llm.transv import Stage
from timeviper_jax.timeviper import TimeViperConfig
from timeviper_jax.vision.dinov2 import DinoV2Config
from timeviper_jax.vision.encoder import EncoderConfig
from timeviper_jax.vision.internvideo2 import InternVideo2Config
from timeviper_jax.vision.pair import PairConfig, PairProjectorConfig
from timeviper_jax.vision.projector import ProjectorConfig
from timeviper_jax.vision.vit import VitConfig

_SIGLIP_B16 = VitConfig(
    image_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_dim=3072
)
SIGLIP_SO400M_384 = VitConfig(
    image_size=384, patch_size=14, embed_dim=1152, depth=27, num_heads=16, mlp_dim=4304
)

# By the release's names. SigLIP 2 has the sizes of SigLIP.
ENCODERS: dict[str, EncoderConfig] = {
    "siglip-vit-b16-224px": _SIGLIP_B16,
    "siglip-vit-b16-256px": dataclasses.replace(_SIGLIP_B16, image_size=256),
    "siglip-vit-b16-384px": dataclasses.replace(_SIGLIP_B16, image_size=384),
    "siglip-vit-so400m": dataclasses.replace(SIGLIP_SO400M_384, image_size=224),
    "siglip-vit-so400m-384px": SIGLIP_SO400M_384,
    "dinov2-vit-l": DinoV2Config(
        image_size=224,
        patch_size=14,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        mlp_dim=4096,
    ),
    "internvideo2-1b-16-224px": InternVideo2Config(
        image_size=224,
        patch_size=14,
        embed_dim=1408,
        depth=40,
        num_heads=16,
        mlp_dim=6144,
    ),
}

# The paper's final setting: drop half before layer 7, keep a tenth from layer 39.
TRANSV = (
    Stage(layer=7, keep=0.5, select="uniform"),
    Stage(layer=39, keep=0.1, select="attention"),
)

NANO_9B = HybridConfig(
    pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    vocab_size=131_072,
    embed_dim=4480,
    mlp_dim=15_680,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    ssm_heads=128,
    ssm_head_dim=80,
    ssm_groups=8,
    ssm_state=128,
    transv=TRANSV,
    rolled=True,
    dtype="bfloat16",
)

NANO_12B = dataclasses.replace(
    NANO_9B,
    pattern="M-M-M-M*" + 5 * "-M-M-M-M*" + "-M-M-M-M-",
    embed_dim=5120,
    mlp_dim=20_480,
    transv=(),  # The paper names no layers for it; configs/common.py has ours.
)

NEMOTRON_H_8B = dataclasses.replace(
    NANO_12B,
    pattern="M-M-M-M*" + 3 * "-M-M-M-M-M*" + "-M-M-M-M-M-",
    embed_dim=4096,
    mlp_dim=21_504,
    num_heads=32,
    ssm_head_dim=64,
)

QWEN2_7B = HybridConfig(
    pattern=28 * "*-",
    vocab_size=152_064,
    embed_dim=3584,
    mlp_dim=18_944,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=1e6,
    qkv_bias=True,
    gated_mlp=True,
    rolled=True,
    dtype="bfloat16",
)

QWEN2_3B = dataclasses.replace(
    QWEN2_7B,
    pattern=36 * "*-",
    vocab_size=151_936,
    embed_dim=2048,
    mlp_dim=11_008,
    num_heads=16,
    num_kv_heads=2,
    tied=True,
)

QWEN2_1_5B = dataclasses.replace(
    QWEN2_3B, pattern=28 * "*-", embed_dim=1536, mlp_dim=8960, num_heads=12
)


def _published(llm: HybridConfig) -> TimeViperConfig:
    """A published language model behind the paper's encoder."""
    return TimeViperConfig(
        vision=SIGLIP_SO400M_384,
        projector=ProjectorConfig(vision_dim=1152, llm_dim=llm.embed_dim),
        llm=llm,
    )


_TINY_LLM = HybridConfig(
    pattern="M-M*-M*-",
    vocab_size=272,  # Bytes and the special tokens; padded, so that meshes divide it.
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ssm_heads=4,
    ssm_head_dim=16,
    ssm_groups=2,
    ssm_state=8,
    chunk_size=16,
    transv=(
        Stage(layer=1, keep=0.5, select="uniform"),
        Stage(layer=6, keep=0.25, select="attention"),
    ),
)

_SMALL_LLM = HybridConfig(
    pattern="M*-M*-M*-",
    vocab_size=512,
    embed_dim=128,
    mlp_dim=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ssm_heads=4,
    ssm_head_dim=32,
    ssm_groups=1,
    ssm_state=32,
    chunk_size=32,
    log_base=128.0,
    init_std=0.08,
    embed_std=0.5,
    match_init=True,
)

PRESETS = {
    "tiny": TimeViperConfig(
        vision=VitConfig(
            image_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_dim=64
        ),
        projector=ProjectorConfig(vision_dim=32, llm_dim=32),
        llm=_TINY_LLM,
        tokens_per_frame=4,
    ),
    "small": TimeViperConfig(
        vision=VitConfig(
            image_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4, mlp_dim=256
        ),
        projector=ProjectorConfig(vision_dim=96, llm_dim=128),
        llm=_SMALL_LLM,
        tokens_per_frame=2,
        time_digits=5,
        normalise_vision=True,
    ),
    "nano_9b": _published(NANO_9B),
    "nano_12b": _published(NANO_12B),
    "nemotron_h_8b": _published(NEMOTRON_H_8B),
    "qwen2_1_5b": _published(QWEN2_1_5B),
    "qwen2_3b": _published(QWEN2_3B),
    "qwen2_7b": _published(QWEN2_7B),
}


def encoder(name: str) -> EncoderConfig:
    """The encoder of this name, or of two joined by "+", for the larger image size."""
    names = name.split("+")
    unknown = [part for part in names if part not in ENCODERS]
    if unknown or len(names) > 2:
        raise ValueError(
            f"encoder {name!r} is not one of {sorted(ENCODERS)}, nor two joined by '+'."
        )
    if len(names) == 1:
        return ENCODERS[name]
    size = max(ENCODERS[part].image_size for part in names)
    first, second = (
        dataclasses.replace(ENCODERS[part], image_size=size) for part in names
    )
    return PairConfig(first=first, second=second, names=(names[0], names[1]))


def with_encoder(
    cfg: TimeViperConfig, vision: EncoderConfig, projector: str
) -> TimeViperConfig:
    """The model with another encoder, or two, and a projector in the release's words.

    Those are `gelu_mlp`, which merges no tokens, and `tome_mlp-N` and
    `fused_tome_mlp-N`, which merge each encoder's tokens of a frame into N.
    """
    match = re.fullmatch(r"gelu_mlp|(fused_)?tome_mlp-(\d+)", projector)
    if not match:
        raise ValueError(
            f"{projector=} is not gelu_mlp, tome_mlp-N or fused_tome_mlp-N."
        )
    encoders = vision.encoders if isinstance(vision, PairConfig) else (vision,)
    projectors = [
        ProjectorConfig(
            vision_dim=one.embed_dim,
            llm_dim=cfg.llm.embed_dim,
            fused=bool(match[1]),
            dtype=one.dtype,
            param_dtype=one.param_dtype,
        )
        for one in encoders
    ]
    return dataclasses.replace(
        cfg,
        vision=vision,
        projector=_one_or_both(projectors),
        tokens_per_frame=len(encoders) * int(match[2] or 0) or vision.num_tokens,
    )


def _one_or_both(
    projectors: list[ProjectorConfig],
) -> ProjectorConfig | PairProjectorConfig:
    if len(projectors) == 1:
        return projectors[0]
    first, second = projectors
    return PairProjectorConfig(first=first, second=second)


# Sizes in a file, for models that a checkpoint's own config describes.


def find_config(name: str) -> TimeViperConfig:
    """The preset of this name, or the sizes in a file whose name ends in .json."""
    if name.endswith(".json"):
        return read_config(name)
    if name not in PRESETS:
        raise ValueError(
            f"preset={name!r} is not one of {sorted(PRESETS)}, nor a .json of sizes."
        )
    return PRESETS[name]


def write_config(path: str | os.PathLike, cfg: TimeViperConfig) -> None:
    """Keeps a model's sizes as JSON."""
    pathlib.Path(path).write_text(json.dumps(_plain(cfg), indent=1) + "\n")


def read_config(path: str | os.PathLike) -> TimeViperConfig:
    """The sizes that `write_config` kept."""
    cfg = _configured(json.loads(pathlib.Path(path).read_text()))
    if not isinstance(cfg, TimeViperConfig):
        raise ValueError(f"{path} holds a {type(cfg).__name__}, not a whole model's.")
    return cfg


def _plain(value: Any) -> Any:
    """A config as JSON has it; each says which class it is of."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    kind = f"{type(value).__module__}:{type(value).__name__}"
    fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"class": kind, **fields}


def _configured(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_configured, value))
    if not isinstance(value, dict):
        return value
    fields = {name: _configured(inner) for name, inner in value.items()}
    module, _, name = fields.pop("class").partition(":")
    if not module.startswith(f"{__package__}."):
        raise ValueError(f"{module}:{name} is no config of this project.")
    return getattr(importlib.import_module(module), name)(**fields)
