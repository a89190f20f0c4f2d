"""Attention on TPU, interpreted: the dense softmax, values and gradients, tile by tile.

Tiles are forced to 128 x 128, so that two or three meet along each axis.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.attention import attention, blocks, splash_tpu

B, T, S, N, K, H = 2, 200, 300, 4, 2, 8
CHIP = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")


@pytest.fixture
def small_tiles(monkeypatch):
    tile = (128, 128)
    sizes = blocks.Blocks(tile, tile, tile, *tile)
    monkeypatch.setattr(blocks, "choose", lambda *_: sizes)


def _inputs(T=T, S=S, H=H, seed=0):
    """q, k, v and the outputs' cotangent, in float64 NumPy."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [rng.normal(size=shape) for shape in shapes]


def _packed(lengths, total):
    """Segments of these lengths in row 0, as many from the end in row 1."""
    ids = np.repeat(range(1, len(lengths) + 1), lengths)
    ids = np.pad(ids, (0, total - ids.size))
    return np.stack([ids, ids[::-1]])


_MASK = np.random.default_rng(1).random((B, S)) < 0.5
_CASES = {
    # Row 1 has its padding in front.
    "packed": {
        "causal": True,
        "q_segment_ids": _packed([3, 130, 40], T),
        "kv_segment_ids": _packed([3, 130, 40], T),
    },
    "whole": {"causal": True},
    # Sizes that a program knows only when it runs.
    "chunk": {
        "causal": True,
        "kv_mask": _MASK,
        "q_offset": np.array(64),
        "kv_length": np.array(264),
    },
    "cross": {
        "causal": False,
        "q_segment_ids": _packed([20, 150], T),
        "kv_segment_ids": _packed([40, 0, 200], S),
        "kv_mask": _MASK,
    },
    "before": {"causal": True, "q_offset": -130},
    "empty": {"causal": False, "kv_length": np.array(0)},
}


def _with_gradients(q, k, v, dout, *, implementation, rules, causal):
    run = functools.partial(attention, causal=causal, implementation=implementation)
    out, pull = jax.vjp(lambda *z: run(*z, **rules), q, k, v)
    return out, *pull(dout.astype(out.dtype))


def _both(case, dtype, **sizes):
    """Splash in `dtype`, and the dense softmax of the same arrays in float64."""
    rules = dict(_CASES[case])
    causal = rules.pop("causal")
    if case in ("packed", "whole"):
        sizes = {"S": T} | sizes
    arrays = [jnp.asarray(z, dtype) for z in _inputs(**sizes)]
    run = lambda name: jax.jit(
        functools.partial(_with_gradients, implementation=name, causal=causal)
    )
    got = run("splash_tpu")(*arrays, rules=rules)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(np.asarray(z, np.float64)) for z in arrays]
        want = run("xla")(*arrays, rules=rules)
        return got, [np.asarray(z) for z in want]


def _assert_close(got, want, tolerance):
    for one, other in zip(got, want, strict=True):
        error = np.abs(np.asarray(one, np.float64) - other).max()
        assert error <= tolerance * max(np.abs(other).max(), 1e-30), error


@pytest.mark.parametrize("case", _CASES)
def test_is_the_softmax_over_visible_keys_and_so_are_gradients(case, small_tiles):
    _assert_close(*_both(case, jnp.float32), 5e-6)


def test_bfloat16_with_heads_that_fill_no_register(small_tiles):
    got, want = _both("packed", jnp.bfloat16, H=72)
    assert {z.dtype for z in got} == {jnp.dtype("bfloat16")}
    _assert_close(got, want, 2e-2)


def _tile_table(case):
    rules = jax.tree.map(jnp.asarray, _CASES[case])
    T, S = 256, 384
    ids = splash_tpu._segments(
        *(B, 200, 300),
        *(rules.get(name) for name in ("q_segment_ids", "kv_segment_ids", "kv_mask")),
        rules.get("kv_length", 300),
    )
    q_ids = splash_tpu._pad(ids[0], T - 200, splash_tpu._HIGHEST)
    kv_ids = splash_tpu._pad(ids[1], S - 300, splash_tpu._HIDDEN)
    positions = rules.get("q_offset", 0) + jnp.arange(T)
    return splash_tpu._tiles(q_ids, kv_ids, positions, _CASES[case]["causal"], 128, 128)


@pytest.mark.parametrize(
    "case, tiles",
    [
        ("chunk", [[1, 1, 0], [1, 1, 1]]),
        ("before", [[0, 0, 0], [1, 0, 0]]),
        ("empty", [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_only_tiles_that_may_matter_are_visited(case, tiles):
    np.testing.assert_array_equal(_tile_table(case), np.array(tiles, bool))


def test_segments_that_do_not_meet_are_not_visited():
    ids = jnp.repeat(jnp.array([[1, 2, 3], [4, 4, 7]]), 128, axis=1)
    tiles = splash_tpu._tiles(ids, ids, jnp.arange(384), True, 128, 128)
    np.testing.assert_array_equal(tiles, [[1, 0, 0], [1, 1, 0], [0, 0, 1]])


def test_a_tile_that_is_not_visited_fetches_nothing_new():
    tiles = jnp.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    fetched = splash_tpu._fetched(tiles, axis=1)
    np.testing.assert_array_equal(fetched, [[1, 1, 1, 3, 3], [0] * 5])


def _lowered(implementation, tokens=256, dtype=jnp.bfloat16, **rules):
    """The text of the program for a TPU, which holds the kernels by name."""
    q, k, v, _ = (jnp.asarray(z, dtype) for z in _inputs(tokens, tokens, 128))
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=CHIP)):
        run = lambda *z: attention(
            *z, **({"causal": True} | rules), implementation=implementation
        )
        return jax.jit(run).trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()


def test_the_kernel_is_the_automatic_choice_on_tpu():
    for implementation in (None, "splash_tpu"):
        assert "splash_mha_fwd" in _lowered(implementation)
        assert "splash_mha_fwd" in _lowered(implementation, q_offset=4, kv_length=200)
    for implementation in ("xla", "blockwise"):
        assert "splash_mha_fwd" not in _lowered(implementation)


def test_xla_takes_over_only_where_nothing_was_named():
    assert "splash_mha_fwd" not in _lowered(None, dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match=r"not \['float16'\]"):
        _lowered("splash_tpu", dtype=jnp.float16)


def test_a_decoded_token_is_left_to_xla():
    assert "splash_mha_fwd" not in _lowered(None, tokens=1, kv_length=1)


def test_a_mesh_that_xla_divides_is_refused():
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    q, k, v, _ = (jnp.asarray(z, jnp.float32) for z in _inputs())
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(NotImplementedError, match="call it under jax.shard_map"),
    ):
        attention(q, k, v, causal=True, implementation="splash_tpu")
