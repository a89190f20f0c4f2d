"""Who says where the processes of a run are, and what is said if nobody does."""

import jax
import pytest
from absl import flags

import train
from timeviper_jax.training.processes import Place, check, find, join

TOLD = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "0",
}


def test_flags_go_before_the_environment():
    assert find(Place(), TOLD) == ("host:1234", 4, 0)
    assert find(Place(process_id=3), TOLD) == ("host:1234", 4, 3)
    assert find(Place("other:1", 2, 1), {}) == ("other:1", 2, 1)


@pytest.mark.parametrize(
    ("place", "cluster", "words"),
    [
        (Place("host:1234", 4), False, r"process_id.*or --multihost where a cluster"),
        (Place(num_processes=4), False, "what coordinator and process_id should be"),
        (Place("host", 4, 0), False, "'host' names no port: give HOST:PORT"),
        (Place("host:1", 4, 4), True, r"process_id=4 is outside 0\.\.3"),
        (Place("host:1", 0), True, "num_processes=0 is not at least 1"),
    ],
)
def test_what_does_not_make_a_place_is_one_line(place, cluster, words):
    with pytest.raises(ValueError, match=words) as error:
        check(place, cluster=cluster)
    assert "\n" not in str(error.value)


def test_a_number_that_is_none_is_one_line():
    with pytest.raises(ValueError, match="JAX_PROCESS_ID='two' is not a number"):
        find(Place(), TOLD | {"JAX_PROCESS_ID": "two"})


def test_nobody_is_asked_to_wait_alone(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: pytest.fail("Waits."))
    join(Place(), cluster=False)


def test_a_cluster_is_asked_for_what_nobody_said(monkeypatch):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: given.append(args))
    join(Place("host:1234"), cluster=True)
    join(Place("host:1234", 2, 1), cluster=False)
    assert given == [("host:1234", None, None), ("host:1234", 2, 1)]


def test_a_cluster_that_is_none_is_one_line(monkeypatch):
    def initialize(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"no cluster that says .*; give --coordina"):
        join(Place(), cluster=True)


def test_the_command_says_it_and_ends(monkeypatch, tmp_path):
    values = flags.FlagValues()
    train.define_flags(values)
    values(
        [
            *("train.py", "--config=configs/stage2_video.py:smoke", "--process_id=1"),
            *(f"--workdir={tmp_path}", "--coordinator=localhost:1"),
        ]
    )
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit, match="not said what num_processes should be"):
        train.main(["train.py"])
