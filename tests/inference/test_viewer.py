"""Watching in stages and chunks, asking from a memory: the same as one pass."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Example, Role, RowSize, collate
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer, ViewerConfig, split_prompt
from timeviper_jax.llm.stream import take
from timeviper_jax.llm.transv import Stage
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeViper

FLOAT32 = dict(atol=1e-5, rtol=1e-5)
UNIFORM = Stage(layer=1, keep=0.5)
ATTENTION = Stage(layer=3, keep=0.25, select="attention")
STAGES = {
    "none": (),
    "drop": (dataclasses.replace(UNIFORM, transfer=False),),
    "uniform_attention": (UNIFORM, ATTENTION),
    "attention_uniform": (
        Stage(layer=1, keep=0.5, select="attention"),
        Stage(layer=3, keep=0.2),
    ),
    "layer0": (Stage(layer=0, keep=0.3),),
    "plain": (),
    "plain_uniform_attention": (UNIFORM, ATTENTION),
}
V = 2  # Tokens a frame.
SIZES = dataclasses.replace(
    PRESETS["tiny"],
    tokens_per_frame=V,
    time_digits=3,
    llm=dataclasses.replace(
        PRESETS["tiny"].llm, log_base=8.0, pattern="M*-*", transv=()
    ),
)
# The same with a plain transformer, which attends and ranks at the same layers.
PLAIN = dataclasses.replace(
    SIZES,
    llm=dataclasses.replace(
        tiny.QWEN, pattern="-*-*", vocab_size=272, embed_dim=32, tied=True
    ),
)
CFG = ViewerConfig(
    video_rows=2,
    question_rows=3,
    chunk=8,
    text_chunk=4,
    text_room=24,
    smallest_cache=32,
    cache_growth=2,
)


@functools.cache
def model(stages: str) -> TimeViper:
    sizes = PLAIN if stages.startswith("plain") else SIZES
    cfg = sizes.with_transv(STAGES[stages])
    return tiny.build(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))


def prompt(frames: int, question: int, prefix: int = 0, seed: int = 0) -> Example:
    """Two words, a video, a question, and perhaps the beginning of an answer."""
    rng = np.random.default_rng([seed, frames, question])
    roles = [Role.TEXT] * 2 + [Role.VISION] * frames * V
    roles += [Role.INSTRUCTION] * question + [Role.ANSWER] * prefix
    return Example(
        tokens=rng.integers(1, 200, len(roles)).astype(np.int32),
        roles=np.array(roles, np.int32),
        loss_mask=np.zeros(len(roles), bool),
        frame_times=np.arange(frames).astype(np.float32) + 0.5,
        features=np.random.default_rng([seed, frames])
        .normal(size=(frames, V, 32))
        .astype(np.float32),
    )


def parts(example: Example) -> tuple[Example, EncodedText]:
    """What is watched and what is asked of an example."""
    text = EncodedText(
        tokens=example.tokens, roles=example.roles, loss_mask=example.loss_mask
    )
    before, after = split_prompt(text)
    watched = dataclasses.replace(
        example, tokens=before.tokens, roles=before.roles, loss_mask=before.loss_mask
    )
    return watched, after


@tiny.quick_jit
def _last_logits(model, batch):
    output = model.forward(batch)
    last = jnp.sum(output.stream.roles > 0, axis=1) - 1
    hidden = take(output.hidden, last[:, None])
    return model.llm.logits(hidden)[:, 0]


def one_pass(stages: str, examples: list[Example]) -> np.ndarray:
    """The logits after the last token of each, by the model's forward pass."""
    size = RowSize(num_frames=12, text_tokens=24, tokens_per_frame=V)
    rows = [[example] for example in examples] + [[]] * (3 - len(examples))
    logits = _last_logits(model(stages), collate(rows, size))
    return np.asarray(logits)[: len(examples)]


def watch(stages: str, examples: list[Example], cfg: ViewerConfig = CFG):
    viewer = Viewer(model(stages), cfg)
    return viewer, viewer.watch([parts(example)[0] for example in examples])


def about(video: Example, question: Example) -> Example:
    """The question of one example about the video of another."""
    seen, asked = parts(video)[0], parts(question)[1]
    return dataclasses.replace(
        video,
        tokens=np.concatenate([seen.tokens, asked.tokens]),
        roles=np.concatenate([seen.roles, asked.roles]),
        loss_mask=np.concatenate([seen.loss_mask, asked.loss_mask]),
    )


# Two ragged videos, two questions about the first, one with an answer begun.
LONG, SHORT = prompt(11, 5), prompt(7, 6)
AGAIN = about(LONG, prompt(3, 7, prefix=2))


@pytest.mark.parametrize("stages", STAGES)
def test_staged_and_chunked_is_one_pass(stages):
    viewer, memory = watch(stages, [LONG, SHORT])
    asked = [LONG, SHORT, AGAIN]
    got = viewer.logits(memory, [parts(e)[1] for e in asked], rows=[0, 1, 0])
    np.testing.assert_allclose(got, one_pass(stages, asked), **FLOAT32)


@pytest.mark.parametrize("chunk, text_chunk", [(5, 4), (32, 7)])
def test_the_chunk_size_changes_nothing(chunk, text_chunk):
    cfg = dataclasses.replace(CFG, chunk=chunk, text_chunk=text_chunk)
    viewer, memory = watch("uniform_attention", [LONG, SHORT], cfg)
    asked = [LONG, SHORT]
    got = viewer.logits(memory, [parts(e)[1] for e in asked])
    np.testing.assert_allclose(got, one_pass("uniform_attention", asked), **FLOAT32)


@pytest.mark.parametrize(
    "stages", ["none", "uniform_attention", "plain_uniform_attention"]
)
def test_decoding_step_by_step_is_one_pass_at_every_cut(stages):
    viewer, memory = watch(stages, [LONG, SHORT])
    asked = [LONG, SHORT, AGAIN]
    decoding = Decoding(max_tokens=4)
    answers = viewer.ask(
        memory, [parts(e)[1] for e in asked], rows=[0, 1, 0], decoding=decoding
    )
    for cut in range(4):
        begun = [_answered(e, ids[:cut]) for e, ids in zip(asked, answers, strict=True)]
        want = one_pass(stages, begun)
        assert [ids[cut] for ids in answers] == want.argmax(-1).tolist()


def _answered(example: Example, ids: list[int]) -> Example:
    roles = np.full(len(ids), Role.ANSWER, np.int32)
    return dataclasses.replace(
        example,
        tokens=np.concatenate([example.tokens, np.array(ids, np.int32)]),
        roles=np.concatenate([example.roles, roles]),
        loss_mask=np.zeros(len(example.tokens) + len(ids), bool),
    )


@pytest.mark.parametrize("stages", ["uniform_attention", "plain_uniform_attention"])
def test_a_conversation_is_one_pass(stages):
    cfg = dataclasses.replace(CFG, text_room=40)
    viewer, watched = watch(stages, [LONG, SHORT], cfg)
    questions = [parts(e)[1] for e in (LONG, SHORT)]
    three = Decoding(max_tokens=3)
    first = viewer.ask(watched, questions, decoding=three)
    # One answer ends before the other.
    stop = next(token for token in first[0] if token not in first[1])
    ragged = dataclasses.replace(three, stop_ids=(stop,))
    first, memory = viewer.converse(watched, questions, decoding=ragged)
    assert len(first[0]) < len(first[1]) == 3
    later = [_later(4), _later(3)]
    second, again = viewer.converse(memory, later, decoding=three)
    said = [
        _joined(_answered(example, ids), text)
        for example, ids, text in zip((LONG, SHORT), first, later, strict=True)
    ]
    want = one_pass(stages, said)
    np.testing.assert_allclose(viewer.logits(memory, later), want, **FLOAT32)
    assert [ids[0] for ids in second] == want.argmax(-1).tolist()
    # A third turn, about the second row's conversation alone.
    said = _joined(_answered(said[1], second[1]), _later(2))
    got = viewer.logits(again, [_later(2)], rows=[1])
    np.testing.assert_allclose(got, one_pass(stages, [said]), **FLOAT32)


def _later(length: int) -> EncodedText:
    """A follow-up question; what marks a first question means nothing in it."""
    roles = np.full(length, Role.INSTRUCTION, np.int32)
    tokens = np.random.default_rng(length).integers(1, 200, length)
    return EncodedText(tokens=tokens.astype(np.int32), roles=roles, loss_mask=roles < 0)


def _joined(example: Example, text: EncodedText) -> Example:
    """In one pass later turns are plain text."""
    roles = np.full(len(text.tokens), Role.TEXT, np.int32)
    return dataclasses.replace(
        example,
        tokens=np.concatenate([example.tokens, text.tokens]),
        roles=np.concatenate([example.roles, roles]),
        loss_mask=np.zeros(len(example.tokens) + len(roles), bool),
    )


def test_a_conversation_that_outgrows_its_cache_is_an_error():
    viewer, memory = watch("none", [LONG])
    question = parts(LONG)[1]
    with pytest.raises(ValueError, match="holds 64 tokens, .* larger text_room"):
        for _ in range(9):
            _, memory = viewer.converse(
                memory, [question], decoding=Decoding(max_tokens=3)
            )


def test_asking_leaves_the_memory_as_it_was():
    viewer, memory = watch("uniform_attention", [LONG, SHORT])
    question = parts(LONG)[1]
    first, second = (
        viewer.ask(memory, [question], decoding=Decoding(max_tokens=3))
        for _ in range(2)
    )
    assert first == second


def test_answers_stream_and_stop_at_a_stop_id():
    viewer, memory = watch("none", [LONG])
    question, heard = parts(LONG)[1], []
    whole = viewer.ask(memory, [question], decoding=Decoding(max_tokens=4))
    stop = Decoding(max_tokens=4, stop_ids=(whole[0][2],))
    listen = lambda number, ids: heard.append((number, ids))
    cut = viewer.ask(memory, [question], decoding=stop, on_tokens=listen)
    assert cut == [whole[0][:2]]
    assert heard == [(0, [whole[0][0]]), (0, [whole[0][1]])]


def test_a_full_cache_is_an_error():
    viewer, memory = watch("none", [LONG])
    with pytest.raises(ValueError, match="larger text_room"):
        viewer.ask(memory, [parts(LONG)[1]], decoding=Decoding(max_tokens=99))


def test_a_question_without_tokens_is_an_error():
    viewer, memory = watch("none", [LONG])
    nothing = split_prompt(parts(LONG)[1])[0]
    with pytest.raises(ValueError, match="without a token"):
        viewer.ask(memory, [nothing], decoding=Decoding())


def test_text_alone_is_answered():
    text = prompt(0, 6)
    viewer, memory = watch("uniform_attention", [text])
    got = viewer.logits(memory, [parts(text)[1]])
    np.testing.assert_allclose(got, one_pass("uniform_attention", [text]), **FLOAT32)


class Coming:
    """Features of frames that a decoder is still making: each is to be had once."""

    def __init__(self, features: np.ndarray):
        self._features, self.shape, self._next = features, features.shape, 0

    def __getitem__(self, frames: slice) -> np.ndarray:
        assert frames.start == self._next
        self._next = frames.stop
        return self._features[frames]


def test_features_are_read_once_in_order_while_they_come():
    viewer, memory = watch("none", [LONG, SHORT])
    questions = [parts(e)[1] for e in (LONG, SHORT)]
    want = viewer.logits(memory, questions)
    coming = [
        dataclasses.replace(e, features=Coming(e.features)) for e in (LONG, SHORT)
    ]
    assert [e.features._next for e in coming] == [0, 0]
    memory = viewer.watch([parts(e)[0] for e in coming])
    assert [e.features._next for e in coming] == [11, 7]
    np.testing.assert_array_equal(viewer.logits(memory, questions), want)


@pytest.mark.parametrize(
    "cut, wrong",
    [
        (np.s_[:-1], "Features of 10 frames of 2 tokens of width 32, .* 22 vision"),
        (np.s_[:, :1], "Features of 11 frames of 1 tokens of width 32"),
        (np.s_[..., 1:], "width 31, .* the model reads width 32"),
    ],
)
def test_features_that_do_not_fit_the_prompt_are_an_error(cut, wrong):
    with pytest.raises(ValueError, match=wrong):
        watch("none", [dataclasses.replace(LONG, features=Coming(LONG.features[cut]))])
