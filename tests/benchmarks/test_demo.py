"""The demo's steps: done once, gone on with after a stop, never two at a time."""

import pathlib
import sys

import pytest

from timeviper_jax.benchmarks import needle_long, needles
from timeviper_jax.benchmarks.needles import Ledger, Step, only_one, perform


def step(folder: pathlib.Path, code: str, **options) -> Step:
    makes = folder / "made"
    command = (sys.executable, "-c", code.format(makes=makes))
    return Step(name="make", says="a file", command=command, makes=makes, **options)


MAKE = "open('{makes}', 'a').write('x')"


def run(folder: pathlib.Path, what: Step) -> None:
    with only_one(folder) as lock:
        perform(what, Ledger(folder), lock)


def test_a_finished_step_is_not_done_again(tmp_path, capsys):
    for _ in range(2):
        run(tmp_path, step(tmp_path, MAKE))
    assert (tmp_path / "made").read_text() == "x"
    assert "make: done (a file;" in capsys.readouterr().out


def test_a_step_is_done_again_if_what_it_made_is_gone_or_it_is_another(tmp_path):
    run(tmp_path, step(tmp_path, MAKE))
    (tmp_path / "made").unlink()
    run(tmp_path, step(tmp_path, MAKE))
    run(tmp_path, step(tmp_path, MAKE + " # another"))
    assert (tmp_path / "made").read_text() == "xx"


@pytest.mark.parametrize("status, says", [(1, "failed with status 1"), (75, "goes on")])
def test_a_step_that_does_not_finish_ends_the_demo(tmp_path, status, says):
    ending = step(tmp_path, f"{MAKE}; raise SystemExit({status})")
    with pytest.raises(SystemExit, match=says):
        run(tmp_path, ending)
    assert Ledger(tmp_path).done(ending) is None


def test_seconds_add_up_over_interruptions(tmp_path):
    ledger, make = Ledger(tmp_path), step(tmp_path, MAKE)
    ledger.add(make, 3.0, done=False)
    ledger.add(make, 4.0, done=True)
    assert Ledger(tmp_path).seconds == 7.0


def test_two_at_a_time_are_refused(tmp_path):
    with only_one(tmp_path), pytest.raises(SystemExit, match="in use"):
        with only_one(tmp_path):
            pass


def test_arms_differ_in_their_compression_alone(tmp_path):
    args = needles._parse(["--workdir", str(tmp_path), "--seeds", "2"])
    data, base, *rest = (s for _, s in zip(range(8), needles.steps(args), strict=False))
    assert (data.name, base.name) == ("data", "base")
    commands = {s.name: " ".join(s.command) for s in rest}
    assert set(commands) == {
        f"train {arm}"
        for arm in ("none", "drop", "transv", "none_1", "drop_1", "transv_1")
    }
    for name, command in commands.items():
        arm, _, seed = name.removeprefix("train ").partition("_")
        assert f"configs/needles.py:arm={arm} " in command
        assert f"--config.seed={seed or 0} " in command
        assert f"--config.init_from={tmp_path}/base" in command


def test_long_arms_go_on_from_the_long_base_and_that_from_the_demo(tmp_path):
    args = needles._parse(["--workdir", str(tmp_path), "--seeds", "2"])
    data, base, *arms, drawn = needle_long.steps(args)
    assert data == needles.make_data(args)
    command = " ".join(base.command)
    assert f"{needles.CONFIG}:long " in command
    assert f"--config.init_from={tmp_path}/base" in command
    assert len(arms) == 6
    for arm in arms:
        assert f"--config.init_from={tmp_path}/long/base" in arm.command
        assert any(part.endswith(",long") for part in arm.command)
        assert arm.makes.parent == drawn.makes.parent.parent == tmp_path / "long"


def test_going_on_from_nothing_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="error: .*/base holds no checkpoint"):
        needle_long.main(["--workdir", str(tmp_path)])
