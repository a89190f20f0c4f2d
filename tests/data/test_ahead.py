"""Things are made ahead by a bound, errors come at once, and no thread stays behind."""

import threading
import time

import pytest

from timeviper_jax.data.ahead import Ahead


class Source:
    """Counts to `stop`, and says how far it came and how it ended."""

    def __init__(self, stop: int, error: Exception | None = None):
        self.made, self.closed_in = 0, None
        self.items = self._items(stop, error)

    def _items(self, stop, error):
        try:
            for i in range(stop):
                self.made += 1
                yield i
            if error:
                raise error
        finally:
            self.closed_in = threading.current_thread().name


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("It did not come to pass in 5 s.")


def test_everything_comes_in_order():
    with Ahead(Source(100).items, most=3) as items:
        assert list(items) == list(range(100))
        assert list(items) == []


def test_a_slow_taker_bounds_what_is_made():
    source = Source(100)
    with Ahead(source.items, most=3) as items:
        for taken in range(1, 20):
            assert next(items) == taken - 1
            wait_until(lambda taken=taken: source.made == taken + 3)
            time.sleep(0.01)
            assert source.made == taken + 3


def test_an_error_comes_before_what_is_still_waiting():
    source = Source(3, OSError("torn"))
    with Ahead(source.items, most=4) as items:
        wait_until(items._making.done)
        assert source.made == 3
        for _ in range(2):
            with pytest.raises(OSError, match="torn"):
                next(items)


def test_leaving_early_ends_the_thread_and_closes_the_source():
    source, before = Source(100), threading.active_count()
    with Ahead(source.items, most=2) as items:
        assert next(items) == 0
    assert source.made <= 4
    assert source.closed_in.startswith("ahead")
    assert threading.active_count() == before


def test_an_error_of_the_taker_ends_the_thread_too():
    source = Source(100)
    with pytest.raises(ZeroDivisionError), Ahead(source.items, most=2) as items:
        next(items) / 0
    assert source.closed_in


def test_a_bound_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="most=0 ahead leaves nothing"):
        Ahead(Source(1).items, most=0)
