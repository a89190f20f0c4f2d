"""Families at their full sizes, abstract: every parameter has a published name."""

import dataclasses
import math
import pathlib

import numpy as np
import pytest

from timeviper_jax import presets
from timeviper_jax.conversion import stream
from timeviper_jax.conversion.families import family_of, names_of, sized
from timeviper_jax.conversion.files import Entry, TensorFiles
from timeviper_jax.conversion.folder import natural_dtype, param_shapes
from timeviper_jax.presets import PRESETS, read_config, with_encoder, write_config


def _published(family, cfg, part):
    shapes = {p: s for p, s in param_shapes(cfg).items() if p.startswith(part)}
    return stream.plan(shapes, names_of(family, cfg).rules, {})[1]


def _count(tensors):
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def test_nano_9b_is_published_as_it_was():
    cfg = PRESETS["nano_9b"].with_transv(())
    tensors = _published("nano", cfg, "llm/")
    assert _count(tensors) == 8_888_227_328
    shapes = {
        "backbone.embeddings.weight": (131072, 4480),
        "backbone.layers.0.mixer.in_proj.weight": (22656, 4480),
        "backbone.layers.0.mixer.conv1d.weight": (12288, 1, 4),
        "backbone.layers.14.mixer.k_proj.weight": (1024, 4480),
        "backbone.layers.55.mixer.down_proj.weight": (4480, 15680),
        "lm_head.weight": (131072, 4480),
    }
    assert {name: tensors[name].shape for name in shapes} == shapes


def test_a_whole_timeviper_has_the_releases_names():
    tensors = _published("timeviper", PRESETS["nano_9b"], "")
    assert tensors["llm_backbone.llm.backbone.alpha"].shape == (2,)
    vision = "vision_backbone.featurizer.blocks.25.attn.qkv.weight"
    assert tensors[vision].shape == (3456, 1152)
    assert tensors["projector.projector.2.weight"].shape == (4480, 4480)


@pytest.mark.parametrize("preset", ["tiny", "qwen2_1_5b"])
@pytest.mark.parametrize("encoder", ["dinov2-vit-l+siglip-vit-so400m-384px", ""])
def test_every_family_and_pair_names_all_parameters(preset, encoder):
    cfg = PRESETS[preset]
    if encoder:
        cfg = with_encoder(cfg, presets.encoder(encoder), "tome_mlp-16")
    tensors = _published("timeviper", cfg, "")
    for name in filter(None, encoder.replace("-", "_").split("+")):
        assert f"vision_backbone.backbones.{name}.featurizer.pos_embed" in tensors
    shapes = {p: math.prod(s.shape) for p, s in param_shapes(cfg).items()}
    assert _count(tensors) == sum(shapes.values())


@pytest.mark.parametrize(
    "names, config, family",
    [
        (["backbone.layers.0.mixer.D"], None, "nano"),
        (["model.layers.0.self_attn.q_proj.bias"], None, "qwen2"),
        (["model.norm.weight"], {"model_type": "nemotron_h"}, "nano"),
        (["pos_embed", "blocks.0.norm1.weight"], None, "siglip"),
        (["reg_token", "blocks.0.norm1.weight"], None, "dinov2"),
        (["blocks.0.attn.q_norm.weight"], None, "internvideo2"),
        (["llm_backbone.llm.lm_head.weight", "projector.0.bias"], {}, "timeviper"),
    ],
)
def test_a_family_is_known_by_its_tensors(names, config, family):
    assert family_of(names, config) == family


def test_an_unknown_family_is_an_error():
    with pytest.raises(ValueError, match="are of no family that is known; say which"):
        family_of(["wte.weight"], None)
    with pytest.raises(ValueError, match="family='gpt' is not one of"):
        names_of("gpt", PRESETS["tiny"])


def test_sizes_survive_their_file(tmp_path):
    for name, cfg in PRESETS.items():
        write_config(tmp_path / f"{name}.json", cfg)
        assert read_config(tmp_path / f"{name}.json") == cfg
    pair = presets.encoder("siglip-vit-b16-224px+internvideo2-1b-16-224px")
    cfg = with_encoder(PRESETS["nano_9b"], pair, "fused_tome_mlp-16")
    write_config(tmp_path / "pair.json", cfg)
    assert presets.find_config(str(tmp_path / "pair.json")) == cfg
    with pytest.raises(ValueError, match="preset='nano' is not one of"):
        presets.find_config("nano")
    text = (tmp_path / "tiny.json").read_text()
    (tmp_path / "tiny.json").write_text(text.replace("timeviper_jax.", "os."))
    with pytest.raises(ValueError, match="is no config of this project"):
        read_config(tmp_path / "tiny.json")


def test_another_language_model_brings_its_width_to_the_projector():
    base = PRESETS["nano_9b"]
    config = dict(
        model_type="qwen2",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )
    cfg = sized("qwen2", base, config)
    assert cfg.projector == dataclasses.replace(base.projector, llm_dim=64)
    assert (cfg.llm.dtype, cfg.llm.rolled) == (base.llm.dtype, base.llm.rolled)
    assert sized("siglip", base, config) == base


def test_the_natural_dtype_holds_every_tensor():
    entry = lambda dtype: Entry(file=pathlib.Path("x"), dtype=np.dtype(dtype), shape=())
    half = {"a": entry("bfloat16"), "ids": entry("int64")}
    assert natural_dtype(TensorFiles(half, {})) == "bfloat16"
    mixed = half | {"A_log": entry("float32")}
    assert natural_dtype(TensorFiles(mixed, {})) == "float32"
