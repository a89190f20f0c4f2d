"""What the directories of runs say, whole or not."""

import json

import pytest

from timeviper_jax import checksums
from timeviper_jax.training import compare

CONFIG = {
    "seed": 0,
    "stage_order": ["align", "answer"],
    "stages": {"align": {"steps": 2, "lr": 1.0}, "answer": {"steps": 4, "lr": 0.5}},
}


def make_line(step, stage, loss, **values):
    return dict(step=step, stage=stage, loss=loss, goodput=0.5) | values


def make_run(folder, lines, config=None, end="\n"):
    """A run's directory; `end` is what its last line ends with."""
    folder.mkdir()
    text = "\n".join(map(json.dumps, lines))
    (folder / "metrics.jsonl").write_text(text + end)
    for step in (2, 10):  # As text, 2 would be the later one.
        saved = folder / "checkpoints" / str(step) / "run"
        saved.mkdir(parents=True)
        told = dict(step=step, config=config if step == 10 else {})
        (saved / "metadata").write_text(json.dumps(told))
        checksums.write(saved.parent)
    return folder


@pytest.fixture
def two(tmp_path):
    """Two runs that differ in a stage's learning rate, one of them half way."""
    other = json.loads(json.dumps(CONFIG))
    other["stages"]["answer"]["lr"] = 0.25
    whole = [
        make_line(2, "align", 0.1, tokens_per_second=9.0, seconds_step=3.0),
        make_line(3, "answer", 2.0, tokens_per_second=100.0, seconds_step=4.0),
        dict(step=4, stage="answer", validation_loss=1.5),
        make_line(4, "answer", 1.0, tokens_per_second=300.0, seconds_step=5.0),
        make_line(5, "answer", 1.5, tokens_per_second=500.0, seconds_step=6.0),
        dict(step=6, stage="answer", validation_loss=1.75),
        make_line(6, "answer", 1.25, tokens_per_second=200.0, seconds_step=9.5),
    ]
    half = [make_line(2, "align", 0.2), make_line(3, "answer", float("nan"))]
    return (
        make_run(tmp_path / "whole", whole, CONFIG),
        make_run(tmp_path / "half", half, other),
    )


def test_losses_and_rates_are_of_the_last_stage(two):
    row, _ = compare.rows([compare.read(folder) for folder in two])
    assert (row["steps"], row["of_steps"], row["stage"]) == (6, 6, "answer")
    assert (row["loss"], row["best_loss"]) == (1.25, 1.0)
    assert (row["validation_loss"], row["best_validation_loss"]) == (1.75, 1.5)
    assert row["tokens_per_second"] == (200 + 300) / 2
    assert row["frames_per_second"] is None
    assert row["stage_seconds"] == {"align": {"step": 3.0}, "answer": {"step": 6.5}}


def test_runs_show_the_fields_in_which_they_differ(two):
    rows = compare.rows([compare.read(folder) for folder in two])
    assert [row["overrides"] for row in rows] == [
        {"stages.answer.lr": 0.5},
        {"stages.answer.lr": 0.25},
    ]


def test_the_table_leaves_out_what_nobody_knows(two, capsys):
    compare.main([str(folder) for folder in two])
    head, whole, half = (x.split() for x in capsys.readouterr().out.splitlines())
    assert head[1:3] == ["stages.answer.lr", "steps"]
    assert whole[1:] == "0.5 6/6 1.2500 1.0000 1.7500 1.5000 250 0.500".split()
    assert half[1:] == "0.25 3/6 - - - - - 0.500".split()


def test_json_has_no_nan(two, capsys):
    compare.main([*map(str, two), "--json"])

    def refuse(name):
        raise AssertionError(f"{name} is no JSON.")

    _, half = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert half["loss"] is half["best_loss"] is None and half["steps"] == 3


def test_a_line_that_is_half_written_is_not_there_yet(tmp_path):
    lines = [make_line(1, "align", 3.0), make_line(2, "align", 2.0)]
    whole = make_run(tmp_path / "whole", lines, CONFIG)
    half = make_run(tmp_path / "half", lines, CONFIG, end="")
    assert compare.read(whole)["steps"] == 2
    assert compare.read(half)["steps"] == 1


def test_a_run_that_wrote_nothing_yet_has_a_row(tmp_path):
    (tmp_path / "empty").mkdir()
    runs = [compare.read(tmp_path / "empty")]
    assert compare.table(runs).splitlines()[1].split()[1:] == ["0", *6 * "-"]
    (row,) = compare.rows(runs)
    assert row["overrides"] == {} and row["of_steps"] is None


def test_a_checkpoint_that_is_not_finished_says_nothing(tmp_path):
    run = make_run(tmp_path / "run", [make_line(1, "align", 3.0)], CONFIG)
    (run / "checkpoints" / "10" / checksums.MANIFEST).unlink()
    assert compare.read(run)["config"] == {}


@pytest.mark.parametrize("name", ["nowhere", "damaged", "torn"])
def test_what_cannot_be_read_is_said_in_a_line(tmp_path, name):
    run = make_run(tmp_path / "damaged", [make_line(1, "align", 3.0)], CONFIG)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    run = make_run(tmp_path / "torn", [make_line(1, "align", 3.0)], CONFIG)
    (run / "checkpoints" / "10" / "run" / "metadata").write_text("{")
    told = {
        "nowhere": "nowhere is no folder",
        "damaged": r"damaged/metrics.jsonl is damaged: line 2 is no JSON",
        "torn": r"torn/checkpoints/10/run/metadata is damaged: it is no JSON",
    }
    with pytest.raises(SystemExit, match=f"^error: .*{told[name]}"):
        compare.main([str(tmp_path / name)])
