"""LoRA: nothing at first, a change of low rank then, and the only thing that learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from timeviper_jax import sharding
from timeviper_jax.layers import lora
from timeviper_jax.layers.lora import LoraConfig
from timeviper_jax.training.experiment import StageConfig
from timeviper_jax.training.metrics import Mean
from timeviper_jax.training.parameters import split
from timeviper_jax.training.step import create_state, make_train_step

CFG = LoraConfig(targets=(r"/kernel$",), rank=3, alpha=6.0)
# Two layers of each mixer; D=6, N=2, H=4, K=1, M=8.
SHAPES = {
    "llm/attention/mixer/q/kernel": (2, 6, 2, 4),
    "llm/attention/mixer/k/kernel": (2, 6, 1, 4),
    "llm/attention/mixer/out/kernel": (2, 2, 4, 6),
    "llm/mlp/mixer/up/kernel": (2, 6, 8),
    "llm/mamba/mixer/in_dt/kernel": (2, 6, 2),
    "llm/mamba/mixer/out/kernel": (2, 8, 6),
    "llm/transv/0/out/kernel": (2, 4, 6),
    "llm/head/kernel": (6, 9),
    "projector/layers/0/kernel": (5, 6),
}
NORM = "llm/norm/scale"


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    drawn = {p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
    return {p: jnp.asarray(a) for p, a in drawn.items()} | {NORM: jnp.ones(6)}


@pytest.fixture(scope="module")
def pairs(params):
    """Pairs as training leaves them: B is no longer zero."""
    pairs = lora.init(params, CFG, seed=0)
    rng = np.random.default_rng(1)
    return {
        path: jnp.asarray(rng.normal(size=a.shape), a.dtype)
        for path, a in pairs.items()
    }


def test_it_is_the_identity_at_first(params):
    pairs = lora.init(params, CFG, seed=0)
    assert {p.rpartition("/")[0] for p in pairs} == set(SHAPES)
    whole = lora.merged({**params, **pairs}, CFG)
    assert whole.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(whole[path], array)
    assert all(jnp.any(a != 0) for p, a in pairs.items() if p.endswith("lora_a"))


@pytest.mark.parametrize(
    "path, einsum",
    [
        ("llm/attention/mixer/q/kernel", "TD,DNH->TNH TD,DR->TR TR,RNH->TNH"),
        ("llm/attention/mixer/out/kernel", "TNH,NHD->TD TNH,NHR->TR TR,RD->TD"),
        ("llm/mlp/mixer/up/kernel", "TD,DM->TM TD,DR->TR TR,RM->TM"),
    ],
)
def test_merged_is_unmerged(params, pairs, path, einsum):
    whole, down, up = einsum.split()
    kernel = lora.merged({**params, **pairs}, CFG)[path]
    for layer in range(2):
        shape = (5, *params[path].shape[1 : 1 + len(whole.split(",")[0]) - 1])
        x = jax.random.normal(jax.random.key(layer), shape)
        a, b = (pairs[f"{path}/lora_{z}"][layer] for z in "ab")
        beside = jnp.einsum(whole, x, params[path][layer])
        beside += 2.0 * jnp.einsum(up, jnp.einsum(down, x, a), b)
        merged = jnp.einsum(whole, x, kernel[layer])
        np.testing.assert_allclose(merged, beside, atol=2e-5)


def test_a_change_has_its_rank(params, pairs):
    whole = lora.merged({**params, **pairs}, CFG)
    path = "llm/mlp/mixer/up/kernel"
    for layer in range(2):
        change = np.asarray(whole[path][layer] - params[path][layer])
        assert np.linalg.matrix_rank(change, tol=1e-4) == CFG.rank


class _Model(nnx.Module):
    def __init__(self, params):
        head, llm, norm = nnx.Module(), nnx.Module(), nnx.Module()
        head.kernel = nnx.Param(params["llm/head/kernel"])
        norm.scale = nnx.Param(params[NORM])
        llm.head, llm.norm, self.llm = head, norm, llm


def test_only_the_pairs_learn(params):
    cfg = LoraConfig(targets=("llm/head/kernel",), rank=2, alpha=4.0)
    graph, own = split(_Model(params))
    own |= lora.init(own, cfg, seed=0)
    stage = StageConfig.from_dict(
        dict(
            task=dict(
                kind="text",
                split="",
                where=(),
                num_frames=1,
                text_tokens=1,
                answer_tokens=1,
                num_segments=1,
                cached=False,
            ),
            steps=1,
            batch_size=1,
            accumulate=1,
            lr=1.0,
            lr_multipliers=(),
            frozen=(r"^(?!.*lora_)",),
            transv=(),
        )
    )
    moving = stage.moving(own)
    assert moving == {"llm/head/kernel/lora_a", "llm/head/kernel/lora_b"}
    state_params = {path: own[path] for path in moving}
    frozen = {path: a for path, a in own.items() if path not in moving}
    mesh: Mesh = sharding.make_mesh(fsdp=-1, devices=jax.devices()[:1])
    optimizer = optax.sgd(0.1)
    state, _ = create_state(state_params, optimizer, mesh)

    def objective(model, x):
        y = (x * model.llm.norm.scale[...]) @ model.llm.head.kernel[...]
        return {"loss": Mean.single(jnp.mean(jnp.sin(y)))}

    step = jax.jit(
        make_train_step(
            graph, objective, optimizer, adapt=lambda p: lora.merged(p, cfg)
        )
    )
    x = jax.random.normal(jax.random.key(0), (4, 6))
    first, _ = step(state, frozen, x)
    assert jnp.any(first.params["llm/head/kernel/lora_b"] != 0)
    second, _ = step(first, frozen, x)
    for path in moving:
        assert jnp.any(second.params[path] != state_params[path]), path


def test_a_matrix_that_changes_stands_still_itself():
    paths = ["llm/head/kernel", "llm/norm/scale", "llm/head/kernel/lora_a"]
    task = dict(kind="frames", words=("a",), per_record=1, share=1.0)
    stage = StageConfig.from_dict(
        dict(
            task=task | dict(words=("a", "b")),
            steps=1,
            batch_size=1,
            accumulate=1,
            lr=1.0,
            lr_multipliers=(),
            frozen=(),
            transv=(),
        )
    )
    embed = ["llm/embed/embedding", "projector/layers/0/kernel"]
    moving = stage.moving([*paths, *embed, "projector/layers/0/kernel/lora_a"])
    assert moving == {"llm/embed/embedding", "projector/layers/0/kernel/lora_a"}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(targets=("llm/nothing",)), "'llm/nothing' names no parameter"),
        (dict(targets=("norm",)), "which are no matrices"),
        (dict(rank=0), "rank=0 must be at least 1"),
    ],
)
def test_targets_that_cannot_be_are_errors(params, changes, message):
    options = dict(targets=("head",), rank=2, alpha=1.0) | changes
    with pytest.raises(ValueError, match=message):
        lora.adapted(params, LoraConfig(**options))
