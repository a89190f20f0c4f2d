"""The release's hybrid models: their config, their names, their TransV stages."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from timeviper_jax.conversion.load import load_params, save_params
from timeviper_jax.conversion.nano import (
    config_from_json,
    nano_rules,
    stages_from_release,
)
from timeviper_jax.llm.hybrid import HybridLM
from timeviper_jax.llm.transv import Stage
from timeviper_jax.presets import NANO_9B, TRANSV

# What the published config.json of Nano-9B-v2 says of the model, and the release adds.
NANO_JSON = {
    "hybrid_override_pattern": NANO_9B.pattern,
    "vocab_size": 131072,
    "hidden_size": 4480,
    "intermediate_size": 15680,
    "num_hidden_layers": 56,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "chunk_size": 128,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "time_step_limit": [0.0, float("inf")],
    "attention_bias": False,
    "mlp_hidden_act": "relu2",
    "use_pdrop": True,
    "pdrop_type": "uni_7_0.5-attn_39_0.1",
    "merge_module": "CrossAttention",
}


def test_the_published_config_is_the_preset():
    assert config_from_json(NANO_JSON) == dataclasses.replace(
        NANO_9B, rolled=False, dtype="float32"
    )
    assert config_from_json(NANO_JSON | {"use_pdrop": False}).transv == ()


@pytest.mark.parametrize(
    "names",
    [("mamba", "attention", "mlp"), ("linear_attention", "full_attention", "mlp")],
)
def test_newer_configs_list_their_blocks(names):
    blocks = [dict(zip("M*-", names, strict=True))[kind] for kind in NANO_9B.pattern]
    config = {k: v for k, v in NANO_JSON.items() if k != "hybrid_override_pattern"}
    config["layers_block_type"] = blocks
    assert config_from_json(config) == config_from_json(NANO_JSON)


def test_the_config_says_how_dt_is_bounded():
    config = NANO_JSON | {"time_step_limit": [0.01, 1.0], "time_step_min": 0.001}
    assert config_from_json(config).dt_limit == (0.01, 1.0)
    floored = config_from_json(config, dt_from="time_step_min")
    assert floored.dt_limit == (0.001, float("inf"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu' is not supported"),
        ({"num_hidden_layers": 55}, "55 layers and a pattern of 56"),
        ({"layers_block_type": ["mamba", "moe"]}, r"Blocks \['moe'\] are not among"),
        ({"layers_block_type": ["mamba", "mlp"]}, "listed blocks, 'M-', differ"),
        ({"hybrid_override_pattern": ""}, "56 layers and a pattern of 0"),
        ({"merge_module": "Average"}, "merge_module='Average' is not CrossAttention"),
        ({"pdrop_type": "uni_7_0.5-top_9_0.1"}, "'top_9_0.1' in 'uni_7_0.5-top_9_0.1'"),
        ({"pdrop_type": "uni_7"}, "'uni_7' in 'uni_7' is not TYPE_LAYER_KEEP"),
    ],
)
def test_what_cannot_be_built_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(NANO_JSON | changes)


def test_a_config_of_another_family_is_an_error():
    config = {k: v for k, v in NANO_JSON.items() if "mamba" not in k}
    with pytest.raises(ValueError, match=r"lacks \['mamba_head_dim', 'mamba_num_h"):
        config_from_json(config)


def test_stages_in_the_releases_spelling():
    assert stages_from_release("uni_7_0.5-attn_39_0.1", "CrossAttention") == TRANSV
    assert stages_from_release("unidrop_0_1-attndrop_3_.25", "CrossAttention") == (
        Stage(layer=0, keep=1.0, transfer=False),
        Stage(layer=3, keep=0.25, select="attention", transfer=False),
    )
    (stage,) = stages_from_release("uni_7_0.5", "no_merge")
    assert not stage.transfer


STAGES = (
    Stage(layer=7, keep=0.8, transfer=False),
    Stage(layer=10, keep=0.5),
    Stage(layer=39, keep=0.1, select="attention"),
)
_CHANNELS = 4 * 8 + 2 * 2 * 8  # x, B and C of tiny.LM.
_SHAPES = {
    "M": {
        "in_proj.weight": (4 * 8 + _CHANNELS + 4, 24),
        "conv1d.weight": (_CHANNELS, 1, 4),
        "conv1d.bias": (_CHANNELS,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (32,),
        "out_proj.weight": (24, 32),
    },
    "*": {f"{n}_proj.weight": (d, 24) for n, d in dict(q=32, k=16, v=16).items()}
    | {"o_proj.weight": (24, 32)},
    "-": {"up_proj.weight": (32, 24), "down_proj.weight": (24, 32)},
}


def _published_shapes(pattern):
    shapes = {
        "backbone.embeddings.weight": (29, 24),
        "backbone.norm_f.weight": (24,),
        "lm_head.weight": (29, 24),
        "backbone.alpha": (2,),
    }
    for i, kind in enumerate(pattern):
        shapes[f"backbone.layers.{i}.norm.weight"] = (24,)
        for name, shape in _SHAPES[kind].items():
            shapes[f"backbone.layers.{i}.mixer.{name}"] = shape
    for stage in (1, 2):  # Stage 0 only drops.
        for name, shape in _SHAPES["*"].items():
            shapes[f"backbone.merge_modules.{stage}.{name}"] = shape
    return shapes


@pytest.fixture(scope="module")
def published():
    """Tensors of a narrow model as deep as the 9B, and the model they fill."""
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in _published_shapes(NANO_9B.pattern).items()
    }
    cfg = dataclasses.replace(tiny.LM, pattern=NANO_9B.pattern, transv=STAGES)
    lm = nnx.eval_shape(lambda: HybridLM(cfg, rngs=nnx.Rngs(0)))
    load_params(lm, tensors, nano_rules(cfg))
    return tensors, lm


def test_every_tensor_of_every_layer_has_its_place(published):
    tensors, lm = published
    sizes = [p.size for _, p in nnx.to_flat_state(nnx.state(lm))]
    assert sum(sizes) == sum(tensor.size for tensor in tensors.values())


def test_every_tensor_comes_back_to_the_byte(published):
    tensors, lm = published
    saved = save_params(lm, nano_rules(lm.cfg))
    assert sorted(saved) == sorted(tensors)
    for name, tensor in tensors.items():
        assert saved[name].dtype == tensor.dtype, name
        assert saved[name].tobytes() == tensor.tobytes(), name


def test_fused_tensors_come_apart(published):
    tensors, lm = published
    layer, index = 7, 4  # The fifth M of "M-M-M-MM".
    mixer, name = lm.block("mamba", index).mixer, f"backbone.layers.{layer}.mixer."
    parts = [getattr(mixer, f"in_{part}").kernel[...].T for part in ("z", "x", "b")]
    parts += [getattr(mixer, f"in_{part}").kernel[...].T for part in ("c", "dt")]
    fused = jnp.concatenate(parts)
    np.testing.assert_array_equal(fused, tensors[name + "in_proj.weight"])
    taps = [getattr(mixer, f"conv_{part}").kernel[...].T for part in ("x", "b", "c")]
    fused = jnp.concatenate(taps)[:, None]
    np.testing.assert_array_equal(fused, tensors[name + "conv1d.weight"])


def test_each_transfer_takes_its_own_module_and_gate(published):
    tensors, lm = published
    for index, stage in enumerate((1, 2)):
        q = lm.transv[index].q.kernel[...].reshape(24, 32).T
        name = f"backbone.merge_modules.{stage}.q_proj.weight"
        np.testing.assert_array_equal(q, tensors[name])
        assert lm.transv[index].alpha[...] == tensors["backbone.alpha"][index]
