"""Names and config of published Qwen2 and Qwen2.5 models, with TransV or without.

One published layer is two of our blocks, attention then MLP: published layer i attends
at block 2 i and is gated at block 2 i + 1.
"""

from collections.abc import Mapping
from typing import Any

from timeviper_jax.conversion.nano import (
    attention_rules,
    check_fixed,
    check_present,
    read_stages,
    transfer_rules,
    under,
)
from timeviper_jax.conversion.rules import Rule
from timeviper_jax.llm.hybrid import HybridConfig

_LAYER = "*-"

# Ours -> the published config.json.
_FIELDS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
# What the family could say and this model does not build otherwise.
_FIXED = {
    "use_sliding_window": False,
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_dropout": 0.0,
}


def config_from_json(config: Mapping[str, Any]) -> HybridConfig:
    """The model that a `config.json` describes. Dtypes are left at their defaults.

    Raises:
      ValueError: Something is missing, is said twice differently, or is not built here.
    """
    check_present(config, [*_FIELDS.values(), "num_hidden_layers"])
    check_fixed(config, _FIXED)
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    kinds = config.get("layer_types") or ["full_attention"] * layers
    if list(kinds) != ["full_attention"] * layers:
        raise ValueError(
            f"layer_types={kinds} must be full_attention for each of {layers} layers."
        )
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or width // heads
    if config.get("head_dim") is None and width % heads:
        raise ValueError(f"hidden_size={width} does not divide among {heads} heads.")
    std = config.get("initializer_range", 0.02)
    return HybridConfig(
        **{ours: config[theirs] for ours, theirs in _FIELDS.items()},
        pattern=_LAYER * layers,
        head_dim=head_dim,
        rope_theta=_rope_theta(config),
        qkv_bias=True,
        gated_mlp=True,
        tied=config.get("tie_word_embeddings", False),
        init_std=std,
        embed_std=std,
        transv=read_stages(config, blocks_per_layer=len(_LAYER)),
    )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of rotary positions, which newer files keep in `rope_parameters`."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_parameters={rope} is not supported, only default.")
    theta = config.get("rope_theta", rope.get("rope_theta"))
    if theta is None:
        raise ValueError("config.json lacks rope_theta; is it of this family?")
    return float(theta)


def qwen2_rules(cfg: HybridConfig) -> tuple[Rule, ...]:
    """`model.*` and `lm_head` <-> llm/hybrid.py."""
    layer, norm = r"model\.layers\.(\d+)\.", r"{}/norm/scale[\1]"
    head = [] if cfg.tied else [Rule(r"lm_head\.weight", "head/kernel", "V D -> D V")]
    mlp = [
        Rule(r"gate_proj\.weight", "gate/kernel", "M D -> D M"),
        Rule(r"up_proj\.weight", "up/kernel", "M D -> D M"),
        Rule(r"down_proj\.weight", "down/kernel", "D M -> M D"),
    ]
    attention, at = attention_rules(cfg), r"[\1]"
    return (
        Rule(r"model\.embed_tokens\.weight", "embed/embedding"),
        Rule(r"model\.norm\.weight", "norm/scale"),
        *head,
        Rule(rf"{layer}input_layernorm\.weight", norm.format("attention")),
        Rule(rf"{layer}post_attention_layernorm\.weight", norm.format("mlp")),
        *under(rf"{layer}self_attn\.", "attention/mixer/", attention, at),
        *under(rf"{layer}mlp\.", "mlp/mixer/", mlp, at),
        *transfer_rules(cfg, "model"),
    )


def qwen2_unused(cfg: HybridConfig) -> tuple[str, ...]:
    """What a file may hold beside the model: a head that is the embedding again."""
    return (r"lm_head\.weight",) if cfg.tied else ()
