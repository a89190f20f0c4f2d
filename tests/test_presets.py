"""The presets: published sizes to the last parameter, and small ones that hold."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.llm.hybrid import HybridLM
from timeviper_jax.presets import (
    ENCODERS,
    NANO_9B,
    PRESETS,
    SIGLIP_SO400M_384,
    encoder,
    with_encoder,
)
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.training.experiment import model_config
from timeviper_jax.vision.encoder import make_encoder
from timeviper_jax.vision.pair import PairConfig
from timeviper_jax.vision.tome import merge_schedule


def _sizes(module: nnx.Module) -> dict[str, int]:
    """Parameters by their first name, counted without making any."""
    sizes: dict[str, int] = {}
    for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        sizes[path[0]] = sizes.get(path[0], 0) + math.prod(param.shape)
    return sizes


@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("nano_9b", 8_888_227_328),
        ("nano_12b", 12_310_001_152),
        ("nemotron_h_8b", 8_100_852_736),
        ("qwen2_1_5b", 1_543_714_304),
        ("qwen2_3b", 3_085_938_688),
        ("qwen2_7b", 7_615_616_512),
    ],
)
def test_language_models_have_the_published_parameters(preset, parameters):
    cfg = dataclasses.replace(PRESETS[preset].llm, transv=())
    sizes = _sizes(nnx.eval_shape(lambda: HybridLM(cfg, rngs=nnx.Rngs(0))))
    assert sum(sizes.values()) == parameters


def test_nano_9b_transfers_have_the_published_parameters():
    sizes = _sizes(nnx.eval_shape(lambda: HybridLM(NANO_9B, rngs=nnx.Rngs(0))))
    transfers = sizes.pop("transv")
    # Each stage: q and out of 40 heads, k and v of 8, 128 wide, and the gate.
    assert transfers == 2 * (4480 * 128 * (2 * 40 + 2 * 8) + 1) == 2 * 55_050_241


def test_nano_9b_is_the_published_stack():
    kinds = [kind for kind, _ in NANO_9B.layers]
    assert {k: kinds.count(k) for k in kinds} == dict(mamba=27, mlp=25, attention=4)
    assert [i for i, k in enumerate(kinds) if k == "attention"] == [14, 21, 30, 39]
    assert (NANO_9B.mamba.inner_dim, NANO_9B.mamba.group_dim) == (10_240, 1024)
    assert NANO_9B.segments == ((0, 7), (7, 39), (39, 56))
    preset = PRESETS["nano_9b"]
    assert preset.vision.num_tokens == 729
    removed = merge_schedule(729, preset.tokens_per_frame)
    assert removed == (364, 182, 91, 46, 23, 7)
    beyond_the_paper = (preset.time_digits, preset.normalise_vision, NANO_9B.log_base)
    assert not any(beyond_the_paper)


@pytest.mark.parametrize(
    "preset, layers, attention",
    [
        ("nano_12b", 62, [7, 16, 25, 34, 43, 52]),
        ("nemotron_h_8b", 52, [7, 18, 29, 40]),
        ("qwen2_3b", 72, list(range(0, 72, 2))),
    ],
)
def test_attention_stands_where_it_is_published(preset, layers, attention):
    kinds = [kind for kind, _ in PRESETS[preset].llm.layers]
    assert len(kinds) == layers
    assert [i for i, kind in enumerate(kinds) if kind == "attention"] == attention


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_fit_together(name):
    cfg = PRESETS[name]
    model = nnx.eval_shape(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    assert set(_sizes(model)) >= {"vision", "projector", "llm"}
    assert cfg.projector.vision_dim == cfg.vision.embed_dim
    assert cfg.projector.llm_dim == cfg.llm.embed_dim
    assert cfg.tokens_per_frame <= cfg.vision.num_tokens
    frames = jax.ShapeDtypeStruct(
        (2, cfg.vision.image_size, cfg.vision.image_size, 3), "uint8"
    )
    features = nnx.eval_shape(lambda m, f: m.encode(f), model, frames)
    assert features.shape == (2, cfg.tokens_per_frame, cfg.vision.embed_dim)


def test_initial_values_are_the_familys():
    create = lambda: TimeViper(PRESETS["tiny"], rngs=nnx.Rngs(0))
    graph = nnx.graphdef(nnx.eval_shape(create))
    fresh = jax.jit(lambda: nnx.state(create()))()
    for path, param in nnx.to_flat_state(fresh):
        assert np.all(np.isfinite(param[...])), path
    llm = nnx.merge(graph, fresh).llm
    steps = np.log1p(np.exp(llm.mamba.mixer.dt_bias[...]))
    assert np.all((steps > 0.99e-3) & (steps < 0.101))
    rates = np.exp(llm.mamba.mixer.a_log[...])
    np.testing.assert_allclose(rates, np.tile(np.arange(1, 5), (3, 1)), rtol=1e-6)
    assert all(transfer.alpha[...] == 0 for transfer in llm.transv)
    first, second, _ = llm.mamba.mixer.in_x.kernel[...]
    assert np.std(first) == pytest.approx(0.02, rel=0.1)
    assert np.abs(first - second).max() > 0.02  # Every layer drew its own.
    out = llm.mlp.mixer.down.kernel[...]
    assert np.std(out) == pytest.approx(0.02 / math.sqrt(8), rel=0.1)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_small_presets_know_every_byte_and_special(name):
    assert PRESETS[name].llm.vocab_size >= ByteTokenizer().vocab_size


def _count(cfg):
    encoder = nnx.eval_shape(lambda: make_encoder(cfg, rngs=nnx.Rngs(0)))
    return sum(_sizes(encoder).values())


# Pixels a side, tokens of a frame, their width, and timm's count of parameters.
TIMM = {
    "siglip-vit-b16-224px": (224, 196, 768, 92_884_224),
    "siglip-vit-b16-256px": (256, 256, 768, 92_930_304),
    "siglip-vit-b16-384px": (384, 576, 768, 93_176_064),
    "siglip-vit-so400m": (224, 256, 1152, 427_680_704),
    "siglip-vit-so400m-384px": (384, 729, 1152, 428_225_600),
    "dinov2-vit-l": (224, 256, 1024, 304_370_688),
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_encoders_have_their_published_sizes(name):
    cfg = ENCODERS[name]
    *sizes, published = TIMM[name]
    assert [cfg.image_size, cfg.num_tokens, cfg.embed_dim] == sizes
    E, M = cfg.embed_dim, cfg.mlp_dim
    attention, mlp, norm = 4 * E * (E + 1), 2 * E * M + M + E, 2 * E
    unbuilt = attention + mlp + 2 * norm + norm  # The last block, and the norm.
    if name == "dinov2-vit-l":
        unbuilt += 2 * E + (37**2 - 16**2) * E  # LayerScale; it was trained at 518.
    else:
        unbuilt += attention + mlp + norm + E  # The pool, with its query.
    assert _count(cfg) + unbuilt == published


def test_internvideo2_1b_has_its_published_sizes():
    cfg = ENCODERS["internvideo2-1b-16-224px"]
    E, M = 1408, 6144
    assert (cfg.clip_frames, cfg.num_tokens, cfg.embed_dim) == (4, 256, E)
    # No biases but of the projections out; norms without biases, of q and k too.
    block = 3 * E * E + E * E + E + 2 * E * M + M + E + 6 * E
    positions = E + (1 + 4 * 256) * E + (1 + 256) * E
    assert _count(cfg) == 39 * block + positions + (3 * 14**2 + 1) * E == 987_337_728


def test_two_encoders_take_the_larger_image_size():
    pair = encoder("dinov2-vit-l+siglip-vit-so400m-384px")
    assert isinstance(pair, PairConfig)
    assert (pair.image_size, pair.first.num_tokens, pair.num_tokens) == (384, 729, 1458)
    assert pair.second == SIGLIP_SO400M_384
    cfg = with_encoder(PRESETS["tiny"], pair, "tome_mlp-16")
    assert (cfg.tokens_per_frame, cfg.vision.shares(32)) == (32, (16, 16))
    model = nnx.eval_shape(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    frames = jax.ShapeDtypeStruct((2, 384, 384, 3), "uint8")
    features = nnx.eval_shape(lambda m, f: m.encode(f), model, frames)
    assert features.shape == (2, 32, 1153)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_goes_with_every_projector(name):
    merged = with_encoder(PRESETS["nano_9b"], encoder(name), "fused_tome_mlp-8")
    width = merged.vision.embed_dim
    assert merged.tokens_per_frame == 8
    assert merged.projector.widths == (width, 4 * width, 4480, 4480)
    whole = with_encoder(PRESETS["nano_9b"], encoder(name), "gelu_mlp")
    assert whole.tokens_per_frame == merged.vision.num_tokens
    assert whole.projector.widths == (width, 4480, 4480)


def test_a_run_names_its_encoder_and_projector():
    how = dict(dtype="bfloat16", param_dtype="float32", rolled=False, remat=True)
    names = "dinov2-vit-l+siglip-vit-b16-224px"
    cfg = model_config("tiny", encoder=names, arch="fused_tome_mlp-8", **how)
    assert cfg.tokens_per_frame == 16
    for one, projector in zip(
        cfg.vision.encoders, (cfg.projector.first, cfg.projector.second), strict=True
    ):
        assert one.remat and one.dtype == projector.dtype == "bfloat16"
        assert projector.fused and projector.vision_dim == one.embed_dim
    assert model_config("tiny", **how).vision.embed_dim == 32


def test_what_no_encoder_or_projector_is_called_says_why():
    for name in ("resnet", "dinov2-vit-l+resnet", "+".join(["dinov2-vit-l"] * 3)):
        with pytest.raises(ValueError, match="is not one of .*, nor two joined"):
            encoder(name)
    tiny = PRESETS["tiny"]
    for name in ("tome_mlp", "tome_mlp-x", "mlp-16"):
        with pytest.raises(ValueError, match=f"projector='{name}' is not gelu_mlp"):
            with_encoder(tiny, tiny.vision, name)
    with pytest.raises(ValueError, match=r"tokens_per_frame=17 is outside 1..16"):
        with_encoder(tiny, tiny.vision, "tome_mlp-17")
    with pytest.raises(ValueError, match="from width 32 to 32, but the encoder is 768"):
        dataclasses.replace(tiny, vision=ENCODERS["siglip-vit-b16-224px"])
