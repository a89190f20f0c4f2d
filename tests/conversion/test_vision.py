"""Names of encoders: whole tables at full size, and every byte there and back."""

import dataclasses
import math

import numpy as np
import pytest
from flax import nnx

from tests.golden_cases import load, under
from timeviper_jax.conversion.load import load_params, save_params
from timeviper_jax.conversion.rules import place, write_plan
from timeviper_jax.conversion.vision import (
    config_from_json,
    encoder_rules,
    encoder_unused,
    internvideo2_rules,
    release_rules,
    release_unused,
)
from timeviper_jax.presets import ENCODERS, PRESETS, encoder, with_encoder
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.vision.dinov2 import DinoV2Config
from timeviper_jax.vision.encoder import make_encoder
from timeviper_jax.vision.internvideo2 import InternVideo2Config
from timeviper_jax.vision.positions import resize_grid, resize_time
from timeviper_jax.vision.vit import VitConfig

# What each block has of a width E and an MLP width M, by source.
TIMM = {
    "norm1.weight": "E",
    "norm1.bias": "E",
    "attn.qkv.weight": "3E E",
    "attn.qkv.bias": "3E",
    "attn.proj.weight": "E E",
    "attn.proj.bias": "E",
    "norm2.weight": "E",
    "norm2.bias": "E",
    "mlp.fc1.weight": "M E",
    "mlp.fc1.bias": "M",
    "mlp.fc2.weight": "E M",
    "mlp.fc2.bias": "E",
}
INTERNVIDEO2 = {
    **{name: shape for name, shape in TIMM.items() if name[:4] not in ("norm",)},
    **{f"{name}.weight": "E" for name in ("norm1", "norm2", "ls1", "ls2")},
    **{f"attn.{name}_norm.weight": "E" for name in "qk"},
}
del INTERNVIDEO2["attn.qkv.bias"]
_HF_MLP = {name: shape for name, shape in TIMM.items() if name.startswith("mlp")}


def _hf_attention(prefix, parts, out):
    names = {f"{prefix}{part}": shape for part in parts for shape in ("E E",)}
    names[f"{out}"] = "E E"
    weights = {f"{name}.weight": shape for name, shape in names.items()}
    return weights | {f"{name}.bias": "E" for name in names}


HF_SIGLIP = {
    **_hf_attention("self_attn.", ("q_proj", "k_proj", "v_proj"), "self_attn.out_proj"),
    **{f"layer_norm{i}.{kind}": "E" for i in "12" for kind in ("weight", "bias")},
    **_HF_MLP,
}
HF_DINO = {
    **_hf_attention(
        "attention.attention.", ("query", "key", "value"), "attention.output.dense"
    ),
    **{f"norm{i}.{kind}": "E" for i in "12" for kind in ("weight", "bias")},
    **{f"layer_scale{i}.lambda1": "E" for i in "12"},
    **_HF_MLP,
}


def _tower(cfg, block, prefix, **others):
    """Shapes of an encoder's tensors by name, to the last published block."""
    E, M, P = cfg.embed_dim, cfg.mlp_dim, cfg.patch_size
    sizes = {"E": E, "M": M, "3E": 3 * E, "P": P, "V": cfg.num_tokens}
    shape = lambda text: tuple(sizes.get(s) or int(s) for s in text.split())
    blocks = {
        f"{prefix}{i}.{name}": shape(text)
        for i in range(cfg.depth)
        for name, text in block.items()
    }
    return blocks | {name: shape(text) for name, text in others.items()}


def _published(name, cfg):
    patch = {"patch_embed.proj.weight": "E 3 P P", "patch_embed.proj.bias": "E"}
    ends = {"norm.weight": "E", "norm.bias": "E"}
    if name.startswith("siglip"):
        pool = {"attn_pool.latent": "1 1 E", "attn_pool.q.weight": "E E"}
        ends |= pool | {"pos_embed": "1 V E"}
        return _tower(cfg, TIMM, "blocks.", **patch, **ends)
    if name.startswith("dinov2"):  # As it was trained, at 518 pixels.
        ends |= {"pos_embed": "1 1369 E", "cls_token": "1 1 E", "reg_token": "1 4 E"}
        block = TIMM | {f"ls{i}.gamma": "E" for i in "12"}
        return _tower(cfg, block, "blocks.", **patch, **ends)
    patch["patch_embed.proj.weight"] = "E 3 1 P P"
    tables = {"pos_embed": "1 1025 E", "img_pos_embed": "1 257 E"}
    heads = {"clip_projector.norm1_q.weight": "E", "clip_pos_embed": "1 1025 E"}
    tables |= {"cls_token": "1 1 E"}
    return _tower(cfg, INTERNVIDEO2, "blocks.", **patch, **tables, **heads)


def _shapes(cfg, create):
    module = nnx.eval_shape(lambda: create(cfg, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(module))
    return {"/".join(map(str, path)): param.shape for path, param in flat}


def _assert_names_fit(published, params, rules, unused):
    """Every tensor has a place, and every parameter makes a tensor of its name."""
    places = place(published, params, rules, ignore=unused)
    plan = write_plan(params, rules)
    assert set(plan) == {placement.name for placement in places}
    kept = sum(math.prod(published[name]) for name in plan)
    positions = lambda shapes: sum(
        math.prod(s) for name, s in shapes.items() if "pos" in name and name in kept_of
    )
    kept_of = {*plan, *(path for path in params if "positions" in path)}
    ours = sum(math.prod(shape) for shape in params.values())
    assert kept - positions(published) == ours - positions(params)


@pytest.mark.parametrize(
    "name", ["siglip-vit-so400m-384px", "dinov2-vit-l", "internvideo2-1b-16-224px"]
)
def test_every_published_tensor_of_every_encoder_has_its_place(name):
    cfg = ENCODERS[name]
    params = _shapes(cfg, make_encoder)
    published = _published(name, cfg)
    _assert_names_fit(published, params, encoder_rules(cfg), encoder_unused(cfg))


def test_transformers_names_have_their_places():
    cfg = ENCODERS["siglip-vit-so400m-384px"]
    published = _tower(
        cfg,
        HF_SIGLIP,
        "encoder.layers.",
        **{
            "embeddings.patch_embedding.weight": "E 3 P P",
            "embeddings.patch_embedding.bias": "E",
            "embeddings.position_embedding.weight": "V E",
            "post_layernorm.weight": "E",
            "head.probe": "1 1 E",
        },
    )
    rules = encoder_rules(cfg, "transformers")
    _assert_names_fit(published, _shapes(cfg, make_encoder), rules, encoder_unused(cfg))
    cfg = dataclasses.replace(ENCODERS["dinov2-vit-l"], class_position=True)
    published = _tower(
        cfg,
        HF_DINO,
        "encoder.layer.",
        **{
            "embeddings.patch_embeddings.projection.weight": "E 3 P P",
            "embeddings.patch_embeddings.projection.bias": "E",
            "embeddings.position_embeddings": "1 1370 E",
            "embeddings.cls_token": "1 1 E",
            "embeddings.mask_token": "1 E",
            "embeddings.register_tokens": "1 4 E",
            "layernorm.weight": "E",
        },
    )
    rules = encoder_rules(cfg, "transformers")
    _assert_names_fit(published, _shapes(cfg, make_encoder), rules, encoder_unused(cfg))


def test_a_pair_in_a_timeviper_checkpoint_has_its_places():
    names = ["dinov2-vit-l", "internvideo2-1b-16-224px"]
    cfg = with_encoder(PRESETS["tiny"], encoder("+".join(names)), "fused_tome_mlp-16")
    published = {
        f"vision_backbone.backbones.{safe}{name}": shape
        for safe, id_, one in zip(
            (
                "dinov2_vit_l.featurizer.",
                "internvideo2_1b_16_224px.featurizer.vision_tower.",
            ),
            names,
            cfg.vision.encoders,
            strict=True,
        )
        for name, shape in _published(id_, one).items()
    }
    for id_, one in zip(names, cfg.vision.encoders, strict=True):
        E, D = one.embed_dim, cfg.llm.embed_dim
        for layer, shape in ((0, (4 * E, E)), (2, (D, 4 * E)), (4, (D, D))):
            stem = f"projector.projectors.{id_}.projector.{layer}"
            published |= {f"{stem}.weight": shape, f"{stem}.bias": shape[:1]}
    params = _shapes(cfg, TimeViper)
    params = {p: s for p, s in params.items() if p.startswith(("vision", "projector"))}
    rules = release_rules(cfg.vision)
    unused = release_unused(cfg.vision)
    _assert_names_fit(published, params, rules, unused)


TINY = dict(patch_size=14, embed_dim=64, depth=4, num_heads=4)


@pytest.mark.parametrize(
    ("case", "cfg"),
    [
        ("vit_siglip_so400m_tiny", VitConfig(image_size=90, mlp_dim=239, **TINY)),
        ("vit_dinov2_reg_tiny", DinoV2Config(image_size=70, mlp_dim=256, **TINY)),
        (
            "vit_internvideo2_tiny",
            InternVideo2Config(image_size=56, mlp_dim=279, **TINY),
        ),
    ],
)
def test_every_tensor_comes_back_to_the_byte(case, cfg):
    tensors, rules = under("param.", load(case)[1]), encoder_rules(cfg)
    module = nnx.eval_shape(lambda: make_encoder(cfg, rngs=nnx.Rngs(0)))
    load_params(module, tensors, rules, ignore=encoder_unused(cfg))
    saved = save_params(module, rules)
    left = {name for name in tensors if name not in saved}
    assert all(name.startswith(("blocks.3.", "norm", "attn_pool")) for name in left)
    for name, tensor in saved.items():
        assert tensor.tobytes() == tensors[name].tobytes(), name


def test_positions_of_another_size_are_resized_as_they_are_loaded():
    table = np.random.default_rng(0).normal(size=(1, 1 + 8 * 16, 64))
    rules = internvideo2_rules(
        InternVideo2Config(image_size=84, mlp_dim=279, **TINY), trained_frames=8
    )
    rule = next(rule for rule in rules if rule.name == "pos_embed")
    got = rule.load(table)
    clip = resize_time(table[0, 1:].reshape(8, 16, 64), 4)
    np.testing.assert_array_equal(got[0], table[0, 0])
    want = resize_grid(clip, 6, antialias=False).reshape(-1, 64)
    np.testing.assert_allclose(got[1:], want, atol=1e-12)
    timm = encoder_rules(DinoV2Config(image_size=42, mlp_dim=256, **TINY))
    rule = next(rule for rule in timm if rule.name == "pos_embed")
    table = table[:, 1:26]
    want = resize_grid(table[0], 3, antialias=True)
    np.testing.assert_allclose(rule.load(table), want, atol=1e-12)


def test_published_configs_are_the_presets():
    # As they stand beside SigLIP's and DINOv2's tensors.
    siglip = {
        "model_type": "siglip",
        "text_config": {"hidden_size": 1152},
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    }
    assert config_from_json(siglip) == ENCODERS["siglip-vit-so400m-384px"]
    base = {"model_type": "siglip", "vision_config": {}}
    assert config_from_json(base) == ENCODERS["siglip-vit-b16-224px"]
    dinov2 = {
        "model_type": "dinov2_with_registers",
        "hidden_size": 1024,
        "image_size": 518,
        "mlp_ratio": 4,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_register_tokens": 4,
        "patch_size": 14,
        "use_swiglu_ffn": False,
    }
    assert config_from_json(dinov2) == dataclasses.replace(
        ENCODERS["dinov2-vit-l"], image_size=518, class_position=True
    )
    with pytest.raises(ValueError, match="use_swiglu_ffn=True is not supported"):
        config_from_json(dinov2 | {"use_swiglu_ffn": True})
    with pytest.raises(ValueError, match="model_type='clip' is not siglip"):
        config_from_json({"model_type": "clip"})
