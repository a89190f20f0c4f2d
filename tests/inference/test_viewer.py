"""Watching in stages and chunks, asking from a memory: the same as one pass."""

import dataclasses

import numpy as np
import pytest

from tests.watching import CFG, FLOAT32, STAGES, model, one_pass, parts, prompt
from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Example, Role
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer, ViewerConfig, split_prompt


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


def test_rows_of_which_stages_keep_unlike_many_are_one_pass():
    words = np.full(5, Role.TEXT, np.int32)
    wordy = dataclasses.replace(
        SHORT,
        tokens=np.concatenate([words, SHORT.tokens]),
        roles=np.concatenate([words, SHORT.roles]),
        loss_mask=np.zeros(5 + len(SHORT.tokens), bool),
    )
    asked = [LONG, wordy]
    viewer, memory = watch("uniform_attention", asked)
    got = viewer.logits(memory, [parts(e)[1] for e in asked])
    np.testing.assert_allclose(got, one_pass("uniform_attention", asked), **FLOAT32)


@pytest.mark.slow
def test_bfloat16_is_as_near_in_chunks_as_in_one_pass():
    viewer = Viewer(model("layer0", "bfloat16"), CFG)
    memory = viewer.watch([parts(e)[0] for e in (LONG, SHORT)])
    got = viewer.logits(memory, [parts(e)[1] for e in (LONG, SHORT)])
    want = one_pass("layer0", [LONG, SHORT])
    whole = one_pass("layer0", [LONG, SHORT], dtype="bfloat16")
    error = lambda logits: np.sqrt(np.mean((logits - want) ** 2))
    assert 0 < error(whole) < 0.05 * want.std()
    assert error(got) < 1.5 * error(whole)


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


def test_who_asks_nothing_is_told_so():
    viewer, watched = watch("none", [SHORT])
    with pytest.raises(ValueError, match="No question was given"):
        viewer.logits(watched, [])
    with pytest.raises(ValueError, match="No question was given"):
        viewer.converse(watched, [], decoding=Decoding(max_tokens=3))
    assert viewer.ask(watched, [], decoding=Decoding(max_tokens=3)) == []


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


def test_residual_may_wait_on_the_device():
    questions, got = [parts(e)[1] for e in (LONG, SHORT)], {}
    for place in ("host", "device"):
        cfg = dataclasses.replace(CFG, residual_on=place)
        viewer, memory = watch("uniform_attention", [LONG, SHORT], cfg)
        assert memory.parts()["residual"] > 0
        assert isinstance(memory.held.chunks[0].x, np.ndarray) == (place == "host")
        got[place] = viewer.logits(memory, questions)
    np.testing.assert_array_equal(got["host"], got["device"])


def test_videos_of_all_lengths_share_their_programs():
    cfg = dataclasses.replace(CFG, smallest_cache=64)
    viewer, _ = watch("uniform_attention", [prompt(11, 5)], cfg)
    compiled = viewer.reader.run_on.run._cache_size()
    for frames in (1, 4, 8, 10):
        viewer.watch([parts(prompt(frames, 5))[0]])
    assert viewer.reader.run_on.run._cache_size() == compiled
