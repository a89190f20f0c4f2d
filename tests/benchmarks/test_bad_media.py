"""The short form of the malformed media, and what the benchmark must notice."""

import json

import numpy as np
import pytest

from timeviper_jax.benchmarks import paired
from timeviper_jax.benchmarks.bad_media import __main__ as bad_media
from timeviper_jax.benchmarks.bad_media import cost


@pytest.mark.slow
def test_nothing_malformed_crashes_hangs_or_goes_unnoticed(tmp_path, capsys):
    bad_media.main(["--short", "--json", "--workdir", str(tmp_path)])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["files"]["files"] == 260
    assert report["files"]["short_decodes_flagged"] > 10
    assert report["manifests"]["outcomes"]["refused"] > 30


def test_a_short_decode_that_nobody_flagged_is_not_ok():
    sound = dict(name="a", outcome="read", short=False, seconds=0.1)
    assert bad_media.summary([sound])["ok"]
    assert not bad_media.summary([{**sound, "short": True}])["ok"]
    died = dict(sound, outcome="died", named=True)
    segfault = dict(died, reason="a: the process that decoded it died of SIGSEGV.")
    assert not bad_media.summary([segfault])["ok"]
    late = dict(died, reason="a: the process that decoded it took over 60 s.")
    assert bad_media.summary([late])["ok"]


def test_a_cost_is_that_of_the_same_round():
    machine = np.array([1.0, 3.0, 2.0, 5.0, 1.5])  # So slow it was, round by round.
    taken = dict(plain=list(machine), checked=list(1.02 * machine))
    found = paired.shares(taken, "plain")["checked"]
    assert found == dict(median=0.02, interval=[0.02, 0.02], ok=True)
    taken["checked"][0] *= 1.5
    found = paired.shares(taken, "plain")["checked"]
    assert found["median"] == 0.02 and not found["ok"]


@pytest.mark.slow
def test_all_ways_to_make_a_row_give_the_same_pixels(capsys):
    cost.main(["--rounds", "1", "--size", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("alone, limits", "alone, workers"),
        *("together, limits", "together, workers"),
    ]
