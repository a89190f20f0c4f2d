"""The arithmetic of a step: against the count of its program, and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import stage2_video
from pallas_kernels.attention import api
from tests.training import mini
from timeviper_jax import flops
from timeviper_jax.llm.transv import Stage
from timeviper_jax.training import experiment
from timeviper_jax.training.arithmetic import step_flops
from timeviper_jax.training.parameters import merge
from timeviper_jax.vision.dinov2 import DinoV2Config
from timeviper_jax.vision.encoder import make_encoder
from timeviper_jax.vision.internvideo2 import InternVideo2Config
from timeviper_jax.vision.pair import PairConfig, PairProjectorConfig
from timeviper_jax.vision.vit import VitConfig

ROWS = 2
LLM = mini.CONFIG.llm
T = mini.FRAMES * mini.CONFIG.tokens_per_frame + mini.TEXT


def config(pattern, *transv, **changes):
    llm = dataclasses.replace(LLM, pattern=pattern, transv=transv, **changes)
    return dataclasses.replace(mini.CONFIG, llm=llm)


def make_stage(frozen=(), **changes):
    return experiment.StageConfig(
        task=mini.make_task(**changes),
        steps=1,
        batch_size=ROWS,
        accumulate=1,
        lr=1.0,
        lr_multipliers=(),
        frozen=frozen,
        transv=(),
    )


def needed(cfg, stage):
    _, shapes = experiment.describe(cfg)
    return step_flops(cfg, stage, stage.moving(shapes))


def counted(cfg, stage):
    """What loss and gradients count in their program."""
    graph, shapes = experiment.describe(cfg)
    moving = stage.moving(shapes)
    features = mini.FRAMES, cfg.tokens_per_frame, cfg.vision.embed_dim
    batch = dataclasses.replace(
        mini.make_batch(ROWS),
        frames=None,
        features=jnp.zeros((ROWS, *features), jnp.float16),
    )

    def loss(params, frozen, batch):
        means = mini.make_objective()(merge(graph, {**params, **frozen}), batch)
        return means["loss"].total

    params = {path: shape for path, shape in shapes.items() if path in moving}
    frozen = {path: shape for path, shape in shapes.items() if path not in moving}
    found = flops.count(jax.jit(jax.grad(loss)).trace(params, frozen, batch).jaxpr)
    assert found.exact
    return found.flops


@pytest.mark.parametrize(
    "frozen",
    [
        (),
        (r"^llm/",),
        (r"^projector/",),
        (r"^projector/", r"^llm/(embed|mlp/mixer/up)"),
    ],
)
def test_matrices_count_what_their_program_does_whatever_stands_still(frozen):
    cfg, stage = config("--"), make_stage(frozen, cached=True)
    assert needed(cfg, stage) == counted(cfg, stage)


def added(pattern, **changes):
    """What blocks add after one that learns: three times what they take forward."""
    stage = make_stage(cached=True, **changes)
    more = needed(config("-" + pattern), stage) - needed(config("-"), stage)
    assert more % 3 == 0
    return more // 3


def test_attention_counts_the_pairs_that_see_each_other():
    heads, D, H = LLM.num_heads, LLM.embed_dim, LLM.head_dim
    kernels = 2 * heads * H * D + 2 * LLM.num_kv_heads * H * D
    pairs = T * (T + 1) // 2
    assert added("*") == 2 * ROWS * (T * kernels + 2 * pairs * heads * H)


def test_a_state_space_counts_its_recurrence():
    inner, group = LLM.ssm_heads * LLM.ssm_head_dim, LLM.ssm_groups * LLM.ssm_state
    kernels = LLM.embed_dim * (3 * inner + 2 * group + LLM.ssm_heads)
    convolution = LLM.conv_kernel * (inner + 2 * group)
    states = 2 * inner * LLM.ssm_state
    assert added("M") == 2 * ROWS * T * (kernels + convolution + states)


def test_transv_counts_the_transfer_and_spares_what_it_drops():
    """Of 16 vision tokens 4 stay: 12 are read by 16 of text, and gone in layer 1."""
    stage = make_stage(cached=True)
    whole = needed(config("--"), stage)
    drop = Stage(layer=1, keep=0.25, transfer=False)
    mlp = 2 * LLM.embed_dim * LLM.mlp_dim
    gone, text = mini.FRAMES * mini.CONFIG.tokens_per_frame - 4 + 1, mini.TEXT
    assert needed(config("--", drop), stage) == whole - 3 * 2 * ROWS * (gone - 1) * mlp
    transfer = dataclasses.replace(drop, transfer=True)
    D, heads, kv = LLM.embed_dim, LLM.num_heads * LLM.head_dim, LLM.num_kv_heads
    moved = text * 2 * D * heads + gone * 2 * D * kv * LLM.head_dim
    moved += 2 * text * gone * heads
    extra = needed(config("--", transfer), stage) - needed(config("--", drop), stage)
    assert extra == 3 * 2 * ROWS * moved


def test_an_encoder_that_stands_still_counts_once():
    vision, cached = mini.CONFIG.vision, make_stage(cached=True)
    V, E = vision.num_tokens, vision.embed_dim
    each = V * E * 3 * vision.patch_size**2
    each += (vision.depth - 1) * (
        V * (4 * E * E + 2 * E * vision.mlp_dim) + 2 * V * V * E
    )
    once = 2 * ROWS * mini.FRAMES * each
    cfg = config("-")
    frozen = make_stage((r"^vision/",))
    assert needed(cfg, frozen) == needed(cfg, cached) + once
    # Pixels have no gradient, and then the projector's input has one.
    pixels = 2 * ROWS * mini.FRAMES * V * E * 3 * vision.patch_size**2
    first = mini.CONFIG.projector.widths[:2]
    tokens = ROWS * mini.FRAMES * mini.CONFIG.tokens_per_frame
    whole = needed(cfg, cached) + 3 * once - pixels + 2 * tokens * first[0] * first[1]
    assert needed(cfg, make_stage()) == whole


SIZES = dict(
    image_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, mlp_dim=48
)
ENCODERS = [VitConfig(**SIZES), DinoV2Config(**SIZES), InternVideo2Config(**SIZES)]


def seen(vision, projector=mini.CONFIG.projector):
    """What these encoders take to see the frames of a step."""
    cfg = dataclasses.replace(config("-"), vision=vision, projector=projector)
    frozen = (r"^vision/",)
    return needed(cfg, make_stage(frozen)) - needed(
        cfg, make_stage(frozen, cached=True)
    )


@pytest.mark.parametrize("cfg", ENCODERS, ids=lambda cfg: type(cfg).__name__)
def test_encoders_count_all_of_their_tokens(cfg, monkeypatch):
    """As their programs do, where sums over attention's weights are products too."""
    monkeypatch.setattr(api, "_preferred", lambda *_, **__: ("xla",))
    graph, params = nnx.split(
        nnx.eval_shape(lambda: make_encoder(cfg, rngs=nnx.Rngs(0)))
    )
    clip = cfg.clip_frames
    passes = ROWS * mini.FRAMES // clip
    shape = (passes, *((clip,) if clip > 1 else ()), 16, 16, 3)
    frames = jax.ShapeDtypeStruct(shape, jnp.uint8)
    run = jax.jit(lambda params, frames: nnx.merge(graph, params)(frames))
    tokens = clip * cfg.num_tokens + cfg.own_tokens
    sums = 2 * (cfg.depth - 1) * passes * cfg.num_heads * tokens**2
    assert seen(cfg) + sums == flops.count(run.trace(params, frames).jaxpr).flops


def test_two_encoders_both_see():
    one = mini.CONFIG.projector
    first, second, _ = ENCODERS
    both = PairProjectorConfig(first=one, second=one)
    assert seen(PairConfig(first=first, second=second), both) == seen(first) + seen(
        second
    )


def test_the_9b_takes_what_its_parameters_say():
    """Two a parameter and token forward, four backward; little for all the rest."""
    c = stage2_video.get_config("frames=256,transv=false").to_dict()
    stage = experiment.StageConfig.from_dict(c["stages"]["instruct"])
    stage = dataclasses.replace(
        stage, task=dataclasses.replace(stage.task, cached=True)
    )
    cfg = experiment.model_config(**c["model"]).with_transv(())
    tokens = stage.batch_size * (256 * 16 + 2_048)
    layers = 8_888_227_328 - 2 * 131_072 * 4_480  # Without embeddings and head.
    assert 1.0 < needed(cfg, stage) / (6 * layers * tokens) < 1.1
