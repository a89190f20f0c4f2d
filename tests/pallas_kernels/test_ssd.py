"""The SSD op: every implementation computes the recurrence, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.ssd import api, ssd, ssd_step

IMPLEMENTATIONS = ("scan", "associative_scan", "reference")
CHUNKED = ("scan", "associative_scan")
B, N, P, S = 2, 4, 3, 5
CHUNK = 8
ARGUMENTS = ("x", "dt", "a", "b", "c", "d", "initial_state")


def _inputs(T, G=2, seed=0):
    """The arguments of `ssd` by name, in float64 NumPy."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(B, T, N, P)),
        "dt": rng.exponential(0.5, size=(B, T, N)),
        "a": -rng.uniform(0.2, 2, size=N),
        "b": rng.normal(size=(B, T, G, S)),
        "c": rng.normal(size=(B, T, G, S)),
        "d": rng.normal(size=N),
        "initial_state": rng.normal(size=(B, N, P, S)),
    }


def _part(inputs, start, stop, **changes):
    """The same arguments for tokens start to stop."""
    cut = {name: inputs[name][:, start:stop] for name in ("x", "dt", "b", "c")}
    return inputs | cut | changes


def _segments(T):
    """Segments that end in mid-chunk, at a chunk's edge, after one token; padding."""
    first = np.repeat([1, 2, 3, 4, 0], [3, 1, CHUNK - 4, 7, T])[:T]
    second = np.repeat([7, 3, 7], [CHUNK + 2, 2, T])[:T]
    return np.stack([first, second])


@functools.partial(jax.jit, static_argnames="implementation")
def _run(inputs, segment_ids=None, implementation="scan"):
    return ssd(
        *(inputs[name] for name in ARGUMENTS[:5]),
        d=inputs["d"],
        initial_state=inputs["initial_state"],
        segment_ids=segment_ids,
        chunk_size=CHUNK,
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnames="implementation")
def _run_with_gradients(inputs, cotangents, segment_ids=None, implementation="scan"):
    """Outputs and final state, and the gradient of every argument from both."""
    run = lambda inputs: _run(inputs, segment_ids, implementation)
    outputs, pull = jax.vjp(run, inputs)
    return outputs, pull(cotangents)[0]


def _in_float64(inputs, cotangents, segment_ids=None, implementation="reference"):
    with jax.enable_x64(True):
        out = _run_with_gradients(inputs, cotangents, segment_ids, implementation)
        return jax.tree.map(np.asarray, out)


def _cotangents(T, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, T, N, P)), rng.normal(size=(B, N, P, S))


def _float32(tree):
    return jax.tree.map(lambda z: jnp.asarray(z, jnp.float32), tree)


def _assert_close(got, want, tolerance):
    """Compares trees; the tolerance is relative to each array's largest element."""

    def check(path, g, w):
        g, w = (np.asarray(z).astype(np.float64) for z in (g, w))
        scale = np.abs(w).max() + 1e-30
        error = np.abs(g - w).max() / scale
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"

    jax.tree_util.tree_map_with_path(check, got, want)


def _by_hand(x, dt, a, b, c, d, initial_state, segment_ids):
    """The recurrence of the paper, one head of one token at a time."""
    heads_per_group = N // b.shape[2]
    y, last = np.zeros_like(x), np.zeros_like(initial_state)
    for row, n in np.ndindex(B, N):
        state, g = initial_state[row, n], n // heads_per_group
        for t in range(x.shape[1]):
            new = t > 0 and segment_ids[row, t] not in (0, segment_ids[row, t - 1])
            state = state * (0 if new else np.exp(a[n] * dt[row, t, n]))
            state = state + dt[row, t, n] * np.outer(x[row, t, n], b[row, t, g])
            y[row, t, n] = state @ c[row, t, g] + d[n] * x[row, t, n]
        last[row, n] = state
    return y, last


def test_reference_is_the_recurrence_of_the_paper():
    inputs, segment_ids = _inputs(19), _segments(19)
    want = _by_hand(**inputs, segment_ids=segment_ids)
    with jax.enable_x64(True):
        got = _run(inputs, segment_ids, "reference")
    _assert_close(got, want, 1e-12)


# One token, whole chunks, a ragged tail; one group, a few, one per head.
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("T, G", [(1, 2), (2 * CHUNK, 4), (21, 1)])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_values_and_gradients_are_the_references(implementation, T, G, packed):
    inputs, cotangents = _inputs(T, G), _cotangents(T)
    segment_ids = _segments(T) if packed else None
    want = _in_float64(inputs, cotangents, segment_ids)
    got = _in_float64(inputs, cotangents, segment_ids, implementation)
    _assert_close(got, want, 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_is_close_to_float64(implementation):
    inputs, cotangents, segment_ids = _inputs(21), _cotangents(21), _segments(21)
    want = _in_float64(inputs, cotangents, segment_ids)
    got = _run_with_gradients(
        *_float32((inputs, cotangents)), segment_ids, implementation
    )
    _assert_close(got, want, 5e-6)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_strong_decay_neither_overflows_nor_loses_the_gradient(implementation):
    # Every other token all but empties the state: e^-400 a token, e^-1600 a chunk.
    inputs, cotangents = _inputs(21), _cotangents(21)
    inputs["a"][:] = -100
    inputs["dt"] = np.where(np.arange(21)[:, None] % 2, 4, 1e-3) * (inputs["dt"] + 0.5)
    want = _in_float64(inputs, cotangents)
    got = _run_with_gradients(*_float32((inputs, cotangents)), None, implementation)
    # The running sum reaches 2,000, where float32 is exact to 1e-4.
    _assert_close(got, want, 1e-3)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_gradient_where_dt_is_zero(implementation):
    # Without decay the exponents tie at zero, where a clipped one has half a slope.
    inputs, cotangents = _inputs(21), _cotangents(21)
    inputs["dt"][:, 2:9] = 0
    want = _in_float64(inputs, cotangents)
    got = _in_float64(inputs, cotangents, None, implementation)
    _assert_close(got, want, 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_with_zero_dt_changes_nothing(implementation):
    inputs, valid = _inputs(21), 13
    padded = inputs | {"dt": np.where(np.arange(21)[:, None] < valid, inputs["dt"], 0)}
    padding = np.repeat([[1, 0]], [valid, 21 - valid], axis=1) * np.ones((B, 1), int)
    with jax.enable_x64(True):
        y, state = _run(_part(inputs, 0, valid), None, "reference")
        for segment_ids in (None, padding):
            got_y, got_state = _run(padded, segment_ids, implementation)
            _assert_close((got_y[:, :valid], got_state), (y, state), 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_is_separate(implementation):
    inputs, lengths = _inputs(21), (3, 1, 4, 11, 2)
    segment_ids = np.repeat([[5, 2, 9, 1, 2]], lengths, axis=1) * np.ones((B, 1), int)
    zeros = np.zeros_like(inputs["initial_state"])
    with jax.enable_x64(True):
        y, state = _run(inputs, segment_ids, implementation)
        before = inputs["initial_state"]
        for stop, length in zip(np.cumsum(lengths), lengths, strict=True):
            part = _part(inputs, stop - length, stop, initial_state=before)
            want_y, want_state = _run(part, None, "reference")
            _assert_close(y[:, stop - length : stop], want_y, 1e-12)
            before = zeros
        _assert_close(state, want_state, 1e-12)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_a_cut_sequence_goes_on_from_its_state(implementation):
    inputs, segment_ids, cut = _inputs(21), _segments(21), 11  # In mid-segment.
    with jax.enable_x64(True):
        whole = _run(inputs, segment_ids, "reference")
        head, state = _run(_part(inputs, 0, cut), segment_ids[:, :cut], implementation)
        tail, state = _run(
            _part(inputs, cut, 21, initial_state=state),
            segment_ids[:, cut:],
            implementation,
        )
        _assert_close((np.concatenate([head, tail], 1), state), whole, 1e-12)


def test_steps_are_the_sequence():
    inputs = _inputs(5)
    with jax.enable_x64(True):
        y, state = _run(inputs, None, "reference")
        step, stepped = jax.jit(ssd_step), inputs["initial_state"]
        for t in range(5):
            x, dt, b, c = (inputs[name][:, t] for name in ("x", "dt", "b", "c"))
            y_t, stepped = step(x, dt, inputs["a"], b, c, stepped, d=inputs["d"])
            _assert_close(y_t, y[:, t], 1e-12)
        _assert_close(stepped, state, 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_only_rounds_inputs_and_outputs(implementation):
    inputs = _inputs(21)
    rounded = inputs | {
        name: jnp.asarray(inputs[name], jnp.bfloat16) for name in ("x", "b", "c")
    }
    exact = jax.tree.map(lambda z: np.asarray(z).astype(np.float64), rounded)
    with jax.enable_x64(True):
        want_y, want_state = _run(exact, None, "reference")
    others = _float32({k: v for k, v in inputs.items() if k not in ("x", "b", "c")})
    y, state = _run(rounded | others, None, implementation)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    _assert_close(y, want_y, 2**-8)
    _assert_close(state, want_state, 5e-6)


def test_a_state_of_zeros_and_no_skip_are_the_default():
    inputs = _float32(_inputs(9))
    inputs["d"], inputs["initial_state"] = (
        jnp.zeros_like(inputs[name]) for name in ("d", "initial_state")
    )
    want = _run(inputs)
    got = jax.jit(functools.partial(ssd, chunk_size=CHUNK))(
        *(inputs[name] for name in ARGUMENTS[:5])
    )
    _assert_close(got, want, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_named_implementation_is_never_replaced(implementation, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("not these arguments")

    monkeypatch.setattr(getattr(api, implementation), "ssd", refuse)
    inputs = _float32(_inputs(3))
    args = [inputs[name] for name in ARGUMENTS[:5]]
    with pytest.raises(NotImplementedError, match="not these arguments"):
        ssd(*args, implementation=implementation)
    other = IMPLEMENTATIONS[IMPLEMENTATIONS.index(implementation) - 1]
    ssd(*args, implementation=other)


@pytest.fixture
def unchecked():
    """Switches the shape checks of the tests off, as they are in production."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"b": (B, 8, 3, S), "c": (B, 8, 3, S)}, "4 heads do not divide into 3 groups"),
        ({"c": (B, 8, 2, S + 1)}, r"c \(2, 8, 2, 6\) must be \(2, 8, 2, 5\)"),
        ({"b": (B, 7, 2, S)}, r"b \(2, 7, 2, 5\) must be \(2, 8, 2, 5\)"),
        ({"dt": (B, 8, 1)}, r"dt \(2, 8, 1\) must be \(2, 8, 4\)"),
        ({"a": (1,)}, r"a \(1,\) must be \(4,\)"),
        ({"d": (1,)}, r"d \(1,\) must be \(4,\)"),
        ({"initial_state": (B, N, S, P)}, r"state \(2, 4, 5, 3\) must be"),
        ({"segment_ids": (B, 7)}, r"segment_ids \(2, 7\) must be \(2, 8\)"),
    ],
)
def test_wrong_shapes_are_named(unchecked, changes, message):
    arrays = _float32(_inputs(8)) | {"segment_ids": jnp.ones((B, 8), int)}
    arrays |= {
        name: jnp.ones(shape, arrays[name].dtype) for name, shape in changes.items()
    }
    args = [arrays.pop(name) for name in ARGUMENTS[:5]]
    with pytest.raises(ValueError, match=message):
        ssd(*args, **arrays)


def test_wrong_options_are_named(unchecked):
    inputs = _float32(_inputs(8))
    args = [inputs[name] for name in ARGUMENTS[:5]]
    with pytest.raises(ValueError, match="'fastest' is not one of"):
        ssd(*args, implementation="fastest")
    with pytest.raises(ValueError, match="chunk_size=0"):
        ssd(*args, chunk_size=0)
