"""The short form of the malformed media, and what the benchmark must notice."""

import json

import pytest

from timeviper_jax.benchmarks.bad_media import __main__ as bad_media


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
