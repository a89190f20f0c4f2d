"""The short form of the faults: a few of each, done to real processes."""

import json

import pytest

from timeviper_jax.benchmarks.faults import __main__ as faults


@pytest.mark.slow
def test_every_fault_of_the_short_form_leaves_a_run_that_goes_on(tmp_path, capsys):
    faults.main(["--short", "--json", "--workdir", str(tmp_path)])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["faults"]["kills"]["within_a_save"] >= 1
    assert report["faults"]["files"]["loaded_silently"] == []
    assert report["faults"]["full_disk"]["steps_after_the_save"] == 0


def test_a_fault_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"no faults \['flood'\]"):
        faults.main(["--only", "flood", "--workdir", str(tmp_path)])
