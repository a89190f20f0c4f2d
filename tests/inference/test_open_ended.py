"""Video without an end: what it answers is what watching the same frames answers."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from tests import tiny
from tests.watching import (
    CFG,
    FLOAT32,
    SIZE,
    SIZES,
    model,
    one_pass,
    parts,
    prompt,
    text_of,
)
from timeviper_jax.data.examples import Example
from timeviper_jax.inference import programs
from timeviper_jax.inference.memory import take
from timeviper_jax.inference.open_ended import (
    OpenEndedConfig,
    OpenEndedVideo,
    split_around,
)
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer, ViewerConfig, text_part
from timeviper_jax.llm.transv import Stage
from timeviper_jax.timeviper import TimeViper

ONE = dataclasses.replace(CFG, video_rows=1, question_rows=1, chunk=8, text_chunk=8)
LONG = prompt(11, 5)
BEFORE, QUESTION = split_around(text_of(LONG))
FOLLOW_UP = text_part(parts(prompt(0, 4))[1], slice(-4, None))


def begin(
    stages: str,
    policy: str = "blocks",
    block: int = 2,
    cfg: ViewerConfig = ONE,
    expected: int = 0,
) -> OpenEndedVideo:
    open_ended = OpenEndedConfig(
        policy=policy, block_frames=block, expected_frames=expected
    )
    return OpenEndedVideo(Viewer(model(stages), cfg), BEFORE, open_ended)


def feed(video: OpenEndedVideo, stop: int, at_once: int = 12) -> None:
    """Frames of LONG up to `stop`, a few at a time."""
    while (start := video.num_frames) < stop:
        here = slice(start, min(stop, start + at_once))
        video.feed(LONG.features[here], LONG.frame_times[here])


def first(frames: int) -> Example:
    """The same prompt about so many frames."""
    whole = prompt(frames, 5)
    return dataclasses.replace(
        whole,
        tokens=np.concatenate(
            [BEFORE.tokens, np.ones(2 * frames, np.int32), QUESTION.tokens]
        ),
        features=LONG.features[:frames],
    )


def check(video: OpenEndedVideo, want: np.ndarray) -> None:
    np.testing.assert_allclose(video.logits([QUESTION]), want, **FLOAT32)


@pytest.mark.parametrize(
    "stages, policy",
    [
        ("none", "blocks"),
        ("uniform_attention", "exact"),
        pytest.param("plain", "blocks", marks=pytest.mark.slow),
        pytest.param("attention_uniform", "ranked", marks=pytest.mark.slow),
    ],
)
def test_at_every_moment_it_is_one_pass_over_what_was_fed(stages, policy):
    video = begin(stages, policy)
    check(video, one_pass(stages, [first(0)]))
    for stop, at_once in ((1, 1), (3, 1), (7, 4), (11, 3)):
        feed(video, stop, at_once)
        check(video, one_pass(stages, [first(stop)]))


@pytest.mark.parametrize(
    "policy", ["blocks", pytest.param("ranked", marks=pytest.mark.slow)]
)
def test_blocks_keep_what_each_would_of_a_video_that_ended_there(policy):
    video = begin("uniform_attention", policy, block=2)
    feed(video, 10, 3)
    # Of each block's four tokens two, and by attention all in all or one of each two.
    uniform = _choice([1, 0, 0, 1] * 5)
    later = None if policy == "ranked" else _choice([1, 0, 0, 0] * 5)
    check(video, one_pass("uniform_attention", [first(10)], uniform, later))


def _choice(kept: list[int]) -> np.ndarray:
    """Vision tokens follow two words."""
    choice = np.zeros((3, SIZE.length), bool)
    choice[0, 2 : 2 + len(kept)] = kept
    return choice


def test_what_was_dropped_is_copied_only_to_be_written_to():
    video = begin("uniform_attention", "blocks")
    feed(video, 11)
    assert video.memory.waits
    (own, _), (kept, _) = (
        (passage.dropped.k for passage in memory.passages)
        for memory in (take(video.memory, [0]), video.memory)
    )
    assert own is not kept
    viewer = Viewer(model("uniform_attention"), ONE)
    memory = viewer.watch([parts(LONG)[0]])
    assert not memory.waits
    assert take(memory, [0]).passages[0].dropped is memory.passages[0].dropped
    one, again = (viewer.logits(memory, [QUESTION]) for _ in "ab")
    np.testing.assert_array_equal(one, again)
    np.testing.assert_allclose(one, one_pass("uniform_attention", [LONG]), **FLOAT32)


def test_asking_and_conversing_leave_no_trace():
    three = Decoding(max_tokens=3)
    asked, silent = (begin("uniform_attention", "ranked") for _ in "ab")
    feed(asked, 5)
    answers, memory = asked.converse([QUESTION], decoding=three)
    assert asked.ask([QUESTION], decoding=three) == answers
    feed(asked, 11)
    feed(silent, 11)
    np.testing.assert_array_equal(asked.logits([QUESTION]), silent.logits([QUESTION]))
    # What was asked of the first frames goes on from them alone.
    short = begin("uniform_attention", "ranked")
    feed(short, 5)
    _, again = short.converse([QUESTION], decoding=three)
    viewer = Viewer(model("uniform_attention"), ONE)
    np.testing.assert_array_equal(
        *(viewer.logits(remembered, [FOLLOW_UP]) for remembered in (memory, again))
    )


def test_what_a_conversation_remembers_outlives_further_frames():
    """Here nothing waits for a whole chunk, and all text reads what was dropped."""
    stages = (Stage(layer=1, keep=0.0, transfer_to="all_text"),)
    sizes = SIZES.with_transv(stages)
    viewer = Viewer(tiny.build(lambda: TimeViper(sizes, rngs=nnx.Rngs(0))), ONE)
    words = text_part(text_of(prompt(0, 6)), slice(ONE.chunk))
    video = OpenEndedVideo(viewer, words, OpenEndedConfig(block_frames=4))
    feed(video, 4)
    assert not video.memory.waits
    _, memory = video.converse([QUESTION], decoding=Decoding(max_tokens=3))
    before = viewer.logits(memory, [FOLLOW_UP])
    feed(video, 8)
    np.testing.assert_array_equal(viewer.logits(memory, [FOLLOW_UP]), before)


def test_caches_double_and_nothing_else_compiles():
    cfg = dataclasses.replace(ONE, chunk=7, text_chunk=7, text_room=8)
    video = begin("layer0", "blocks", block=5, cfg=cfg)
    run, sizes = programs.programs(model("none").cfg).run, set()
    before = run._cache_size()
    for _ in range(12):
        video.feed(LONG.features[:7], LONG.frame_times[:7])
        sizes |= {(s.layers, s.capacity) for s in video.memory.stretches}
    # 168 tokens are read, 116 of them dropped.
    _, read = video.memory.stretches
    assert (read.used, read.capacity) == (49, 64)
    (passage,) = video.memory.passages
    assert (passage.dropped.counts.item(), passage.dropped.capacity) == (116, 128)
    assert run._cache_size() - before == len(sizes) == 1 + 2


def test_what_is_expected_has_room_from_the_start():
    cfg = dataclasses.replace(ONE, chunk=7, text_room=8)
    video = begin("layer0", "blocks", block=5, cfg=cfg, expected=84)
    sizes = lambda memory: (
        [s.capacity for s in memory.stretches],
        [passage.dropped.capacity for passage in memory.passages],
    )
    assert sizes(video.memory) == ([None, 64], [128])
    feed(video, 11)
    assert sizes(video.memory) == ([None, 64], [128])


def test_what_is_kept_is_counted():
    video = begin("uniform_attention", "blocks", block=4)
    feed(video, 11)
    # 24 tokens are read, 22 of them vision: 11 are dropped, and of a chunk of eight,
    # all that is read by the second stretch, three more.
    kept, keys_and_values = video.memory.parts(filled=True), 2 * 2 * 8 * 4
    assert kept["transfer"] == (11 + 3) * keys_and_values
    assert kept["attention"] == 8 * (keys_and_values + 1)  # A mask.
    assert kept["residual"] == 0
    assert kept["attention"] < video.memory.parts()["attention"]
    assert sum(video.memory.parts().values()) == video.memory.num_bytes


def test_bad_input_is_told_in_one_line():
    video = begin("none")
    with pytest.raises(ValueError, match="No frame to read"):
        video.feed(LONG.features[:0], LONG.frame_times[:0])
    with pytest.raises(ValueError, match="1 tokens of width 32, but the model reads 2"):
        video.feed(LONG.features[:3, :1], LONG.frame_times[:3])
    with pytest.raises(ValueError, match="2 tokens of width 31"):
        video.feed(LONG.features[:3, :, 1:], LONG.frame_times[:3])
    video.close()
    with pytest.raises(ValueError, match="is closed"):
        video.feed(LONG.features[:3], LONG.frame_times[:3])
    with pytest.raises(ValueError, match="holds vision tokens"):
        OpenEndedVideo(Viewer(model("none"), ONE), text_of(LONG))
    with pytest.raises(ValueError, match="1 frames are 2 tokens, .* layer 3 is none"):
        begin("uniform_attention", "blocks", block=1)
    with pytest.raises(ValueError, match="without a place for its video"):
        split_around(QUESTION)
