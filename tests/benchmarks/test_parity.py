"""The comparison with recordings: it passes what is equal and catches what is not."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from golden_cases import GOLDEN, load

from timeviper_jax.benchmarks.parity import case_names, main
from timeviper_jax.benchmarks.recorded.case import Case, Tally

KEYS = [
    "case",
    "compared",
    "max_abs_error",
    "max_rel_grad_error",
    "kept_equal",
    "tokens_equal",
    "ok",
]


def _copy(case, folder, change=lambda description, arrays: None):
    description, arrays = load(case)
    change(description, arrays)
    (folder / f"{case}.json").write_text(json.dumps(description))
    safetensors.numpy.save_file(arrays, folder / f"{case}.safetensors")


def _run(folder, capsys, *arguments):
    code = main(["--cases", str(folder), "--json", *arguments])
    captured = capsys.readouterr()
    return code, list(map(json.loads, captured.out.splitlines())), captured.err


def test_equal_recordings_pass(tmp_path, capsys):
    for case in ("tome_17_to16", "nano_plain_g1_chunk16", "nano_pdrop_uni_layer0_ca"):
        shutil.copy(GOLDEN / f"{case}.json", tmp_path)
        shutil.copy(GOLDEN / f"{case}.safetensors", tmp_path)
    shutil.copy(GOLDEN / "rounding_tables.json", tmp_path)  # No recording.
    code, lines, errors = _run(tmp_path, capsys)
    assert code == 0, errors
    assert [line["ok"] for line in lines] == [True] * 3
    thinned, plain, tome = lines
    for line in lines:
        assert list(line) == KEYS
        assert 0 < line["max_abs_error"] < 2e-5
        assert 0 < line["max_rel_grad_error"] < 1e-4
    assert thinned["kept_equal"] and thinned["tokens_equal"] and plain["tokens_equal"]
    assert tome["kept_equal"] is tome["tokens_equal"] is None
    for name in ("out.hidden.07", "out.decode.logits", "grad.backbone.norm_f.weight"):
        assert name in plain["compared"]
    assert "out.eval.trace.0.kept" in thinned["compared"]


def test_what_differs_or_cannot_be_run_is_not_ok(tmp_path, capsys):
    case = "preproc_siglip-vit-so400m-384px_resize-naive"

    def one_pixel(_, arrays):
        arrays["out.pixel_values.2"][0, 3, 4] += 1 / 255

    _copy(case, tmp_path, one_pixel)
    _copy("tome_17_to16", tmp_path, lambda about, _: about.update(kind="teleport"))
    _copy("tome_desc", tmp_path, lambda _, arrays: arrays.pop("in.x"))
    _copy("tome_36x64_to4", tmp_path)
    path = tmp_path / "tome_36x64_to4.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    code, lines, errors = _run(tmp_path, capsys)
    assert code == 1
    assert [list(line) for line in lines] == [KEYS] * 4
    assert not any(line["ok"] for line in lines)
    assert lines[0]["max_abs_error"] == pytest.approx(1 / 255, rel=1e-3)
    assert "out.pixel_values.2 is off by" in errors
    assert "kind='teleport' is not one of" in errors
    assert "in.x" in errors and "SafetensorError" in errors


def _tally(**arrays):
    return Tally(Case("case", {}, arrays))


def test_each_kind_of_difference_is_caught():
    ones = np.ones((2, 3), np.float32)
    for name, compare, wrong in (
        ("value", lambda t, x: t.values({"out.a": x}), ones + 2e-4),
        ("nan", lambda t, x: t.values({"out.a": x}), np.full((2, 3), np.nan)),
        ("shape", lambda t, x: t.values({"out.a": x}), ones[:1]),
        ("kept", lambda t, x: t.kept("out.a", x), ones[:, :2]),
        ("tokens", lambda t, x: t.tokens("out.a", x), 2 * ones),
    ):
        right, off = _tally(**{"out.a": ones}), _tally(**{"out.a": ones})
        compare(right, ones)
        compare(off, wrong)
        assert right.line("case")["ok"], name
        assert not off.line("case")["ok"], name
        json.loads(json.dumps(off.line("case"), allow_nan=False))


def test_gradients_are_measured_against_their_own_size():
    want = {"grad.a": np.full(3, 1e-2), "grad.b": np.full(3, 10.0)}
    tally = _tally(**want)
    tally.gradients({"a": np.full(3, 1e-2 + 5e-6), "b": np.full(3, 10.0)})
    line = tally.line("case")
    assert line["ok"] and line["max_rel_grad_error"] == pytest.approx(5e-4)
    off = _tally(**want)
    off.gradients({"a": np.full(3, 1.2e-2), "b": np.full(3, 10.0)})
    assert not off.line("case")["ok"]
    missing = _tally(**want)
    missing.gradients({"a": want["grad.a"]})
    assert not missing.line("case")["ok"]


def test_a_case_of_which_nothing_is_compared_is_not_ok():
    assert not _tally(**{"out.a": np.ones(2)}).line("case")["ok"]


def test_a_folder_without_recordings_is_an_error(tmp_path, capsys):
    assert case_names(tmp_path) == []
    with pytest.raises(SystemExit):
        main(["--cases", str(tmp_path)])
    assert "holds no recording" in capsys.readouterr().err
