"""Attention on GPU: what cuDNN is asked, answered by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.attention import attention, cudnn

B, T, S, N, K, H = 2, 4, 6, 4, 2, 8
CHIP = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
_ASKED = jax.nn.dot_product_attention


@pytest.fixture
def asked(monkeypatch):
    """The options of each call to JAX's op, which XLA answers."""
    calls = []

    def answer(*arrays, implementation, **options):
        calls.append({"implementation": implementation} | options)
        return _ASKED(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return calls


def _run(implementation, S=S, dtype=jnp.bfloat16, **rules):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=CHIP)):
        return attention(*arrays, **rules, implementation=implementation)


_IDS = jnp.array([[1, 1, 2, 9], [3, 3, 3, 3]])
_KV_IDS = jnp.array([[1, 2, 2, 2, 2, 4], [3, 3, 0, 0, 3, 3]])


@pytest.mark.parametrize(
    "rules",
    [
        {"causal": True},
        {"causal": False},
        {"causal": True, "q_offset": 2, "kv_length": 5},
        {"causal": True, "q_segment_ids": _IDS, "kv_segment_ids": _KV_IDS},
        {"causal": False, "kv_mask": _KV_IDS == 3},
    ],
)
def test_is_the_dense_softmax_and_zero_where_nothing_is_seen(asked, rules):
    got = np.asarray(_run("cudnn", **rules), np.float32)
    want = np.asarray(_run("xla", **rules), np.float32)
    np.testing.assert_allclose(got, want, atol=2e-2)
    np.testing.assert_array_equal(got == 0, want == 0)
    (options,) = asked
    assert options["implementation"] == "cudnn"
    # Causality alone is cuDNN's own; no array of T x S is made for it.
    assert ("mask" in options) == (len(rules) > 1)


def test_it_is_the_automatic_choice_on_gpu_but_for_a_cache(asked):
    _run(None, causal=True)
    assert len(asked) == 1
    _run(None, causal=True, q_offset=2, kv_length=5)
    assert len(asked) == 1


def test_where_cudnn_is_missing_xla_runs_unless_cudnn_was_named(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    want = _run("xla", causal=True)
    np.testing.assert_array_equal(_run(None, causal=True), want)
    with pytest.raises(NotImplementedError, match="cuDNN is not detected"):
        _run("cudnn", causal=True)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": jnp.float32}, r"not \['float32'\]"),
        ({"S": 5, "kv_length": 3}, "odd lengths, 4 x 5"),
    ],
)
def test_refusals_say_why(changes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        _run("cudnn", causal=True, **changes)


def test_large_masks_and_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(cudnn, "_LARGEST_MASK", 40)
    refused = functools.partial(pytest.raises, NotImplementedError)
    with refused(match="2 x 4 x 6 is over 40"):
        _run("cudnn", causal=True, q_offset=1)
    q = jnp.zeros((B, T, N, H), jnp.bfloat16)
    with refused(match="not on 'cpu'"):
        attention(q, q, q, causal=True, implementation="cudnn")
