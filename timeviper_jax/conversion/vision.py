r"""Names of published encoders and projectors. Both ways, see rules.py.

    load_params(encoder, tensors, encoder_rules(cfg), ignore=encoder_unused(cfg))

The features end before the last block, so that block, the norm after it and pooling
heads are left aside. Positions for another image size are resized as they are loaded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from timeviper_jax.conversion.nano import under
from timeviper_jax.conversion.rules import Cut, Rule
from timeviper_jax.vision.dinov2 import DinoV2Config
from timeviper_jax.vision.encoder import EncoderConfig
from timeviper_jax.vision.internvideo2 import InternVideo2Config
from timeviper_jax.vision.pair import PairConfig
from timeviper_jax.vision.positions import resize_grid, resize_time
from timeviper_jax.vision.vit import VitConfig

Source = Literal["release", "transformers"]

_BLOCK = r"blocks\.(\d+)"


@dataclasses.dataclass(frozen=True)
class PositionRule(Rule):
    """Positions, resized on the way in if they are of another grid or clip length.

    `class_rows` come before the patches' and stay as they are. There are patches of
    `trained_frames` frames in the file, and of `frames` in the model.
    """

    grid: int = 0
    class_rows: int = 0
    trained_frames: int = 1
    frames: int = 1
    antialias: bool = False

    def load(self, tensor: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "V E"]:
        table = super().load(tensor)
        if len(table) == self.class_rows + self.frames * self.grid**2:
            return table
        first, patches = np.split(table, [self.class_rows])
        patches = patches.reshape(self.trained_frames, -1, table.shape[1])
        patches = resize_time(patches, self.frames)
        patches = resize_grid(patches, self.grid, antialias=self.antialias)
        return np.concatenate([first, patches.reshape(-1, table.shape[1])])


def encoder_rules(cfg: VitConfig, source: Source = "release") -> tuple[Rule, ...]:
    """How an encoder is named: by timm or InternVideo2's authors, or transformers."""
    if isinstance(cfg, InternVideo2Config):
        return internvideo2_rules(cfg)
    if source == "transformers":
        return (dinov2_rules if isinstance(cfg, DinoV2Config) else siglip_rules)(cfg)
    return timm_rules(cfg)


def encoder_unused(cfg: VitConfig) -> tuple[str, ...]:
    """Patterns of the published tensors, from any source, that features do not need."""
    last = rf"(blocks|encoder\.layers?)\.{cfg.depth - 1}\..*"
    norms = r"(norm|layernorm|post_layernorm)\..*"
    heads = r"(attn_pool|head|clip_projector)\..*"
    return last, norms, heads, r"clip_pos_embed|embeddings\.mask_token"


def config_from_json(config: Mapping[str, Any]) -> VitConfig:
    """The encoder of a transformers `config.json`: SigLIP, or DINOv2 with registers.

    What such a file leaves out is as transformers has it.
    """
    kind = config.get("model_type")
    if kind == "siglip":  # Both towers; SigLIP 2 at one image size says so too.
        return config_from_json({"model_type": _SIGLIP, **config["vision_config"]})
    if kind not in (_SIGLIP, _DINOV2):
        raise ValueError(f"model_type={kind!r} is not siglip, {_SIGLIP} or {_DINOV2}.")
    width = config.get("hidden_size", 768)
    sizes = dict(
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 16),
        embed_dim=width,
        depth=config.get("num_hidden_layers", 12),
        num_heads=config.get("num_attention_heads", 12),
        norm_eps=config.get("layer_norm_eps", 1e-6),
    )
    if kind == _SIGLIP:
        return VitConfig(**sizes, mlp_dim=config.get("intermediate_size", 3072))
    for name, wanted in (("use_swiglu_ffn", False), ("qkv_bias", True)):
        if config.get(name, wanted) != wanted:
            raise ValueError(
                f"{name}={config[name]!r} is not supported, only {wanted!r}."
            )
    return DinoV2Config(
        **sizes,
        mlp_dim=int(width * config.get("mlp_ratio", 4)),
        num_registers=config.get("num_register_tokens", 4),
        class_position=True,
    )


_SIGLIP, _DINOV2 = "siglip_vision_model", "dinov2_with_registers"

# timm's names.


def timm_rules(cfg: VitConfig) -> tuple[Rule, ...]:
    """timm's SigLIP and DINOv2 <-> vision/vit.py and dinov2.py."""
    num_heads, norm = cfg.num_heads, rf"{_BLOCK}\.norm([12])"
    table = "1 V E -> V E"
    return (
        *_patch(r"patch_embed\.proj", cfg),
        PositionRule("pos_embed", "positions", table, grid=cfg.grid, antialias=True),
        *_fused_qkv("weight", "kernel", "(N H) E -> E N H", num_heads),
        *_fused_qkv("bias", "bias", "(N H) -> N H", num_heads),
        *_attention_out(rf"{_BLOCK}\.attn\.proj", num_heads),
        Rule(rf"{norm}\.weight", r"blocks/norm\2/scale[\1]"),
        Rule(rf"{norm}\.bias", r"blocks/norm\2/bias[\1]"),
        *_mlp(_BLOCK),
        *(_TIMM_DINO if isinstance(cfg, DinoV2Config) else ()),
    )


_TIMM_DINO = (
    Rule("cls_token", "class_token", "1 1 E -> E"),
    Rule("reg_token", "registers", "1 R E -> R E"),
    Rule(rf"{_BLOCK}\.ls([12])\.gamma", r"blocks/scale\2/scale[\1]"),
)


def _fused_qkv(name: str, ours: str, axes: str, num_heads: int) -> list[Rule]:
    return [
        Rule(
            rf"{_BLOCK}\.attn\.qkv\.{name}",
            rf"blocks/attn/{part}/{ours}[\1]",
            axes,
            dict(N=num_heads),
            Cut(i, i + 1, 3),
        )
        for i, part in enumerate("qkv")
    ]


def _attention_out(name: str, num_heads: int) -> list[Rule]:
    kernel, heads = r"blocks/attn/out/kernel[\1]", dict(N=num_heads)
    return [
        Rule(rf"{name}\.weight", kernel, "E (N H) -> N H E", heads),
        Rule(rf"{name}\.bias", r"blocks/attn/out/bias[\1]"),
    ]


def _mlp(block: str) -> list[Rule]:
    return [
        rule
        for fc, ours in dict(fc1="up", fc2="down").items()
        for rule in (
            Rule(
                rf"{block}\.mlp\.{fc}\.weight",
                rf"blocks/mlp/{ours}/kernel[\1]",
                "O I -> I O",
            ),
            Rule(rf"{block}\.mlp\.{fc}\.bias", rf"blocks/mlp/{ours}/bias[\1]"),
        )
    ]


# InternVideo2's.


def internvideo2_rules(
    cfg: InternVideo2Config, *, trained_frames: int | None = None
) -> tuple[Rule, ...]:
    """InternVideo2 <-> vision/internvideo2.py.

    `trained_frames` is the clip length of the file where it is not the model's.
    """
    sides = dict(p=cfg.patch_size, q=cfg.patch_size)
    patch = r"patch_embed\.proj\.weight"
    resized = dict(grid=cfg.grid, class_rows=1)
    clips = dict(frames=cfg.frames, trained_frames=trained_frames or cfg.frames)
    table = "1 V E -> V E"
    return (
        Rule(patch, "patch/kernel", "E C 1 p q -> (p q C) E", sides),
        Rule(r"patch_embed\.proj\.bias", "patch/bias"),
        Rule("cls_token", "class_token", "1 1 E -> E"),
        PositionRule("pos_embed", "positions", table, **resized, **clips),
        PositionRule("img_pos_embed", "image_positions", table, **resized),
        *_fused_qkv("weight", "kernel", "(N H) E -> E N H", cfg.num_heads),
        Rule(
            rf"{_BLOCK}\.attn\.([qk])_norm\.weight",
            r"blocks/attn/\2_norm/scale[\1]",
        ),
        *_attention_out(rf"{_BLOCK}\.attn\.proj", cfg.num_heads),
        Rule(rf"{_BLOCK}\.norm([12])\.weight", r"blocks/norm\2/scale[\1]"),
        Rule(rf"{_BLOCK}\.ls([12])\.weight", r"blocks/scale\2/scale[\1]"),
        *_mlp(_BLOCK),
    )


# transformers': each tower alone, as its `save_pretrained` writes it.


def siglip_rules(cfg: VitConfig) -> tuple[Rule, ...]:
    """transformers' SiglipVisionModel <-> vision/vit.py.

    A whole SigLIP has these names behind `vision_model.`. Its GELU is approximate,
    timm's and ours is exact.
    """
    layer = r"encoder\.layers\.(\d+)"
    norm = rf"{layer}\.layer_norm([12])"
    parts = dict(q_proj="q", k_proj="k", v_proj="v")
    table = r"embeddings\.position_embedding\.weight"
    return (
        *_patch(r"embeddings\.patch_embedding", cfg),
        PositionRule(table, "positions", grid=cfg.grid),
        *_split_qkv(rf"{layer}\.self_attn", parts, cfg.num_heads),
        *_attention_out(rf"{layer}\.self_attn\.out_proj", cfg.num_heads),
        Rule(rf"{norm}\.weight", r"blocks/norm\2/scale[\1]"),
        Rule(rf"{norm}\.bias", r"blocks/norm\2/bias[\1]"),
        *_mlp(layer),
    )


def dinov2_rules(cfg: DinoV2Config) -> tuple[Rule, ...]:
    """transformers' Dinov2WithRegistersModel <-> vision/dinov2.py.

    It gives the class token a position of its own: set `class_position`.
    """
    layer = r"encoder\.layer\.(\d+)"
    norm = rf"{layer}\.norm([12])"
    parts = dict(query="q", key="k", value="v")
    out = rf"{layer}\.attention\.output\.dense"
    positions = PositionRule(
        r"embeddings\.position_embeddings",
        "positions",
        "1 V E -> V E",
        grid=cfg.grid,
        class_rows=1,
    )
    return (
        *_patch(r"embeddings\.patch_embeddings\.projection", cfg),
        positions,
        Rule(r"embeddings\.cls_token", "class_token", "1 1 E -> E"),
        Rule(r"embeddings\.register_tokens", "registers", "1 R E -> R E"),
        *_split_qkv(rf"{layer}\.attention\.attention", parts, cfg.num_heads),
        *_attention_out(out, cfg.num_heads),
        Rule(rf"{norm}\.weight", r"blocks/norm\2/scale[\1]"),
        Rule(rf"{norm}\.bias", r"blocks/norm\2/bias[\1]"),
        Rule(rf"{layer}\.layer_scale([12])\.lambda1", r"blocks/scale\2/scale[\1]"),
        *_mlp(layer),
    )


def _patch(name: str, cfg: VitConfig) -> list[Rule]:
    sides = dict(p=cfg.patch_size, q=cfg.patch_size)
    return [
        Rule(rf"{name}\.weight", "patch/kernel", "E C p q -> (p q C) E", sides),
        Rule(rf"{name}\.bias", "patch/bias"),
    ]


def _split_qkv(name: str, parts: dict[str, str], num_heads: int) -> list[Rule]:
    heads = dict(N=num_heads)
    return [
        rule
        for theirs, ours in parts.items()
        for rule in (
            Rule(
                rf"{name}\.{theirs}\.weight",
                rf"blocks/attn/{ours}/kernel[\1]",
                "(N H) E -> E N H",
                heads,
            ),
            Rule(
                rf"{name}\.{theirs}\.bias",
                rf"blocks/attn/{ours}/bias[\1]",
                "(N H) -> N H",
                heads,
            ),
        )
    ]


# Projectors, and a whole TimeViper's vision.

# The release numbers a projector's linear layers 0, 2, 4: activations count there.
PROJECTOR_RULES: tuple[Rule, ...] = tuple(
    rule
    for layer in range(3)
    for rule in (
        Rule(
            rf"projector\.{2 * layer}\.weight",
            f"layers/{layer}/kernel",
            "O I -> I O",
        ),
        Rule(rf"projector\.{2 * layer}\.bias", f"layers/{layer}/bias"),
    )
)


def pair_projector_rules(names: Sequence[str]) -> tuple[Rule, ...]:
    """The projectors of two encoders of these names <-> vision/pair.py."""
    return tuple(
        rule
        for name, ours in zip(names, ("first/", "second/"), strict=True)
        for rule in under(rf"projectors\.{name}\.", ours, PROJECTOR_RULES)
    )


def release_rules(cfg: EncoderConfig) -> tuple[Rule, ...]:
    """Encoders and projectors of a TimeViper checkpoint <-> `vision/` `projector/`."""
    encoders = [
        rule
        for theirs, ours, one in _towers(cfg)
        for rule in under(theirs, ours, encoder_rules(one))
    ]
    pair = isinstance(cfg, PairConfig)
    projectors = pair_projector_rules(cfg.names) if pair else PROJECTOR_RULES
    return (*encoders, *under(r"projector\.", "projector/", projectors))


def release_unused(cfg: EncoderConfig) -> tuple[str, ...]:
    """Patterns of a TimeViper checkpoint's tensors that the encoders do not need."""
    return tuple(
        f"{theirs}(?:{pattern})"
        for theirs, _, one in _towers(cfg)
        for pattern in encoder_unused(one)
    )


def _towers(cfg: EncoderConfig) -> list[tuple[str, str, VitConfig]]:
    """What stands before each encoder's own names, and before its parameters."""
    if isinstance(cfg, PairConfig):
        safe = [name.replace("-", "_") for name in cfg.names]
        theirs = [rf"vision_backbone\.backbones\.{name}\." for name in safe]
        towers = zip(theirs, ("first/", "second/"), cfg.encoders, strict=True)
    else:
        towers = [(r"vision_backbone\.", "", cfg)]
    inner = {InternVideo2Config: r"vision_tower\."}
    return [
        (rf"{theirs}featurizer\.{inner.get(type(one), '')}", f"vision/{ours}", one)
        for theirs, ours, one in towers
    ]
