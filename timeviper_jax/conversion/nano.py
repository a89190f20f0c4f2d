"""Names and config of published Nemotron-H and Nano v2 models, with TransV or without.

The release numbers layers through the whole stack; ours are stacked by kind, and
`HybridConfig.layers` says which is which.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any, Literal

from timeviper_jax.conversion.rules import Cut, Rule
from timeviper_jax.llm.hybrid import HybridConfig
from timeviper_jax.llm.transv import Stage

# Ours -> the release's config.json.
_FIELDS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ssm_heads": "mamba_num_heads",
    "ssm_head_dim": "mamba_head_dim",
    "ssm_groups": "n_groups",
    "ssm_state": "ssm_state_size",
    "conv_kernel": "conv_kernel",
    "chunk_size": "chunk_size",
    "norm_eps": "layer_norm_epsilon",
    "init_std": "initializer_range",
    "embed_std": "initializer_range",
}
# What the family could say and this model does not build otherwise.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
}
# Newer files list their blocks by name, in one of two fashions.
_BLOCKS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
}
# The release's types of stage -> (select, transfer).
_STAGE_TYPES = {
    "uni": ("uniform", True),
    "attn": ("attention", True),
    "unidrop": ("uniform", False),
    "attndrop": ("attention", False),
}


def config_from_json(
    config: Mapping[str, Any],
    *,
    dt_from: Literal["time_step_limit", "time_step_min"] = "time_step_limit",
) -> HybridConfig:
    """The model that a `config.json` describes. Dtypes are left at their defaults.

    `dt_from` says which field bounds dt after softplus: the release clips it to
    `time_step_limit`, Hugging Face's own class below at `time_step_min`.

    Raises:
      ValueError: Something is missing, is said twice differently, or is not built here.
    """
    check_present(config, _FIELDS.values())
    check_fixed(config, _FIXED)
    return HybridConfig(
        pattern=_pattern(config),
        **{ours: config[theirs] for ours, theirs in _FIELDS.items()},
        dt_limit=_dt_limit(config, dt_from),
        transv=read_stages(config),
    )


def _pattern(config: Mapping[str, Any]) -> str:
    """One character a layer, however the file says it."""
    names = config.get("layers_block_type") or config.get("layer_types") or ()
    if unknown := sorted(set(names) - set(_BLOCKS)):
        raise ValueError(f"Blocks {unknown} are not among {sorted(_BLOCKS)}.")
    listed = "".join(_BLOCKS[name] for name in names)
    pattern = config.get("hybrid_override_pattern", listed)
    if not pattern:
        check_present(config, ["hybrid_override_pattern"])
    if listed and listed != pattern:
        raise ValueError(
            f"hybrid_override_pattern={pattern!r} and the listed blocks, {listed!r},"
            " differ; mend config.json."
        )
    if config.get("num_hidden_layers", len(pattern)) != len(pattern):
        raise ValueError(
            f"{config['num_hidden_layers']} layers and a pattern of {len(pattern)},"
            f" {pattern!r}; mend config.json."
        )
    return pattern


def _dt_limit(config: Mapping[str, Any], dt_from: str) -> tuple[float, float]:
    if dt_from == "time_step_limit":
        low, high = config.get(dt_from, (0.0, math.inf))
        return float(low), float(high)
    if dt_from != "time_step_min":
        raise ValueError(f"{dt_from=} is not time_step_limit or time_step_min.")
    check_present(config, [dt_from])
    return float(config[dt_from]), math.inf


def check_present(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises with the names that a `config.json` lacks."""
    if missing := sorted({name for name in names if name not in config}):
        raise ValueError(f"config.json lacks {missing}; is it of this family?")


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises where a `config.json` asks for what is built in one way only."""
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name}={config[name]!r} is not supported, only {value}.")


def read_stages(
    config: Mapping[str, Any], *, blocks_per_layer: int = 1
) -> tuple[Stage, ...]:
    """The TransV stages that the release's `config.json` asks for."""
    if not config.get("use_pdrop"):
        return ()
    check_present(config, ["pdrop_type", "merge_module"])
    return stages_from_release(
        config["pdrop_type"], config["merge_module"], blocks_per_layer=blocks_per_layer
    )


def stages_from_release(
    pdrop_type: str, merge_module: str, *, blocks_per_layer: int = 1
) -> tuple[Stage, ...]:
    """Reads the release's "uni_7_0.5-attn_39_0.1" with its CrossAttention|no_merge.

    `blocks_per_layer` is how many of our blocks one of its layers is: 2 for Qwen2.
    """
    if merge_module not in ("CrossAttention", "no_merge"):
        raise ValueError(f"{merge_module=} is not CrossAttention or no_merge.")
    stages = []
    for text in pdrop_type.split("-"):
        match = re.fullmatch(r"([a-z]+)_(\d+)_(\d*\.?\d+)", text)
        if match is None or match[1] not in _STAGE_TYPES:
            raise ValueError(
                f"{text!r} in {pdrop_type!r} is not TYPE_LAYER_KEEP with TYPE one of"
                f" {list(_STAGE_TYPES)}."
            )
        select, transfer = _STAGE_TYPES[match[1]]
        stages.append(
            Stage(
                layer=int(match[2]) * blocks_per_layer,
                keep=float(match[3]),
                select=select,
                transfer=transfer and merge_module == "CrossAttention",
            )
        )
    return tuple(stages)


def nano_rules(cfg: HybridConfig) -> tuple[Rule, ...]:
    """`backbone.*` and `lm_head` <-> llm/hybrid.py."""
    of_kind = dict(mamba=_mamba_rules, attention=attention_rules, mlp=_mlp_rules)
    rules = [
        Rule(r"backbone\.embeddings\.weight", "embed/embedding"),
        Rule(r"backbone\.norm_f\.weight", "norm/scale"),
        Rule(r"lm_head\.weight", "head/kernel", "V D -> D V"),
    ]
    for number, (kind, index) in enumerate(cfg.layers):
        layer, at = rf"backbone\.layers\.{number}\.", f"[{index}]"
        rules.append(Rule(rf"{layer}norm\.weight", f"{kind}/norm/scale{at}"))
        rules += under(rf"{layer}mixer\.", f"{kind}/mixer/", of_kind[kind](cfg), at)
    return (*rules, *transfer_rules(cfg, "backbone"))


def under(name: str, path: str, rules: Iterable[Rule], at: str = "") -> list[Rule]:
    """Rules of a part, put where it stands: behind prefixes, at one layer's place."""
    return [
        dataclasses.replace(rule, name=name + rule.name, path=path + rule.path + at)
        for rule in rules
    ]


def _mamba_rules(cfg: HybridConfig) -> list[Rule]:
    inner, group = cfg.mamba.inner_dim, cfg.mamba.group_dim
    conv = _cuts(dict(x=inner, b=group, c=group))
    fused = _cuts(dict(z=inner, x=inner, b=group, c=group, dt=cfg.ssm_heads))
    return [
        *(
            Rule(r"in_proj\.weight", f"in_{name}/kernel", "X D -> D X", cut=cut)
            for name, cut in fused.items()
        ),
        *(
            Rule(r"conv1d\.weight", f"conv_{name}/kernel", "X 1 W -> W X", cut=cut)
            for name, cut in conv.items()
        ),
        *(
            Rule(r"conv1d\.bias", f"conv_{name}/bias", cut=cut)
            for name, cut in conv.items()
        ),
        Rule(r"dt_bias", "dt_bias"),
        Rule(r"A_log", "a_log"),
        Rule(r"D", "d"),
        Rule(r"norm\.weight", "norm/scale"),
        Rule(r"out_proj\.weight", "out/kernel", "D X -> X D"),
    ]


def _cuts(widths: Mapping[str, int]) -> dict[str, Cut]:
    """Where each part of a fused matrix lies."""
    edges = list(accumulate(widths.values(), initial=0))
    return {
        name: Cut(*edge, edges[-1])
        for name, edge in zip(widths, pairwise(edges), strict=True)
    }


def attention_rules(cfg: HybridConfig) -> list[Rule]:
    """Four matrices, perhaps three biases, stored with their heads in one axis."""
    heads = dict(q=cfg.num_heads, k=cfg.num_kv_heads, v=cfg.num_kv_heads)
    split = [
        Rule(rf"{x}_proj\.weight", f"{x}/kernel", "(N H) D -> D N H", dict(N=n))
        for x, n in heads.items()
    ]
    if cfg.qkv_bias:
        split += [
            Rule(rf"{x}_proj\.bias", f"{x}/bias", "(N H) -> N H", dict(N=n))
            for x, n in heads.items()
        ]
    merge = dict(N=cfg.num_heads)
    return [*split, Rule(r"o_proj\.weight", "out/kernel", "D (N H) -> N H D", merge)]


def _mlp_rules(cfg: HybridConfig) -> list[Rule]:
    return [
        Rule(r"up_proj\.weight", "up/kernel", "M D -> D M"),
        Rule(r"down_proj\.weight", "down/kernel", "D M -> M D"),
    ]


def transfer_rules(cfg: HybridConfig, root: str) -> list[Rule]:
    """The release numbers merge modules by stage, and alpha by transfer."""
    stages = [i for i, stage in enumerate(cfg.transv) if stage.transfer]
    rules = []
    for index, stage in enumerate(stages):
        module, path = rf"{root}\.merge_modules\.{stage}\.", f"transv/{index}/"
        gate = Cut(index, index + 1, len(stages))
        rules += under(module, path, attention_rules(cfg))
        rules.append(Rule(rf"{root}\.alpha", f"{path}alpha", "1 ->", cut=gate))
    return rules
