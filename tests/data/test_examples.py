"""Rows hold examples one after another, then padding."""

import numpy as np
import pytest

from timeviper_jax.data.examples import Example, Role, RowSize, collate

SIZE = RowSize(num_frames=3, text_tokens=5, tokens_per_frame=2, num_segments=2)
T, V, A = Role.TEXT, Role.VISION, Role.ANSWER


def example(num_frames, first=10, answer=2):
    """`first` as text, the frames, then `answer` answer tokens counting on."""
    vision = num_frames * SIZE.tokens_per_frame
    roles = np.array([T, *[V] * vision, *[A] * answer], np.int32)
    return Example(
        tokens=np.array([first, *[99] * vision, *range(first + 1, first + 1 + answer)]),
        roles=roles,
        loss_mask=roles == A,
        frame_times=np.arange(num_frames, dtype=np.float32) + 0.5,
        frames=np.full((num_frames, 4, 4, 3), first, np.uint8),
    )


def test_examples_of_a_row_are_packed_and_padded():
    rows = [[example(1, 10), example(2, 20, answer=1)], [example(2, 30)]]
    batch = collate(rows, SIZE)
    assert batch.tokens.tolist() == [
        [10, 99, 99, 11, 12, 20, 99, 99, 99, 99, 21],
        [30, 99, 99, 99, 99, 31, 32, 0, 0, 0, 0],
    ]
    assert batch.roles.tolist() == [
        [T, V, V, A, A, T, V, V, V, V, A],
        [T, V, V, V, V, A, A, 0, 0, 0, 0],
    ]
    assert batch.segment_ids.tolist() == [
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2],
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(batch.loss_mask, batch.roles == A)
    assert batch.frame_times.tolist() == [[0.5, 0.5, 1.5], [0.5, 1.5, 0]]
    assert batch.frames[:, :, 0, 0, 0].tolist() == [[10, 20, 20], [30, 30, 0]]
    assert batch.features is None and batch.num_segments == 2


@pytest.mark.parametrize(
    "row", [[example(4)], [example(1, answer=5)], [example(1, answer=1)] * 3]
)
def test_a_row_that_overflows_is_an_error(row):
    with pytest.raises(ValueError, match="do not fit a row of 2 examples, 3 frames"):
        collate([row], SIZE)


def test_frames_and_vision_tokens_must_agree():
    size = RowSize(num_frames=3, text_tokens=5, tokens_per_frame=3)
    with pytest.raises(ValueError, match="2 vision tokens for 1 frames"):
        collate([[example(1)]], size)


def test_why_an_example_does_not_fit():
    assert SIZE.misfit(example(3)) is None
    assert SIZE.misfit(example(4)) == "4 frames in a row of 3"
    assert SIZE.misfit(example(1, answer=7)) == "8 text tokens in a row of 5"
