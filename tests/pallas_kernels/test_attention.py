"""Attention: every implementation is a softmax over the keys that a query sees."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.attention import api, attention, blockwise

IMPLEMENTATIONS = ("xla", "blockwise")
B, T, S, N, K, H = 2, 5, 9, 4, 2, 3
_attention = jax.jit(attention, static_argnames=("causal", "scale", "implementation"))


def _inputs(seed=0):
    """q, k and v in float64 NumPy."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in [(B, T, N, H)] + 2 * [(B, S, K, H)]]


def _by_hand(q, k, v, mask):
    """One query of one head at a time; `mask` is B T S."""
    out = np.zeros_like(q)
    for row, t, n in np.ndindex(B, T, N):
        seen = mask[row, t]
        if seen.any():
            keys, values = (z[row, seen, n // (N // K)] for z in (k, v))
            logits = keys @ q[row, t, n] * H**-0.5
            weights = np.exp(logits - logits.max())
            out[row, t, n] = weights @ values / weights.sum()
    return out


def _positions():
    return np.arange(T)[:, None], np.arange(S)[None]


_Q_IDS = np.array([[1, 1, 2, 2, 0], [3, 3, 3, 3, 3]])
_KV_IDS = np.array([[1, 1, 1, 2, 2, 2, 4, 4, 4], [3, 3, 3, 3, 3, 3, 3, 5, 0]])
_KV_MASK = np.array([[1, 0, 1, 1, 0, 0, 1, 1, 1], [0] * 9]).astype(bool)


def _cases():
    """Options, and the mask they stand for. Row 1's mask hides every key."""
    t, s = _positions()
    everything = np.ones((B, T, S), bool)
    same = _Q_IDS[:, :, None] == _KV_IDS[:, None]
    segments = {"q_segment_ids": _Q_IDS, "kv_segment_ids": _KV_IDS}
    return {
        "all": ({"causal": False}, everything),
        "causal": ({"causal": True}, everything & (s <= t)),
        "offset": ({"causal": True, "q_offset": 4}, everything & (s <= t + 4)),
        "before": ({"causal": True, "q_offset": -2}, everything & (s <= t - 2)),
        "length": ({"causal": False, "kv_length": 6}, everything & (s < 6)),
        "empty": ({"causal": False, "kv_length": 0}, everything & False),
        "mask": (
            {"causal": False, "kv_mask": _KV_MASK},
            everything & _KV_MASK[:, None],
        ),
        "segments": ({"causal": False, **segments}, same),
        "together": (
            {
                "causal": True,
                "q_offset": 3,
                "kv_length": 7,
                "kv_mask": _KV_MASK,
                **segments,
            },
            same & (s <= t + 3) & (s < 7) & _KV_MASK[:, None],
        ),
    }


@pytest.mark.parametrize("case", _cases())
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_is_the_softmax_over_visible_keys(implementation, case):
    options, mask = _cases()[case]
    inputs = _inputs()
    want = _by_hand(*inputs, mask)
    with jax.enable_x64(True):
        got = _attention(*inputs, **options, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def _blockwise(block_q, block_kv, **options):
    """Blocks that do not divide the tokens, so that there are several tiles."""
    rules = dict(q_segment_ids=None, kv_segment_ids=None, kv_mask=None)
    rules |= {"q_offset": 0, "kv_length": S, "scale": H**-0.5}
    arrays = {
        k: jnp.asarray(z) for k, z in options.items() if isinstance(z, np.ndarray)
    }
    return jax.jit(
        functools.partial(
            blockwise.attention,
            **(rules | options | arrays),
            block_q=block_q,
            block_kv=block_kv,
        )
    )


@pytest.mark.parametrize("case", ["causal", "empty", "together"])
@pytest.mark.parametrize("implementation", ["xla", (2, 4), (8, 3)])
def test_gradients_are_the_slopes_even_where_nothing_is_seen(implementation, case):
    options, mask = _cases()[case]
    if implementation == "xla":
        run = functools.partial(_attention, **options, implementation="xla")
    else:
        run = _blockwise(*implementation, **options)
    with jax.enable_x64(True):
        inputs = [jnp.asarray(z) for z in _inputs()]
        check_grads(run, inputs, order=1, modes=["rev"], rtol=1e-7, atol=1e-7)
    inputs = [jnp.asarray(z, jnp.float32) for z in _inputs()]
    dq = jax.jit(jax.grad(lambda *z: run(*z).sum()))(*inputs)
    assert np.isfinite(dq).all()
    np.testing.assert_array_equal(dq[~mask.any(-1)], 0)


def test_gradients_in_bfloat16_are_those_of_float32_rounded():
    inputs = [jnp.asarray(z, jnp.bfloat16) for z in _inputs()]
    loss = lambda run: jax.grad(lambda *z: (run(*z) ** 2).sum().astype(jnp.float32))
    run = _blockwise(2, 4, causal=True)
    got = loss(run)(*inputs)
    want = loss(run)(*(z.astype(jnp.float32) for z in inputs))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=5e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_and_large_logits_neither_overflow_nor_lose_the_softmax(implementation):
    q, k, v = _inputs()
    for factor in (1, 1e4):
        want = _by_hand(factor * q, k, v, np.tril(np.ones((B, T, S), bool)))
        args = (jnp.asarray(z, jnp.float32) for z in (factor * q, k, v))
        got = _attention(*args, causal=True, implementation=implementation)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [(1, 1), (2, 4), (3, 9), (4, 512)])
def test_blocks_of_any_size_are_the_dense_softmax(blocks):
    # One compiled program for every length and offset, in blocks that do not divide.
    q, k, v = _inputs()
    options = {"causal": True, "scale": 0.7}
    rules = dict(q_segment_ids=None, kv_segment_ids=None, kv_mask=None)
    run = functools.partial(blockwise.attention, **options, **rules)
    run = jax.jit(functools.partial(run, block_q=blocks[0], block_kv=blocks[1]))
    dense = functools.partial(_attention, **options, implementation="xla")
    with jax.enable_x64(True):
        for length, offset in ((0, 0), (1, 0), (4, 2), (7, 2), (8, 4), (9, 4), (99, 9)):
            where = {"kv_length": jnp.array(length), "q_offset": jnp.array(offset)}
            np.testing.assert_allclose(
                run(q, k, v, **where), dense(q, k, v, **where), atol=1e-12
            )


def test_a_cache_is_read_only_as_far_as_it_is_filled():
    # What is behind the last whole block could be anything: it is never touched.
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, B, 1200, K, H)).astype(np.float32)
    q = rng.normal(size=(B, 1, N, H)).astype(np.float32)
    options = {"causal": True, "q_offset": 399, "kv_length": jnp.array(400)}
    want = _attention(q, k, v, **options, implementation="xla")
    behind = np.arange(1200)[:, None, None] >= 512
    got = _attention(
        q, np.where(behind, np.nan, k), np.where(behind, np.nan, v), **options
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_of_stacked_caches_is_read_where_it_lies(implementation):
    q, k, v = (jnp.asarray(z, jnp.float32) for z in _inputs())
    options = {"causal": True, "q_offset": 3, "kv_length": 8}
    options["implementation"] = implementation

    def stacked(z, fill):
        whole = jnp.full((3, *jnp.swapaxes(z, 1, 2).shape), fill)
        return whole.at[1].set(jnp.swapaxes(z, 1, 2))

    # Another layer's keys could be anything.
    got = _attention(
        q, stacked(k, jnp.nan), stacked(v, jnp.nan), layer=jnp.array(1), **options
    )
    np.testing.assert_allclose(got, _attention(q, k, v, **options), atol=1e-6)
    total = lambda layer: lambda *z: _attention(*z, layer=layer, **options).sum()
    own = jax.grad(total(None), argnums=(0, 1, 2))(q, k, v)
    whole = jax.grad(total(1), argnums=(0, 1, 2))(q, stacked(k, 0.0), stacked(v, 0.0))
    np.testing.assert_allclose(whole[0], own[0], atol=1e-6)
    for given, want in zip(whole[1:], own[1:], strict=True):
        np.testing.assert_allclose(given, stacked(want, 0.0), atol=1e-6)


def test_a_stack_of_caches_goes_with_the_layer_that_is_read():
    q, k, v = (jnp.asarray(z, jnp.float32) for z in _inputs())
    with pytest.raises(ValueError, match="layer=1 goes with stacked caches"):
        attention(q, k, v, causal=True, layer=1)
    with pytest.raises(ValueError, match=r"layer=None goes with stacked caches"):
        attention(q, k[None], v[None], causal=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_rounds_inputs_weights_and_outputs(implementation):
    q, k, v = (jnp.asarray(z, jnp.bfloat16) for z in _inputs())
    exact = [np.asarray(z).astype(np.float64) for z in (q, k, v)]
    want = _by_hand(*exact, np.ones((B, T, S), bool))
    got = attention(q, k, v, causal=False, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_named_implementation_is_never_replaced(implementation, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("not these arguments")

    monkeypatch.setattr(getattr(api, implementation), "attention", refuse)
    q, k, v = (jnp.asarray(z, jnp.float32) for z in _inputs())
    with pytest.raises(NotImplementedError, match="not these arguments"):
        attention(q, k, v, causal=True, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens, keys", [(T, 0), (0, S)])
def test_where_there_is_no_key_zeros_are_read(implementation, tokens, keys):
    q, k, v = (jnp.asarray(z, jnp.float32) for z in _inputs())
    q, k, v = q[:, :tokens], k[:, :keys], v[:, :keys]
    got = attention(q, k, v, causal=True, implementation=implementation)
    np.testing.assert_array_equal(got, np.zeros_like(q))


@pytest.fixture
def unchecked():
    """Switches the shape checks of the tests off, as they are in production."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"q": jnp.ones((B, T, 3, H))},
            "3 query heads do not divide among 2 key heads",
        ),
        ({"v": jnp.ones((B, S, K, 4))}, r"v \(2, 9, 2, 4\) must be \(2, 9, 2, 3\)"),
        ({"k": jnp.ones((B, S, K, 4))}, r"k \(2, 9, 2, 4\) must be \(2, 9, 2, 3\)"),
        ({"kv_mask": jnp.ones((B, 1), bool)}, r"kv_mask \(2, 1\) must be \(2, 9\)"),
        ({"q_segment_ids": jnp.ones((B, T), int)}, "together, or neither"),
        ({"implementation": "flash"}, "implementation='flash' is not one of"),
    ],
)
def test_wrong_arguments_are_named(unchecked, changes, message):
    q, k, v = (jnp.asarray(z, jnp.float32) for z in _inputs())
    with pytest.raises(ValueError, match=message):
        attention(**({"q": q, "k": k, "v": v, "causal": True} | changes))
