"""The causal convolution: a loop over taps, and sequences that are cut or packed."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.causal_conv1d import api, causal_conv1d

B, T, C, K = 2, 11, 3, 4
_conv = jax.jit(causal_conv1d, static_argnames=("activation", "implementation"))


def _inputs(T=T, K=K, seed=0):
    """x, weight, bias and the inputs before x, in float64 NumPy."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, C), (K, C), (C,), (B, K - 1, C)
    return [rng.normal(size=shape) for shape in shapes]


def _segments():
    """Segments shorter and longer than the taps, then padding."""
    return np.stack(
        [np.repeat([4, 1, 4, 0], [1, 2, 6, 2]), np.repeat([1, 2], [5, T - 5])]
    )


def _by_hand(x, weight, bias, before, segment_ids=None):
    """One token at a time; each tap walks back until its segment begins."""
    y, K = np.zeros_like(x), len(weight)
    padded = np.concatenate([before, x], axis=1)
    for row, t in np.ndindex(x.shape[:2]):
        y[row, t] = bias
        for back in range(K):
            y[row, t] += weight[K - 1 - back] * padded[row, t + K - 1 - back]
            here = t - back
            if segment_ids is not None and here > 0:
                ids = segment_ids[row]
                if ids[here] not in (0, ids[here - 1]):
                    break
    return y


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_is_the_sum_over_taps(K, packed):
    x, weight, bias, before = _inputs(K=K)
    segment_ids = _segments() if packed else None
    want = _by_hand(x, weight, bias, before, segment_ids)
    with jax.enable_x64(True):
        y, _ = _conv(x, weight, bias, initial_state=before, segment_ids=segment_ids)
        np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-12)


def test_silu_follows_the_bias():
    x, weight, bias, before = _inputs()
    want = _by_hand(x, weight, bias, before)
    y, _ = _conv(
        *(jnp.asarray(z, jnp.float32) for z in (x, weight, bias)),
        initial_state=jnp.asarray(before, jnp.float32),
        activation="silu",
    )
    np.testing.assert_allclose(y, want / (1 + np.exp(-want)), rtol=1e-5, atol=1e-5)


def test_gradients_are_the_slopes():
    lengths, segment_ids = jnp.array([T, 3]), jnp.asarray(_segments())

    @jax.jit
    def run(x, weight, bias, before):
        return causal_conv1d(
            x,
            weight,
            bias,
            initial_state=before,
            lengths=lengths,
            segment_ids=segment_ids,
            activation="silu",
        )

    with jax.enable_x64(True):
        args = [jnp.asarray(z) for z in _inputs()]
        check_grads(run, args, order=1, modes=["rev"], rtol=1e-7, atol=1e-7)


def test_no_state_and_no_bias_are_zeros():
    x, weight, bias, before = (jnp.asarray(z, jnp.float32) for z in _inputs())
    want = _conv(x, weight, 0 * bias, initial_state=0 * before)
    jax.tree.map(np.testing.assert_array_equal, _conv(x, weight), want)


@pytest.mark.parametrize("lengths", [(5, 5), (0, 7), (1, 2)])
def test_a_cut_sequence_goes_on_from_its_state(lengths):
    # Each row is cut after its own length; what stands behind the cut is garbage.
    x, weight, bias, before = _inputs()
    segment_ids = _segments()
    segment_ids[:, :8] = 1
    with jax.enable_x64(True):
        whole, end = _conv(
            x, weight, bias, initial_state=before, segment_ids=segment_ids
        )
        y, state = _conv(
            x, weight, bias, initial_state=before, lengths=np.array(lengths)
        )
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(y[row, :length], whole[row, :length])
            tail, tail_end = _conv(
                x[row : row + 1, length:],
                weight,
                bias,
                initial_state=state[row : row + 1],
                segment_ids=segment_ids[row : row + 1, length:],
            )
            np.testing.assert_allclose(tail[0], whole[row, length:], atol=1e-12)
            np.testing.assert_allclose(tail_end[0], end[row], atol=1e-12)


def test_state_is_the_last_inputs_of_the_segment_in_progress():
    x = np.arange(1.0, 7.0).reshape(2, 3, 1)
    segment_ids = np.array([[1, 1, 2], [3, 3, 0]])
    weight = np.zeros((4, 1))
    before = -np.ones((2, 3, 1))
    run = functools.partial(_conv, x, weight, initial_state=before)
    _, state = run()
    np.testing.assert_array_equal(state[..., 0], [[1, 2, 3], [4, 5, 6]])
    _, state = run(lengths=np.array([0, 2]))
    np.testing.assert_array_equal(state[..., 0], [[-1, -1, -1], [-1, 4, 5]])
    _, state = run(segment_ids=segment_ids)
    np.testing.assert_array_equal(state[..., 0], [[0, 0, 3], [4, 5, 6]])
    _, state = run(lengths=np.array([2, 2]), segment_ids=segment_ids)
    np.testing.assert_array_equal(state[..., 0], [[-1, 1, 2], [-1, 4, 5]])


def test_packed_is_separate():
    x, weight, bias, _ = _inputs()
    lengths = (1, 2, 5, 3)
    segment_ids = np.repeat([[2, 1, 2, 8]], lengths, axis=1) * np.ones((B, 1), int)
    with jax.enable_x64(True):
        y, state = _conv(x, weight, bias, segment_ids=segment_ids)
        for stop, length in zip(np.cumsum(lengths), lengths, strict=True):
            alone, end = _conv(x[:, stop - length : stop], weight, bias)
            np.testing.assert_allclose(y[:, stop - length : stop], alone, atol=1e-12)
        np.testing.assert_allclose(state, end)


def test_bfloat16_only_rounds_inputs_and_outputs():
    x, weight, bias, before = _inputs()
    x, before = (jnp.asarray(z, jnp.bfloat16) for z in (x, before))
    exact = [np.asarray(z).astype(np.float64) for z in (x, before)]
    want = _by_hand(exact[0], weight, bias, exact[1])
    weight, bias = (jnp.asarray(z, jnp.float32) for z in (weight, bias))
    y, state = _conv(x, weight, bias, initial_state=before)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(y, np.float32), want, rtol=2**-8, atol=1e-3)


def test_a_named_implementation_is_never_replaced(monkeypatch):
    def refuse(*args):
        raise NotImplementedError("not these arguments")

    monkeypatch.setattr(api.xla, "causal_conv1d", refuse)
    x, weight, *_ = (jnp.asarray(z, jnp.float32) for z in _inputs())
    with pytest.raises(NotImplementedError, match="not these arguments"):
        causal_conv1d(x, weight, implementation="xla")


@pytest.fixture
def unchecked():
    """Switches the shape checks of the tests off, as they are in production."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight": jnp.ones((4, 2))}, r"weight \(4, 2\) must be \(4, 3\)"),
        ({"bias": jnp.ones(2)}, r"bias \(2,\) must be \(3,\)"),
        (
            {"initial_state": jnp.ones((2, 4, 3))},
            r"state \(2, 4, 3\) must be \(2, 3, 3",
        ),
        ({"lengths": jnp.ones(3, int)}, r"lengths \(3,\) must be \(2,\)"),
        ({"segment_ids": jnp.ones((2, 3), int)}, r"ids \(2, 3\) must be \(2, 11\)"),
        ({"activation": "relu"}, "activation='relu' must be \"silu\" or None"),
        ({"implementation": "fft"}, "implementation='fft' is not one of"),
    ],
)
def test_wrong_arguments_are_named(unchecked, changes, message):
    x = jnp.ones((B, T, C))
    with pytest.raises(ValueError, match=message):
        causal_conv1d(x, **({"weight": jnp.ones((K, C))} | changes))
