"""The presets: published sizes to the last parameter, and small ones that hold."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.llm.hybrid import HybridLM
from timeviper_jax.presets import NANO_9B, PRESETS
from timeviper_jax.timeviper import TimeViper
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
