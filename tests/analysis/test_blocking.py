"""Cutting vision off: who sees none of it, and what is left as it is."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from timeviper_jax.analysis.blocking import Cuts, run_cut
from timeviper_jax.analysis.intermediates import layer_inputs
from timeviper_jax.llm.stream import Stream, take
from timeviper_jax.llm.transv import Stage

SAMPLE = "tt" + "v" * 6 + "qqqaa"
NEVER = 99
FLOAT32 = dict(rtol=1e-5, atol=1e-5)
_run = tiny.quick_jit(run_cut)
_forward = tiny.quick_jit(lambda llm, stream: llm(stream))


@functools.cache
def model(transfer: bool = False):
    stages = (Stage(layer=2, keep=0.5),) if transfer else ()
    return tiny.build_lm(transv=stages)


def stream(seen: float = 0.0) -> Stream:
    """The sample, its vision tokens moved by `seen`; one is padded."""
    found = tiny.stream([SAMPLE, "ttvvvvqa"], text=8, vision=6)
    moved = found.x + seen * jnp.sin(jnp.arange(found.x.shape[-1]))
    x = jnp.where(found.is_vision[..., None], moved, found.x)
    return Stream(**{**vars(found), "x": x})


def run(roles: str, layer: int = 0, *, seen=0.0, dropped_at=NEVER, transfer=False):
    """Hidden states by where tokens stood at first, `roles` blocked from `layer` on."""
    given = stream(seen)
    receivers = np.isin(given.roles, [tiny.ROLES[role] for role in roles])
    cuts = Cuts(
        receivers=jnp.asarray(receivers),
        blocked_from=jnp.asarray(layer),
        dropped_at=jnp.asarray(dropped_at),
    )
    out = _run(model(transfer), given, cuts)
    hidden = np.zeros(given.x.shape)
    for b, (x, at) in enumerate(zip(out.x, out.positions, strict=True)):
        hidden[b, at[at >= 0]] = x[at >= 0]
    return hidden


INSTRUCTION, ANSWER = slice(8, 11), slice(11, 13)  # Of the first row.


def moved(here: slice, *args, **kwargs) -> bool:
    """Whether what the tokens `here` hold depends on what vision tokens hold."""
    plain, other = (run(*args, seen=seen, **kwargs)[0, here] for seen in (0.0, 1.0))
    return not np.allclose(plain, other, **FLOAT32)


@pytest.mark.parametrize("transfer", [False, True])
def test_nothing_cut_is_the_model_itself(transfer):
    expected = _forward(model(transfer), stream())
    hidden = run("", transfer=transfer)
    found = np.stack([h[p] for h, p in zip(hidden, expected.positions, strict=True)])
    real = np.asarray(expected.positions) >= 0
    np.testing.assert_allclose(found[real], expected.hidden[real], **FLOAT32)


@pytest.mark.parametrize("transfer", [False, True])
def test_who_is_blocked_from_the_first_layer_knows_nothing_of_vision(transfer):
    assert moved(INSTRUCTION, "", transfer=transfer)
    assert moved(ANSWER, "", transfer=transfer)
    assert not moved(INSTRUCTION, "qa", transfer=transfer)
    assert not moved(ANSWER, "qa", transfer=transfer)
    # The answer of an instruction that is blind sees for itself, and the other way.
    assert not moved(INSTRUCTION, "q", transfer=transfer)
    assert moved(ANSWER, "q", transfer=transfer)
    assert moved(ANSWER, "a", transfer=transfer)


def test_who_is_blocked_later_knows_what_earlier_layers_brought():
    assert moved(INSTRUCTION, "qa", 1)
    assert moved(ANSWER, "qa", 3)
    # Layer 0 alone differs from nothing cut, and so does layer 3.
    nothing, late, early = run(""), run("qa", 3), run("qa", 0)
    assert np.abs(late - nothing).max() > 1e-3
    assert np.abs(late - early).max() > 1e-3


def test_all_others_are_as_ever():
    plain, blocked = run(""), run("a")
    np.testing.assert_allclose(blocked[0, :11], plain[0, :11], **FLOAT32)
    assert np.abs(blocked[0, ANSWER] - plain[0, ANSWER]).max() > 1e-3


def test_a_blocked_token_reads_a_state_that_vision_never_touched():
    """By the definition, in float64: vision neither writes nor lets decay."""
    only, given = tiny.build_lm(pattern="M"), stream()
    mixers = only.mamba.mixer
    for conv in (mixers.conv_x, mixers.conv_b, mixers.conv_c):
        # Each token by itself: what the convolution hides is another test's.
        conv.kernel[...] = conv.kernel[...].at[:, :-1].set(0)
    block = only.block("mamba", 0)
    inputs = layer_inputs(only, 0, given)
    b, c, dt, a, x = (
        np.asarray(z, np.float64)
        for z in (inputs.b[0], inputs.c[0], inputs.dt[0], inputs.a, inputs.x[0])
    )
    text = [i for i, role in enumerate(SAMPLE) if role != "v"]
    y = np.zeros((len(SAMPLE), *x.shape[1:]))
    for n in range(len(a)):
        g = n // (len(a) // b.shape[1])
        state = np.zeros((x.shape[2], b.shape[2]))
        for i in text:
            state = np.exp(dt[i, n] * a[n]) * state
            state += dt[i, n] * np.outer(x[i, n], b[i, g])
            y[i, n] = state @ c[i, g] + float(inputs.d[n]) * x[i, n]
    z = block.mixer.in_z(block.norm(given.x))[:1, : len(SAMPLE)]
    y = jnp.asarray(y.reshape(1, len(SAMPLE), -1), jnp.float32)
    mixed = block.mixer.out(block.mixer.norm(y, z))
    expected = only.norm(given.x[:1, : len(SAMPLE)] + mixed)
    receivers = (given.roles >= 3) & (given.roles <= 4)
    none = jnp.asarray(NEVER)
    cuts = Cuts(receivers=receivers, blocked_from=none * 0, dropped_at=none)
    found = _run(only, given, cuts)
    np.testing.assert_allclose(found.x[0, 8:13], expected[0, 8:13], **FLOAT32)


@pytest.mark.parametrize("layer", [0, 3])
def test_dropping_at_a_layer_is_a_stage_that_keeps_nothing(layer):
    stages = (Stage(layer=layer, keep=0.0, transfer=False),)
    given = stream()
    expected = _forward(tiny.build_lm(transv=stages), given)
    found = run("", dropped_at=layer)
    at = jnp.maximum(expected.positions, 0)
    real = np.asarray(expected.positions) >= 0
    found = np.asarray(take(jnp.asarray(found, jnp.float32), at))
    np.testing.assert_allclose(found[real], expected.hidden[real], **FLOAT32)


def test_what_left_is_not_transferred_later():
    found = run("", dropped_at=0, transfer=True)
    assert np.isfinite(found).all()
    assert not moved(slice(8, 13), "", dropped_at=0, transfer=True)
    assert moved(slice(8, 13), "", dropped_at=3, transfer=True)
