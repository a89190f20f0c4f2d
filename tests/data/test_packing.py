"""First fit: nothing lost, nothing over, and no row opened without need."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timeviper_jax.data.examples import RowSize
from timeviper_jax.data.packing import Load, first_fit

SIZE = RowSize(num_frames=10, text_tokens=20, tokens_per_frame=4, num_segments=3)


def load(frames, text, most=9):
    return Load(num_frames=frames, text_tokens=text, max_in_row=most)


_LOADS = st.lists(
    st.builds(load, st.integers(0, 10), st.integers(1, 20), st.integers(1, 4))
)


def fits(loads):
    return (
        sum(one.num_frames for one in loads) <= SIZE.num_frames
        and sum(one.text_tokens for one in loads) <= SIZE.text_tokens
        and len(loads) <= min([SIZE.num_segments, *(one.max_in_row for one in loads)])
    )


@settings(max_examples=300, deadline=None)
@given(loads=_LOADS)
def test_each_example_is_in_one_row_that_holds_it(loads):
    rows = first_fit(loads, SIZE)
    assert sorted(sum(rows, [])) == list(range(len(loads)))
    assert all(row == sorted(row) and row for row in rows)
    for row in rows:
        assert fits([loads[i] for i in row])


@settings(max_examples=300, deadline=None)
@given(loads=_LOADS)
def test_a_row_opens_only_for_what_no_earlier_row_could_take(loads):
    rows = first_fit(loads, SIZE)
    for later, row in enumerate(rows):
        for earlier in rows[:later]:
            before = [loads[i] for i in earlier if i < row[0]]
            assert not fits([*before, loads[row[0]]])


def test_first_fit_as_done_by_hand():
    loads = [load(6, 5), load(6, 5), load(4, 5), load(1, 16), load(3, 5), load(0, 1)]
    assert first_fit(loads, SIZE) == [[0, 2, 5], [1, 4], [3]]


def test_a_data_set_that_shares_no_rows_stays_alone():
    loads = [load(1, 1), load(1, 1, most=1), load(1, 1)]
    assert first_fit(loads, SIZE) == [[0, 2], [1]]


def test_what_no_row_holds_is_an_error():
    with pytest.raises(ValueError, match="num_frames=11.* does not fit even an empty"):
        first_fit([load(11, 1)], SIZE)
