"""Layers in runs of a repeated unit: all of them, in order, in few bodies."""

import pytest

from timeviper_jax import presets
from timeviper_jax.llm import repeats


@pytest.mark.parametrize(
    "kinds, want",
    [
        ("", []),
        ("M", [("M", 1)]),
        ("*-*-*-", [("*-", 3)]),
        ("M-M-M*", [("M-", 2), ("M*", 1)]),
        ("aab", [("a", 2), ("b", 1)]),
    ],
)
def test_a_repeated_unit_is_one_run(kinds, want):
    found = repeats.find(kinds)
    assert [("".join(unit), times) for _, unit, times in found] == want


@pytest.mark.parametrize("name", ["nano_9b", "nano_12b", "qwen2_7b"])
def test_runs_are_the_layers_in_order_and_few(name):
    kinds = [kind for kind, _ in presets.PRESETS[name].llm.layers]
    found = repeats.find(kinds)
    assert [kind for run in found for kind in run.unit * run.times] == kinds
    starts = [run.start for run in found]
    lengths = [len(run.unit) * run.times for run in found]
    assert starts == [sum(lengths[:i]) for i in range(len(found))]
    assert 2 * sum(len(run.unit) for run in found) < len(kinds)
