"""The hybrid stack: as recorded, causal, packed, padded, cached, rolled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
import tiny
from flax import nnx
from golden_cases import load, under

from timeviper_jax.data.examples import Role
from timeviper_jax.layers.layout import Layout
from timeviper_jax.llm.hybrid import HybridLM
from timeviper_jax.llm.stream import make_stream
from timeviper_jax.llm.transv import Dropped, Stage

# Recorded in float32 by other arithmetic; 1.1e-5 was reached.
RECORDED = dict(atol=2e-5, rtol=0)
FLOAT32 = dict(atol=1e-5, rtol=1e-5)

# The recorded cases.


def _text(x, segment_ids, samples):
    roles = jnp.full(x.shape[:2], Role.TEXT, jnp.int32)
    return make_stream(x, roles, segment_ids, num_segments=samples, vision_capacity=0)


def _loss(lm, inputs, segment_ids, labels, samples):
    """The release's loss: a token predicts the next label, and -100 is none."""
    x = lm.embed(inputs) if inputs.ndim == 2 else inputs
    output = lm(_text(x, segment_ids, samples), record=True)
    logits = lm.logits(output.hidden)
    targets = labels[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], jnp.maximum(targets, 0)
    )
    loss = jnp.mean(losses, where=targets >= 0)
    return loss, (loss, logits, output)


@pytest.mark.parametrize(
    "case, samples",
    [
        ("nano_plain_g2", 1),
        ("nano_plain_g1_chunk16", 1),
        ("nano_plain_headdim24", 1),
        ("nano_packed_nopdrop", 3),
        ("qwen2_plain", 1),
    ],
)
def test_recorded_forward_and_gradients(case, samples):
    description, arrays = load(case)
    cfg = recorded.config_from_json(description["config"])
    lm = recorded.language_model(cfg, under("param.", arrays))
    labels = arrays["in.labels"].astype(np.int32)
    if samples > 1:
        inputs, segment_ids = arrays["in.inputs_embeds"], arrays["in.seq_idx"] + 1
    else:
        inputs, segment_ids = arrays["in.input_ids"].astype(np.int32), labels * 0 + 1
    run = tiny.gradient(functools.partial(_loss, samples=samples))
    grads, (loss, logits, output) = tiny.quick_jit(run)(
        lm, jnp.asarray(inputs), jnp.asarray(segment_ids), labels
    )
    np.testing.assert_allclose(loss, arrays["out.loss"], **RECORDED)
    np.testing.assert_allclose(logits, arrays["out.logits"], **RECORDED)
    hidden = [array for _, array in sorted(under("out.hidden.", arrays).items())]
    np.testing.assert_allclose(output.hidden, hidden.pop(), **RECORDED)
    blocks = len(output.layers) // len(hidden)  # Of ours in one of theirs.
    after = [*hidden[1:], None]
    for i, (want, end) in enumerate(zip(hidden, after, strict=True)):
        mine = output.layers[i * blocks :][:blocks]
        np.testing.assert_allclose(mine[0][0], want, **RECORDED)
        if end is not None:
            mixed = sum(mixed for _, mixed in mine)
            np.testing.assert_allclose(mixed, end - want, **RECORDED)
    recorded.assert_close_in_scale(grads, recorded.gradients(cfg, arrays))


def test_recorded_modules_alone():
    description, arrays = load("nano_mixer_modules")
    cfg = recorded.config_from_json(description["config"])
    lm = recorded.language_model(cfg, under("param.", arrays))

    def run(lm, u, y, gate, text, dropped):
        layout = Layout(segment_ids=jnp.ones(u.shape[:2], jnp.int32))
        mamba, mlp, attention = (lm.block(k, 0) for k in ("mamba", "mlp", "attention"))
        transfer, (ids, gone) = (
            lm.transv[0],
            (jnp.ones(z.shape[:2], jnp.int32) for z in (text, dropped)),
        )
        read = transfer(text, ids, Dropped(x=dropped, segment_ids=gone)) - text
        return {
            "mamba_mixer": mamba.mixer(u, layout)[0],
            "mlp": mlp.mixer(u),
            "attention": attention.mixer(u, layout)[0],
            "gated_norm": mamba.mixer.norm(y, gate),
            "rmsnorm": mamba.norm(u),
            "cross_attention": read / jnp.tanh(transfer.alpha[...]),
        }

    names = ("u", "y", "gate", "text", "dropped")
    got = tiny.quick_jit(run)(lm, *(jnp.asarray(arrays[f"in.{n}"]) for n in names))
    for name, want in under("out.", arrays).items():
        np.testing.assert_allclose(got[name], want, **RECORDED, err_msg=name)


# Who sees whom.


def _forward(lm, stream):
    return lm(stream).hidden


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_token_sees_a_later_one(family):
    lm = tiny.build_lm(tiny.FAMILIES[family])
    stream = tiny.stream(["t" * 12] * 13, text=12)
    changed = stream.x.at[jnp.arange(12), jnp.arange(12)].add(1.0)
    hidden = tiny.quick_jit(_forward)(lm, dataclasses.replace(stream, x=changed))
    moved = jnp.max(jnp.abs(hidden[:12] - hidden[12]), axis=-1)
    before = jnp.tril(jnp.ones((12, 12), bool), -1)  # Row b was changed at b.
    assert jnp.max(moved, where=before, initial=0) < 1e-6
    assert jnp.min(moved, where=~before, initial=1) > 1e-3


SAMPLES = ["ttttt", "ttttttttt", "tqa"]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def separate(request):
    """The model, its compiled pass, and what it makes of each sample in its own row."""
    lm = tiny.build_lm(tiny.FAMILIES[request.param], log_base=8.0)
    run = tiny.quick_jit(_forward)
    return lm, run, run(lm, tiny.stream(SAMPLES, text=20))


def _assert_rows_are(hidden, want, rows=(0, 1, 2)):
    for row, i in enumerate(rows):
        length = len(SAMPLES[i])
        np.testing.assert_allclose(hidden[row, :length], want[i, :length], **FLOAT32)


def test_packed_samples_are_as_in_rows_of_their_own(separate):
    lm, run, want = separate
    packed = run(lm, tiny.stream(["|".join(SAMPLES)], text=20, samples=4))
    starts = np.cumsum([0, *map(len, SAMPLES)])
    apart = [packed[0, a:b] for a, b in zip(starts, starts[1:], strict=False)]
    for got, i in zip(apart, range(3), strict=True):
        np.testing.assert_allclose(got, want[i, : len(got)], **FLOAT32)


def test_rows_and_their_padding_do_not_mix(separate):
    lm, run, want = separate
    stream = tiny.stream([SAMPLES[2], SAMPLES[0], "tttqqqaaa"], text=20)
    noise = 100 * jax.random.normal(jax.random.key(0), stream.x.shape)
    padding = (stream.segment_ids == 0)[..., None]
    stream = dataclasses.replace(stream, x=jnp.where(padding, noise, stream.x))
    _assert_rows_are(run(lm, stream), want, rows=(2, 0))


def test_a_row_alone_with_more_padding_is_the_same(separate):
    lm, run, want = separate
    _assert_rows_are(run(lm, tiny.stream(SAMPLES[1:2], text=29)), want, rows=(1,))


# Caches.

CACHED = {"hybrid": "M*-M*M", "plain": "*-**-*"}
SPAN = (1, 6)  # Starts where the first stack has one layer behind it.
LENGTHS = jnp.array([12, 7])


def _layout(valid):
    return Layout(segment_ids=valid.astype(jnp.int32))


def _whole(lm, x):
    valid = jnp.arange(x.shape[1]) < LENGTHS[:, None]
    return lm.run(x, _layout(valid), SPAN)[0]


def _cut(lm, x, cut):
    """Both parts padded to the whole's length, so that one program does every cut."""
    T = x.shape[1]
    index, cache = jnp.arange(T), lm.init_cache(SPAN, 2, 2 * T)
    valid = (index < cut) & (index < LENGTHS[:, None])
    first, cache, _ = lm.run(x, _layout(valid), SPAN, cache)
    valid = index + cut < LENGTHS[:, None]
    second, _, _ = lm.run(jnp.roll(x, -cut, axis=1), _layout(valid), SPAN, cache)
    return jnp.where((index < cut)[:, None], first, jnp.roll(second, cut, axis=1))


def _token_by_token(lm, x):
    def step(cache, token):
        t, x = token
        valid = t < LENGTHS[:, None]
        y, cache, _ = lm.run(x[:, None], _layout(valid), SPAN, cache)
        return cache, y[:, 0]

    T = x.shape[1]
    steps = (jnp.arange(T), jnp.moveaxis(x, 1, 0))
    _, y = jax.lax.scan(step, lm.init_cache(SPAN, 2, T), steps)
    return jnp.moveaxis(y, 0, 1)


@pytest.mark.parametrize(
    "family, rolled", [("hybrid", False), ("hybrid", True), ("plain", True)]
)
def test_a_cache_continues_ragged_rows_from_any_cut(family, rolled):
    cfg = dataclasses.replace(tiny.FAMILIES[family], pattern=CACHED[family])
    lm = tiny.build_lm(cfg, log_base=8.0, rolled=rolled)
    x = tiny.stream(["t" * 12, "t" * 11 + "q"], text=12).x

    def run(lm, x):
        every_cut = jax.vmap(lambda cut: _cut(lm, x, cut))(jnp.arange(13))
        return _whole(lm, x), every_cut, _token_by_token(lm, x)

    whole, every_cut, by_token = tiny.quick_jit(run)(lm, x)
    for row, length in enumerate(LENGTHS):
        want = whole[row, :length]
        np.testing.assert_allclose(by_token[row, :length], want, **FLOAT32)
        for got in every_cut[:, row, :length]:
            np.testing.assert_allclose(got, want, **FLOAT32)


@pytest.mark.parametrize(
    "case",
    [
        "nano_plain_g2",
        "qwen2_plain",
        pytest.param("nano_plain_g1_chunk16", marks=pytest.mark.slow),
        pytest.param("nano_plain_headdim24", marks=pytest.mark.slow),
    ],
)
def test_recorded_states_and_greedy_tokens(case):
    description, arrays = load(case)
    cfg = recorded.config_from_json(description["config"])
    cfg = dataclasses.replace(cfg, rolled=True)
    lm = recorded.language_model(cfg, under("param.", arrays))
    length = description["decode_prompt_len"]
    prompt = jnp.asarray(arrays["in.input_ids"][:, :length], jnp.int32)

    def call(lm, tokens, caches):
        hidden, caches = lm.extend(lm.embed(tokens), tokens * 0 + 1, caches)
        return lm.logits(hidden[:, -1:])[:, 0], caches

    def generate(lm, prompt):
        def step(carry, _):
            logits, caches = carry
            token = jnp.argmax(logits, axis=-1)
            return call(lm, token[:, None], caches), (token[0], logits[0])

        first = call(lm, prompt, lm.init_caches(1, length + 16))
        return first[1], jax.lax.scan(step, first, length=16)[1]

    (cache,), (tokens, logits) = tiny.quick_jit(generate)(lm, prompt)
    np.testing.assert_array_equal(tokens, arrays["out.decode.tokens"])
    np.testing.assert_allclose(logits, arrays["out.decode.logits"], **RECORDED)
    conv = jnp.concatenate(
        [cache.mamba.conv_x, cache.mamba.conv_b, cache.mamba.conv_c], axis=-1
    )
    layers = [i for i, kind in enumerate(lm.cfg.pattern) if kind == "M"]
    for index, layer in enumerate(layers):
        state = arrays[f"out.prefill.ssm_state.{layer}"]
        np.testing.assert_allclose(cache.mamba.state[index], state, **RECORDED)
        window = arrays[f"out.prefill.conv_state.{layer}"][:, :, 1:]  # Theirs holds 4.
        np.testing.assert_allclose(conv[index].mT, window, **RECORDED)


# One stack of parameters, several ways to run it.


@pytest.fixture(scope="module")
def run_as():
    """Hidden states and gradients of a tiny model, whichever way its layers run."""
    stream = tiny.stream(["ttttttqqaa", "tqqqaa"], text=10)

    def loss(lm):
        hidden = lm(stream).hidden
        return jnp.sum(jnp.sin(hidden)), hidden

    def run(**changes):
        lm = tiny.build_lm(**changes)
        return tiny.quick_jit(tiny.gradient(loss))(lm)

    return functools.cache(lambda **changes: run(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        dict(rolled=True, remat=True),
        dict(rolled=True, remat=True, remat_keeps="matmuls"),
        dict(remat=True),
    ],
)
def test_layers_run_rolled_or_recomputed_to_the_same_end(run_as, changes):
    grads, hidden = run_as(**changes)
    want, want_hidden = run_as()
    np.testing.assert_allclose(hidden, want_hidden, **FLOAT32)
    recorded.assert_close_in_scale(grads, want)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(grads["mlp"]))


def test_layers_between_stages_run_rolled():
    stream = tiny.stream(["tvvvvvvqqa", "vvvqqqaa"], text=6, vision=6)
    stages = (Stage(layer=1, keep=0.5), Stage(layer=2, keep=0.25, select="attention"))
    got, want = (
        tiny.quick_jit(_forward)(tiny.build_lm(transv=stages, rolled=rolled), stream)
        for rolled in (True, False)
    )
    np.testing.assert_allclose(got, want, **FLOAT32)


def test_a_plain_transformer_runs_rolled():
    stream = tiny.stream(["ttttttqqaa", "tqqqaa"], text=10)
    got, want = (
        tiny.quick_jit(_forward)(tiny.build_lm(tiny.QWEN, rolled=rolled), stream)
        for rolled in (True, False)
    )
    np.testing.assert_allclose(got, want, **FLOAT32)


def test_bfloat16_stays_close_to_float32():
    stream = tiny.stream(["ttttttqqaa"], text=10)
    half = dataclasses.replace(stream, x=stream.x.astype(jnp.bfloat16))
    run = tiny.quick_jit(_forward)
    want = run(tiny.build_lm(), stream)
    got = run(tiny.build_lm(dtype="bfloat16"), half)
    assert got.dtype == jnp.bfloat16
    error = got.astype(jnp.float32) - want
    assert jnp.sqrt(jnp.mean(error**2)) < 0.05  # Of a normed stream; 8 bits a number.


def test_the_config_may_name_another_ssd():
    stream = tiny.stream(["t" * 10], text=10)
    run = tiny.quick_jit(_forward)
    want = run(tiny.build_lm(), stream)
    np.testing.assert_allclose(
        run(tiny.build_lm(ssd="reference"), stream), want, **FLOAT32
    )


def test_attention_may_start_as_a_search_for_like_tokens():
    cfg = dataclasses.replace(tiny.LM, pattern="*", match_init=True, embed_std=0.5)
    create = lambda: HybridLM(cfg, rngs=nnx.Rngs(0))
    lm = nnx.eval_shape(create)
    nnx.update(lm, jax.jit(lambda: nnx.state(create()))())
    mixer = lm.block("attention", 0).mixer
    q, k, v, out = (getattr(mixer, n).kernel[...] for n in ("q", "k", "v", "out"))
    for head in range(4):
        assert jnp.array_equal(q[:, head], k[:, head // 2]) == (head % 2 == 0)
        np.testing.assert_array_equal(out[head], v[:, head // 2].T)
    table = lm.embed.embedding[...]
    np.testing.assert_allclose(lm.head.kernel[...], 0.04 * table.T, rtol=1e-5)


# Configs.


def test_a_layer_number_maps_to_a_kind_and_an_index():
    cfg = dataclasses.replace(
        tiny.LM, pattern="M-M*-", transv=(Stage(layer=2, keep=0.5),)
    )
    assert cfg.layers == (
        ("mamba", 0),
        ("mlp", 0),
        ("mamba", 1),
        ("attention", 0),
        ("mlp", 1),
    )
    assert cfg.segments == ((0, 2), (2, 5))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(pattern="M-X"), "pattern='M-X' must be made of M"),
        (dict(pattern=""), "pattern='' must be made of"),
        (dict(num_heads=3), "num_heads=3 must be a multiple of num_kv_heads=2"),
        (dict(ssm_heads=5), "num_heads=5 must be a multiple of num_groups=2"),
        (dict(ssm_state=0), "A pattern with M needs sizes above 0: .*'ssm_state': 0"),
        (dict(tied=True, match_init=True), "match_init starts a head of its own"),
        (dict(rope_theta=1e4, head_dim=7), "head_dim=7 must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.build_lm(**changes)
