"""TransV: who stays, who is told, and that nobody else notices."""

import dataclasses
import functools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
import tiny
from flax import nnx
from golden_cases import GOLDEN, load, under

from timeviper_jax.data.examples import Role
from timeviper_jax.layers.attention import AttentionConfig
from timeviper_jax.llm import ranking, transv
from timeviper_jax.llm.hybrid import HybridLM, Output
from timeviper_jax.llm.stream import Stream, make_stream
from timeviper_jax.llm.transv import Stage

# Recorded in float32 by other arithmetic; 1.1e-5 was reached.
RECORDED = dict(atol=2e-5, rtol=0)
FLOAT32 = dict(atol=1e-5, rtol=1e-5)

# Selection.


def _letters(stream: Stream, kept) -> list[str]:
    """The rows with a dot for each token that goes, padding left out."""
    symbols = {role: symbol for symbol, role in tiny.ROLES.items()}
    return [
        "".join(
            symbols[int(r)] if k else "." for r, k in zip(*row, strict=True) if int(r)
        )
        for row in zip(stream.roles, kept, strict=True)
    ]


@functools.cache
def _rounding_tables():
    return json.loads((GOLDEN / "rounding_tables.json").read_text())


def test_uniform_indices_are_as_recorded():
    table = _rounding_tables()["linspace_cpu"]
    present, kept = (np.array([row[i] for row in table])[:, None] for i in (0, 1))
    rank = np.broadcast_to(np.arange(512), (len(table), 512))
    chosen = jax.jit(transv.uniform_kept)(
        rank, *(np.broadcast_to(z, rank.shape) for z in (present, kept))
    )
    for row, (_, _, indices) in zip(chosen, table, strict=True):
        assert np.flatnonzero(row).tolist() == indices


@pytest.mark.parametrize(
    "present, kept",
    [
        (160_256, 80_128),  # 10,016 frames; the product takes 34 bits.
        (160_256, 16_025),
        (160_255, 160_254),
        (160_000, 1),
        (65_537, 65_537),
        (2**21 - 1, 2**20 + 1),
    ],
)
def test_uniform_indices_are_exact_integers(present, kept):
    rank = np.arange(2**21)
    chosen = jax.jit(transv.uniform_kept)(
        rank, np.full_like(rank, present), np.full_like(rank, kept)
    )
    want = [i * (present - 1) // max(kept - 1, 1) for i in range(kept)]
    np.testing.assert_array_equal(np.flatnonzero(chosen), want)


def test_counts_are_truncated_products_as_recorded():
    for n, keep, in_float64, _ in _rounding_tables()["int_n_times_ratio"]:
        assert transv.kept_counts(keep, n)[n] == in_float64
    assert transv.kept_counts(0.29, 200_000).tolist() == [
        int(n * 0.29) for n in range(200_001)
    ]


def test_more_tokens_than_count_exactly_are_an_error():
    with pytest.raises(ValueError, match="2097152 vision tokens in a row; at most"):
        transv.kept_counts(0.5, 2**21)


def _select(stream, keep, select, scores=None):
    return transv.select_tokens(
        stream.is_vision,
        stream.segment_ids,
        stream.vision_counts,
        scores,
        keep=keep,
        capacity=stream.original_capacity,
        select=select,
    )


def test_uniform_selection_of_each_sample():
    stream = tiny.stream(
        ["tvvvvvqa|vvtvq", "vvvvvvvvvt|tq"], text=6, vision=10, samples=2
    )
    assert _letters(stream, _select(stream, 0.5, "uniform")) == [
        "tv...vqav.t.q",
        "v.v..v..vttq",
    ]
    assert _letters(stream, _select(stream, 0.2, "uniform")) == [
        "tv....qa..t.q",
        "v........ttq",
    ]


def test_attention_keeps_the_best_and_of_equals_the_earlier():
    stream = tiny.stream(["tvvvvvqa|vvvvq"], text=5, vision=9, samples=2)
    scores = jnp.array([[9, 1, 3, 3, 3, 0, 9, 9, 5, 7, 7, 5, 9, 0.0]])
    kept = _select(stream, 0.5, "attention", scores)
    assert _letters(stream, kept) == ["t.vv..qa.vv.q"]


def test_capacities_hold_whatever_the_samples():
    rng = random.Random(0)
    shares = [i / 20 for i in range(21)] + [1 / 3, 2 / 3, 0.29, 0.999]
    for _ in range(20_000):
        counts = [rng.choice((0, 1, 3, 10, 20, 57)) for _ in range(rng.randint(1, 5))]
        capacity, samples = sum(counts) + rng.choice((0, 3)), len(counts)
        low, high = sorted(rng.sample(shares, 2))
        before, after = (
            transv.kept_capacity(keep, capacity, samples) for keep in (high, low)
        )
        stay, leave = (sum(int(n * keep) for n in counts) for keep in (high, low))
        assert stay <= before and leave <= after
        room = transv.dropped_capacity(before, after, samples)
        assert stay - leave <= room


def test_each_vision_token_is_kept_or_dropped_once():
    stream = tiny.stream(["tvvvvvvqa|vtvvq|tq", "vvvt"], text=8, vision=9, samples=3)
    marked = stream.x.at[..., 0].set(jnp.arange(stream.x.shape[1]))
    stream = dataclasses.replace(stream, x=marked)
    kept = _select(stream, 0.4, "uniform")
    shorter, dropped = transv.split_stream(stream, kept, 0.4)
    assert (shorter.vision_capacity, shorter.x.shape[1]) == (4, 12)
    for b in range(2):
        ids = stream.segment_ids[b]
        stay = np.flatnonzero(kept[b])
        np.testing.assert_array_equal(shorter.positions[b, : len(stay)], stay)
        np.testing.assert_array_equal(shorter.x[b, : len(stay), 0], stay)
        np.testing.assert_array_equal(shorter.segment_ids[b, : len(stay)], ids[stay])
        assert (shorter.positions[b, len(stay) :] == -1).all()
        gone = np.flatnonzero(stream.is_vision[b] & ~kept[b])
        np.testing.assert_array_equal(dropped.x[b, : len(gone), 0], gone)
        np.testing.assert_array_equal(dropped.segment_ids[b, : len(gone)], ids[gone])
        assert (dropped.segment_ids[b, len(gone) :] == 0).all()


# Who ranks and who is told.


def test_the_first_question_or_all_text_from_it_on_receives():
    rows = ["tvvtvqqaata|tqa", "tvva|vt|vvta"]
    stream = tiny.stream(rows, text=15, vision=5, samples=3)
    assert _letters(stream, transv.receivers(stream, "instruction")) == [
        ".....qq.....q.",
        "..........",
    ]
    assert _letters(stream, transv.receivers(stream, "all_text")) == [
        ".....qqaata.qa",
        "...a.....a",
    ]


def test_the_last_instruction_ranks_or_else_the_last_before_the_answer():
    rows = ["tvvqqaat|tq", "tvva|vt|vvtaa"]
    stream = tiny.stream(rows, text=15, vision=5, samples=3)
    assert ranking.ranking_position(stream)[:, 1:].tolist() == [[4, 9, 0], [2, 5, 8]]


def test_scores_are_the_layers_own_attention_on_the_raw_residual():
    lm = tiny.build_lm(
        log_base=4.0, transv=(Stage(layer=2, keep=0.5, select="attention"),)
    )
    stream = tiny.stream(["tvvvtvqqa|vvvq"], text=6, vision=7, samples=2)
    scores = tiny.quick_jit(lambda lm, s: lm.rank(lm.cfg.transv[0], s))(lm, stream)
    layer = lm.block("attention", 0).mixer
    q_kernel, k_kernel = (np.asarray(p.kernel[...]) for p in (layer.q, layer.k))
    for sample, last, start in (("tvvvtvqqa", 7, 0), ("vvvq", 3, 9)):
        x = tiny.embeddings(sample)[: last + 1]
        q = np.einsum("D,DNH->NH", x[-1], q_kernel) * np.log(last + 1) / np.log(4)
        k = np.repeat(np.einsum("TD,DKH->TKH", x, k_kernel), 2, axis=1)
        logits = np.einsum("NH,TNH->NT", q, k) / np.sqrt(8)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        want = np.mean(weights / weights.sum(1, keepdims=True), axis=0)
        np.testing.assert_allclose(scores[0, start:][: last + 1], want, **FLOAT32)


# The recorded cases.


CASES = [
    "nano_pdrop_uni_attn_ca",
    "nano_pdrop_4stage_ca",
    "nano_pdrop_uni_layer0_ca",
    "qwen2_pdrop_uni_uni_ca",
]


def _recorded(case, **stage):
    """The model, with stages changed, and the recorded samples as one row."""
    description, arrays = load(case)
    cfg = recorded.config_from_json(description["config"])
    stages = tuple(dataclasses.replace(s, **stage) for s in cfg.transv)
    cfg = dataclasses.replace(cfg, transv=stages)
    lm = recorded.language_model(cfg, under("param.", arrays))
    x, told = arrays["in.inputs_embeds"], description["train_pdrop_args"]
    lengths = description.get("sample_lens", [x.shape[1]])
    roles, segment_ids = [], []
    for i, (length, start, count) in enumerate(
        zip(
            lengths,
            told["first_vision_token_positions"],
            told["num_vision_tokens"],
            strict=True,
        )
    ):
        parts = {Role.TEXT: start, Role.VISION: count}
        parts[Role.INSTRUCTION] = length - start - count
        roles += [int(role) for role, many in parts.items() for _ in range(many)]
        segment_ids += [i + 1] * length
    stream = make_stream(
        jnp.asarray(x),
        jnp.array([roles]),
        jnp.array([segment_ids]),
        num_segments=len(lengths),
        vision_capacity=sum(told["num_vision_tokens"]),
    )
    return lm, arrays, stream


def _recorded_choices(prefix, arrays, stream, stages):
    """Which positions each stage kept; a recording counts in what a sample had left."""
    ids, roles = np.asarray(stream.segment_ids[0]), np.asarray(stream.roles[0])
    left = [np.flatnonzero(ids == i + 1) for i in range(ids.max())]
    for stage in range(stages):
        for i, given in enumerate(left):
            kept = given[arrays[f"{prefix}{stage * len(left) + i}.kept"]]
            is_text = roles[given] != Role.VISION
            left[i] = given[is_text | np.isin(given, kept)]
        yield jnp.isin(jnp.arange(len(ids)), np.concatenate(left))[None]


@pytest.mark.parametrize("case", CASES)
def test_recorded_inference(case):
    lm, arrays, stream = _recorded(case)
    left = arrays["out.eval.logits"].shape[1]

    @tiny.quick_jit
    def run(lm, stream):
        def step(carry, _):
            last, caches = carry
            token = jnp.argmax(last)
            hidden, caches = lm.extend(
                lm.embed(token[None, None]),
                jnp.ones((1, 1), jnp.int32),
                caches,
                original_positions=True,
            )
            return (lm.logits(hidden)[0, 0], caches), (token, last)

        caches = lm.init_caches(1, stream.x.shape[1] + 16)
        output = lm(stream, caches=caches, record=True)
        logits = lm.logits(output.hidden)
        first = logits[0, left - 1], output.caches
        return logits, output, jax.lax.scan(step, first, length=16)[1]

    logits, output, (tokens, decoded) = run(lm, stream)
    np.testing.assert_allclose(logits[:, :left], arrays["out.eval.logits"], **RECORDED)
    inputs = [before for before, _ in output.layers]
    hidden = [array for _, array in sorted(under("out.eval.hidden.", arrays).items())]
    layers = [*inputs[:: 1 if "M" in lm.cfg.pattern else 2], output.hidden]
    for got, want in zip(layers, hidden, strict=False):  # Qwen2's last was not kept.
        np.testing.assert_allclose(got[:, : want.shape[1]], want, **RECORDED)
    _check_selections(output, arrays, np.asarray(stream.roles))
    np.testing.assert_array_equal(tokens, arrays["out.decode.tokens"])
    np.testing.assert_allclose(decoded, arrays["out.decode.logits"], **RECORDED)


def _check_selections(output, arrays, roles):
    """Kept indices and scores; the recording counts in what a stage was given."""
    given = np.arange(roles.shape[1])
    for i, (kept, scores) in enumerate(zip(output.kept, output.scores, strict=True)):
        is_vision = roles[0, given] == Role.VISION
        if scores is not None:
            want = arrays[f"out.eval.trace.{i}.scores"]
            got = scores[0, : len(given)][is_vision]
            np.testing.assert_allclose(got, want, atol=1e-6)
        want = given[arrays[f"out.eval.trace.{i}.kept"]]
        given = np.asarray(kept[0])
        given = given[given >= 0]
        np.testing.assert_array_equal(given[roles[0, given] == Role.VISION], want)


def _loss_of_survivors(logits, positions, labels):
    """The release's: a token that is left predicts the label of the next one left."""
    targets = jnp.where(positions >= 0, labels[0, positions[0]], -100)[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], jnp.maximum(targets, 0)
    )
    return jnp.mean(losses, where=targets >= 0)


@pytest.mark.parametrize(
    "case, prefix",
    [
        ("nano_packed_pdrop_ca", "out."),
        ("qwen2_pdrop_uni_uni_ca", "out.train."),
        *(
            pytest.param(case, "out.train.", marks=pytest.mark.slow)
            for case in CASES
            if case.startswith("nano")
        ),
    ],
)
def test_recorded_training(case, prefix):
    """The transfer adds to all text, and what a ranking chose is taken as recorded."""
    lm, arrays, stream = _recorded(case, transfer_to="all_text")
    stages = lm.cfg.transv
    choices = list(_recorded_choices(f"{prefix}trace.", arrays, stream, len(stages)))
    for i, stage in enumerate(stages):
        choices[i] = None if stage.select == "uniform" else choices[i]
    labels = jnp.asarray(arrays["in.labels"], jnp.int32)

    def gradients(lm, stream):
        graph, params = nnx.split(lm)

        def loss(params, x):
            lm = nnx.merge(graph, params)
            output = lm(dataclasses.replace(stream, x=x), choices=choices)
            logits = lm.logits(output.hidden)
            loss = _loss_of_survivors(logits, output.positions, labels)
            return loss, (loss, logits)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, stream.x)

    (grads, in_x), (loss, logits) = tiny.quick_jit(gradients)(lm, stream)
    want = arrays[f"{prefix}logits"]
    np.testing.assert_allclose(loss, arrays[f"{prefix}loss"], **RECORDED)
    np.testing.assert_allclose(logits[:, : want.shape[1]], want, **RECORDED)
    want = arrays["grad.in.inputs_embeds"]
    np.testing.assert_allclose(in_x, want, atol=2e-5 * np.abs(want).max(), rtol=0)
    recorded.assert_close_in_scale(grads, recorded.gradients(lm.cfg, arrays))


# A model with both kinds of stage.

STAGES = (Stage(layer=1, keep=0.6), Stage(layer=2, keep=0.35, select="attention"))
SAMPLES = [
    "tvvvvvvvvvvqqaa",  # The usual.
    "tvvvqata",  # Two turns.
    "tttqqa",  # No vision.
    "vvtvvvvqqqaa",  # Interleaved media.
    "tvvvvv",  # Nothing asked.
]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def separate(request):
    """The model, its compiled pass, and what it makes of each sample in its own row."""
    lm = tiny.build_lm(tiny.FAMILIES[request.param], transv=STAGES, log_base=8.0)
    run = tiny.quick_jit(lambda lm, stream: lm(stream))
    return lm, run, run(lm, tiny.stream(SAMPLES, text=7, vision=10))


def _survivors(output: Output, row: int, start: int = 0, stop: int = 99) -> dict:
    """Position → final hidden state, of a row's tokens that stood in [start, stop)."""
    return {
        int(p) - start: np.asarray(hidden)
        for p, hidden in zip(output.positions[row], output.hidden[row], strict=True)
        if start <= p < stop
    }


def _assert_same(got: dict, want: dict):
    assert list(got) == list(want)
    for position, hidden in want.items():
        np.testing.assert_allclose(got[position], hidden, **FLOAT32)


def test_each_sample_keeps_its_shares(separate):
    _, _, output = separate
    for i, sample in enumerate(SAMPLES):
        kept = [sample[p] for p in _survivors(output, i)]
        assert kept.count("v") == int(sample.count("v") * 0.35)
        assert len(kept) - kept.count("v") == len(sample) - sample.count("v")


def test_packed_samples_are_as_in_rows_of_their_own(separate):
    lm, run, want = separate
    rows = ["|".join(SAMPLES[:3]), "|".join(SAMPLES[3:])]
    packed = run(lm, tiny.stream(rows, text=16, vision=13, samples=4))
    start = 0
    for i, sample in enumerate(SAMPLES):
        start = 0 if i == 3 else start
        got = _survivors(packed, i // 3, start, start + len(sample))
        _assert_same(got, _survivors(want, i))
        start += len(sample)


def test_rows_and_their_padding_do_not_mix(separate):
    lm, run, want = separate
    stream = tiny.stream([SAMPLES[i] for i in (3, 0, 2, 2, 1)], text=7, vision=10)
    noise = 100 * jax.random.normal(jax.random.key(0), stream.x.shape)
    padding = (stream.segment_ids == 0)[..., None]
    stream = dataclasses.replace(stream, x=jnp.where(padding, noise, stream.x))
    got = run(lm, stream)
    for row, i in enumerate((3, 0, 2, 2, 1)):
        _assert_same(_survivors(got, row), _survivors(want, i))


def test_a_row_alone_with_more_room_is_the_same(separate):
    lm, run, want = separate
    got = run(lm, tiny.stream(SAMPLES[3:4], text=11, vision=23))
    _assert_same(_survivors(got, 0), _survivors(want, 3))


TURNS = ["tvvvvvvvqqaata", "vvtvvvvqqqaaaa", "tvvqaaatttttaa"]


@pytest.fixture(scope="module")
def cut_and_continued(separate):
    """The stream, its one pass, and the pass up to a cut with the rest from caches."""
    lm, run, _ = separate
    stream = tiny.stream(TURNS, text=10, vision=10)

    def at(lm, stream, cut):
        T = stream.x.shape[1]
        given = jnp.arange(T) < cut
        begun = dataclasses.replace(
            stream,
            roles=jnp.where(given, stream.roles, 0),
            segment_ids=jnp.where(given, stream.segment_ids, 0),
            positions=jnp.where(given, stream.positions, -1),
        )
        output = lm(begun, caches=lm.init_caches(len(TURNS), 2 * T))
        rest = jnp.roll(stream.x, -cut, axis=1)
        ids = jnp.roll(jnp.where(given, 0, stream.segment_ids), -cut, axis=1)
        hidden, _ = lm.extend(rest, ids, output.caches)
        return output, hidden

    return stream, run, functools.partial(tiny.quick_jit(at), lm)


def test_a_cache_continues_from_any_cut_after_the_instruction(cut_and_continued):
    stream, run, at = cut_and_continued
    want = run(at.args[0], stream)
    first = max(turn.index("a") for turn in TURNS)
    for cut in range(first, len(TURNS[0]) + 1):
        output, rest = at(stream, cut)
        for row in range(len(TURNS)):
            got = _survivors(output, row)
            hidden = rest[row, : len(TURNS[row]) - cut]
            got |= dict(enumerate(np.asarray(hidden), start=cut))
            _assert_same(got, _survivors(want, row))


def test_in_bfloat16_it_continues_nearly_the_same(cut_and_continued):
    stream, run, at = cut_and_continued
    lm = tiny.build_lm(at.args[0].cfg, dtype="bfloat16")
    stream = dataclasses.replace(stream, x=stream.x.astype(jnp.bfloat16))
    want, cut = run(lm, stream), 12
    _, rest = at.func(lm, stream, cut)
    for row, turn in enumerate(TURNS):
        got = rest[row, : len(turn) - cut].astype(jnp.float32)
        wanted = jnp.stack([_survivors(want, row)[p] for p in range(cut, len(turn))])
        error = got - wanted.astype(jnp.float32)
        # Of a normed stream, eight bits a number; where a cut falls moves roundings.
        assert jnp.sqrt(jnp.mean(error**2)) < 0.05


def test_in_bfloat16_packed_samples_are_nearly_as_in_rows_of_their_own(separate):
    lm, run, _ = separate
    lm = tiny.build_lm(lm.cfg, dtype="bfloat16")
    half = lambda s: dataclasses.replace(s, x=s.x.astype(jnp.bfloat16))
    apart = run(lm, half(tiny.stream(SAMPLES[:3], text=7, vision=10)))
    row = ["|".join(SAMPLES[:3])]
    packed = run(lm, half(tiny.stream(row, text=16, vision=13, samples=4)))
    start = 0
    for i, sample in enumerate(SAMPLES[:3]):
        got = _survivors(packed, 0, start, start + len(sample))
        want = _survivors(apart, i)
        text = [p for p, letter in enumerate(sample) if letter != "v"]
        error = np.stack([(got[p] - want[p]).astype(np.float32) for p in text])
        assert np.sqrt(np.mean(error**2)) < 0.05  # As above.
        start += len(sample)


def test_a_row_of_samples_cannot_be_cached(separate):
    lm, _, _ = separate
    stream = tiny.stream(["tvq|tq"], text=4, vision=1, samples=2)
    with pytest.raises(ValueError, match="A row of 2 samples cannot be cached"):
        lm(stream, caches=lm.init_caches(1, 8))


def test_more_tokens_than_a_cache_holds_are_an_error(separate):
    lm, _, _ = separate
    caches = lm.init_caches(1, 4)
    with pytest.raises(ValueError, match="holds 4 tokens, 0 are in it and 5 more"):
        lm.extend(jnp.zeros((1, 5, 24)), jnp.ones((1, 5), jnp.int32), caches)


def test_nothing_after_the_instruction_is_seen_before_itself(separate):
    lm, run, _ = separate
    sample = "tvvvvvvvqqaata"
    later = range(sample.index("a"), len(sample))
    stream = tiny.stream([sample] * (len(later) + 1), text=7, vision=10)
    changed = stream.x.at[jnp.arange(len(later)), jnp.array(later)].add(1.0)
    output = run(lm, dataclasses.replace(stream, x=changed))
    want = _survivors(output, len(later))
    for row, position in enumerate(later):
        got = _survivors(output, row)
        assert list(got) == list(want)
        for p, hidden in want.items():
            moved = np.abs(got[p] - hidden).max()
            assert moved < 1e-6 if p < position else moved > 1e-3


# What a transfer does.


def _with_stages(lm: HybridLM, stages: tuple[Stage, ...]) -> HybridLM:
    """The same parameters in a model with other stages, none of which transfers."""
    other = tiny.build_lm(lm.cfg, transv=stages)
    shared = nnx.to_flat_state(nnx.state(lm, nnx.Param))
    nnx.update(other, nnx.from_flat_state([s for s in shared if s[0][0] != "transv"]))
    return other


def test_a_closed_gate_is_plain_dropping(separate):
    lm, run, opened = separate
    lm = tiny.build_lm(lm.cfg)
    for transfer in lm.transv:
        transfer.alpha[...] = jnp.zeros(())
    stream = tiny.stream(SAMPLES, text=7, vision=10)
    stages = tuple(dataclasses.replace(s, transfer=False) for s in STAGES)
    closed, dropping = run(lm, stream), run(_with_stages(lm, stages), stream)
    np.testing.assert_array_equal(closed.positions, dropping.positions)
    np.testing.assert_allclose(closed.hidden, dropping.hidden, **FLOAT32)
    assert not np.allclose(closed.hidden[0], opened.hidden[0], atol=1e-2)


def test_gradients_reach_kept_and_dropped_tokens_but_not_the_ranking():
    stages = (Stage(layer=0, keep=0.5), Stage(layer=2, keep=0.25, select="attention"))
    lm = tiny.build_lm(transv=stages)
    stream = tiny.stream(["tvvvvvvvvqqa"], text=4, vision=8)

    def answer(x, lm):
        output = lm(dataclasses.replace(stream, x=x))
        return jnp.sum(jnp.sin(output.hidden[:, -1]))

    def ranking(x, lm):
        scores = lm.rank(lm.cfg.transv[1], dataclasses.replace(stream, x=x))
        return jnp.sum(jnp.sin(scores))

    run = tiny.quick_jit(
        lambda lm: [jax.grad(f)(stream.x, lm) for f in (answer, ranking)]
    )
    told, ranked = run(lm)
    assert jnp.all(jnp.any(told != 0, axis=-1)[0])
    assert not jnp.any(ranked)
    lm.transv[0].alpha[...] = jnp.zeros(())
    told, _ = run(lm)
    reached = jnp.any(told != 0, axis=-1)
    kept = _select(stream, 0.5, "uniform")
    np.testing.assert_array_equal(reached, kept)


@pytest.mark.parametrize(
    "keep, left", [(1.0, "vvvvvv"), (0.3, "v....."), (0.0, "......")]
)
def test_edges_of_keep(keep, left):
    lm = tiny.build_lm(transv=(Stage(layer=2, keep=keep),))
    stream = tiny.stream(["tvvvvvvqqa", "tvqa"], text=4, vision=6)
    shorter, _, _ = tiny.quick_jit(lambda lm, s: lm.thin(0, s))(lm, stream)
    kept = [np.isin(np.arange(10), row) for row in shorter.positions]
    assert _letters(stream, kept) == [f"t{left}qqa", "tvqa" if keep == 1 else "t.qa"]
    real = shorter.positions[0] >= 0
    moved = jnp.abs(shorter.x[0] - stream.x[0, shorter.positions[0]]).max(-1)
    told = real & (shorter.roles[0] == Role.INSTRUCTION) & (keep < 1)
    np.testing.assert_array_equal(real & (moved > 0), told)
    assert jnp.all(jnp.isfinite(shorter.x))


def test_text_alone_passes_every_stage_unchanged():
    lm = tiny.build_lm(transv=STAGES)
    stream = tiny.stream(["ttqqa", "tqa"], text=5)
    run = tiny.quick_jit(lambda lm, s: lm.thin(1, lm.thin(0, s)[0])[0])
    got, want = (jax.tree.leaves(s) for s in (run(lm, stream), stream))
    for after, before in zip(got, want, strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_transfer_reads_as_sharply_however_much_was_dropped():
    sizes = dict(embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4)
    scaled, plain = (
        tiny.build(lambda base=base: _make_transfer(sizes | {"log_base": base}))
        for base in (4.0, 0.0)
    )
    rng = np.random.default_rng(0)
    text, seen = (jnp.array(rng.normal(size=(1, n, 8)), jnp.float32) for n in (3, 20))
    # 16 tokens are the text's own sample's, so logits are log 16 / log 4 = 2 times.
    ids = jnp.ones((1, 3), jnp.int32)
    theirs = jnp.repeat(jnp.array([[1, 2]]), jnp.array([16, 4]), axis=1)
    dropped = transv.Dropped(x=seen, segment_ids=theirs)
    plain.q.kernel[...] *= 2
    np.testing.assert_allclose(
        scaled(text, ids, dropped), plain(text, ids, dropped), **FLOAT32
    )


def _make_transfer(sizes: dict) -> transv.Transfer:
    return transv.Transfer(AttentionConfig(**sizes), rngs=nnx.Rngs(0))


def test_a_transfer_starts_as_the_nearest_self_attention_after_it():
    stages = (Stage(layer=1, keep=0.9), Stage(layer=3, keep=0.5, transfer=False))
    stages = (*stages, Stage(layer=4, keep=0.2, select="attention"))
    lm = tiny.build_lm(pattern="M-*M*-", transv=stages)
    lm.init_transfers()
    for transfer, index in zip(lm.transv, (0, 1), strict=True):
        source = lm.block("attention", index).mixer
        for name in ("q", "k", "v", "out"):
            got, want = (getattr(m, name).kernel[...] for m in (transfer, source))
            np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="No attention layer at or after layer 3"):
        tiny.build_lm(transv=(Stage(layer=3, keep=0.5),)).init_transfers()


# Errors.


@pytest.mark.parametrize(
    "stage, message",
    [
        (dict(keep=1.5), "keep=1.5 is a share: use 0 to 1"),
        (dict(keep=0.5, transfer_to="answers"), "transfer_to='answers' is not in"),
    ],
)
def test_impossible_stages_are_errors(stage, message):
    with pytest.raises(ValueError, match=message):
        Stage(layer=1, **stage)


@pytest.mark.parametrize(
    "stages, message",
    [
        ([(4, 0.5, "uniform")], "TransV at layer 4, but the layers are 0 to 3"),
        ([(1, 0.5, "attention")], "layer 1, which is '-'; attention layers are .2."),
        ([(1, 0.5, "uniform"), (1, 0.2, "uniform")], "layers must grow"),
        ([(1, 0.5, "uniform"), (2, 0.7, "uniform")], "shares must not"),
    ],
)
def test_stages_that_do_not_fit_the_stack_are_errors(stages, message):
    stages = tuple(Stage(layer=a, keep=k, select=s) for a, k, s in stages)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.LM, transv=stages)
