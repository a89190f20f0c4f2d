"""Published Qwen2 models: their config, their names, their TransV stages."""

import dataclasses

import numpy as np
import pytest
import tiny
from flax import nnx

from timeviper_jax.conversion.load import load_params
from timeviper_jax.conversion.qwen2 import config_from_json, qwen2_rules
from timeviper_jax.llm.hybrid import HybridLM
from timeviper_jax.llm.transv import Stage
from timeviper_jax.presets import QWEN2_3B, QWEN2_7B

# What the published config.json of Qwen2.5-7B says of the model.
QWEN_JSON = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
SMALLER = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


@pytest.mark.parametrize("changes, preset", [({}, QWEN2_7B), (SMALLER, QWEN2_3B)])
def test_the_published_config_is_the_preset(changes, preset):
    want = dataclasses.replace(preset, rolled=False, dtype="float32")
    assert config_from_json(QWEN_JSON | changes) == want
    newer = {k: v for k, v in (QWEN_JSON | changes).items() if k != "rope_theta"}
    newer["rope_parameters"] = {"rope_theta": 1000000.0, "rope_type": "default"}
    assert config_from_json(newer) == want


def test_a_stage_stands_before_its_layers_attention():
    stages = {
        "use_pdrop": True,
        "pdrop_type": "uni_5_0.5-attndrop_20_0.25",
        "merge_module": "CrossAttention",
    }
    assert config_from_json(QWEN_JSON | stages).transv == (
        Stage(layer=10, keep=0.5),
        Stage(layer=40, keep=0.25, select="attention", transfer=False),
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling=.* is not supported"),
        ({"layer_types": ["full_attention"] * 27}, "for each of 28 layers"),
        ({"num_attention_heads": 30}, "hidden_size=3584 does not divide among 30"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "is not supported, only default"),
    ],
)
def test_what_cannot_be_built_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(QWEN_JSON | changes)


def test_a_config_of_another_family_is_an_error():
    config = {k: v for k, v in QWEN_JSON.items() if k != "rms_norm_eps"}
    with pytest.raises(ValueError, match=r"lacks \['rms_norm_eps'\]"):
        config_from_json(config)


_ATTENTION = {f"{n}_proj.weight": (d, 24) for n, d in dict(q=32, k=16, v=16).items()}
_ATTENTION |= {f"{n}_proj.bias": (d,) for n, d in dict(q=32, k=16, v=16).items()}
_ATTENTION |= {"o_proj.weight": (24, 32)}
_LAYER = {
    "input_layernorm.weight": (24,),
    "post_attention_layernorm.weight": (24,),
    "mlp.gate_proj.weight": (32, 24),
    "mlp.up_proj.weight": (32, 24),
    "mlp.down_proj.weight": (24, 32),
    **{f"self_attn.{name}": shape for name, shape in _ATTENTION.items()},
}


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_has_its_place(tied):
    shapes = {"model.embed_tokens.weight": (29, 24), "model.norm.weight": (24,)}
    shapes |= {} if tied else {"lm_head.weight": (29, 24)}
    for i in range(3):
        shapes |= {f"model.layers.{i}.{n}": s for n, s in _LAYER.items()}
    shapes |= {f"model.merge_modules.1.{n}": s for n, s in _ATTENTION.items()}
    shapes["model.alpha"] = (1,)  # Stage 0 only drops.
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    stages = (Stage(layer=2, keep=0.8, transfer=False), Stage(layer=4, keep=0.5))
    cfg = dataclasses.replace(tiny.QWEN, pattern=3 * "*-", tied=tied, transv=stages)
    lm = nnx.eval_shape(lambda: HybridLM(cfg, rngs=nnx.Rngs(0)))
    load_params(lm, tensors, qwen2_rules(cfg))
    sizes = [p.size for _, p in nnx.to_flat_state(nnx.state(lm))]
    assert sum(sizes) == sum(tensor.size for tensor in tensors.values())
    gate = lm.block("mlp", 2).mixer.gate.kernel[...]
    np.testing.assert_array_equal(
        gate.T, tensors["model.layers.2.mlp.gate_proj.weight"]
    )
    bias = lm.transv[0].k.bias[...].reshape(-1)
    np.testing.assert_array_equal(bias, tensors["model.merge_modules.1.k_proj.bias"])
