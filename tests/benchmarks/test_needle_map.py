"""The needle map: resumed, it is what it would have been; cells, controls, pictures."""

import json
import pathlib
import types

import numpy as np
import pytest

from tests import tiny
from timeviper_jax.benchmarks import needle_map
from timeviper_jax.data import needle_questions
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.needle_scenes import SceneConfig, draw_scene
from timeviper_jax.data.needle_sources import NAMES
from timeviper_jax.evals.base import Record
from timeviper_jax.llm.hybrid import HybridLM

FLAGS = ("--frames", "32,64", "--depths", "0,0.5,1", "--max_questions", "6")


def answer_late(run_, cell, *, features, **_) -> list[Record]:
    """Right in the second half of a video, unless there is nothing to see."""
    return [
        Record(
            id=question.id,
            video=question.video,
            frames=len(question.times),
            kind=question.kind,
            depth=question.notes["depth"],
            answer=question.answer,
            given=question.answer,
            scores={
                needle_map.METRICS[question.kind]: float(
                    cell.depth >= 0.5 and features(question).any()
                )
            },
        )
        for question in cell.questions()
    ]


def use(monkeypatch, model: HybridLM, store: FeatureStore) -> None:
    """Every run has this model, and finds these features."""
    run_ = types.SimpleNamespace(model=model, features=store)
    monkeypatch.setattr(needle_map.runs, "load", lambda workdir: run_)


@pytest.fixture
def place(tmp_path, monkeypatch) -> pathlib.Path:
    """Scenes on paper; a run is a tiny model that `answer_late` speaks for."""
    store, lines = FeatureStore(tmp_path / "features", "ones"), []
    for i in range(4):
        scene = draw_scene(np.random.default_rng(i), 0, 512, NAMES, SceneConfig())
        video = tmp_path / f"{i}.mp4"
        video.write_text(video.name)
        store.put(str(video), np.ones((512, 1, 2), np.float16))
        lines.append(needle_questions.where(scene, video.name))
    (tmp_path / "heldout.scenes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    use(monkeypatch, tiny.build_lm(), store)
    monkeypatch.setattr(needle_map.runs, "encode_missing", lambda run_, paths: None)
    monkeypatch.setattr(needle_map.runner, "run", answer_late)
    monkeypatch.setattr(needle_map.jax.config, "update", lambda *_: None)
    return tmp_path


def run(place: pathlib.Path, out: str, *more: str) -> dict[str, bytes]:
    """What is written, by the name of the file."""
    workdir = place / out
    needle_map.main(["--workdir", str(workdir), "--data", str(place), *FLAGS, *more])
    return {p.name: p.read_bytes() for p in (workdir / "needle_map").iterdir()}


def test_a_map_has_a_cell_for_each_length_depth_arm_and_question(place, capsys):
    files = run(place, "demo", "--seeds", "2", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(files["needle_map.json"])
    assert 5_000 < len(files["needle_map.png"]) < 300_000
    cells = {
        (c["frames"], c["depth"], c["compression"], c["question"]): c
        for c in found["cells"]
    }
    assert len(cells) == len(found["cells"]) == 2 * 3 * 3 * 3
    for (_, depth, _, _), cell in cells.items():
        assert cell["value"] == (depth >= 0.5)
        assert cell["count"] == 2 * 2  # Two videos, two seeds.
    assert {(d["ours"], d["theirs"]) for d in found["differences"]} == {
        ("transv", "drop"),
        ("none", "transv"),
    }
    assert {d["value"] for d in found["differences"]} == {0.0}
    blind = [c for c in found["controls"] if c["control"] == "text_only"]
    assert {c["question"] for c in blind} == {"mcq", "what", "when"}
    assert {c["value"] for c in blind} == {0.0}


def test_a_stopped_run_goes_on_to_the_same_files(place, monkeypatch):
    left = 7

    def stop(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return answer_late(*args, **kwargs)

    monkeypatch.setattr(needle_map.runner, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        run(place, "stopped")
    (torn,) = (place / "stopped" / "needle_map").glob("none.jsonl")
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-40])  # As if it had been stopped in the middle of a line.
    left = 10**6
    resumed = run(place, "stopped")
    asked = 10**6 - left
    unbroken = run(place, "unbroken")
    for files in (resumed, unbroken):
        del files["needle_map.json"]  # Its command names the folder.
    assert resumed == unbroken
    cells = 3 * 2 * 3 + 2 * 3  # Arms, lengths, depths; two controls at one length.
    assert asked == cells - 7 + 1


def test_another_model_is_asked_anew(place, monkeypatch):
    run(place, "demo", "--arms", "none")
    store = FeatureStore(place / "features", "ones")
    use(monkeypatch, tiny.build_lm(norm_eps=1e-4), store)
    before = place / "demo" / "needle_map" / "none.jsonl"
    lines = before.read_text().splitlines()
    run(place, "demo", "--arms", "none")
    assert len(before.read_text().splitlines()) == 2 * len(lines)


def test_other_data_are_asked_anew(place):
    config, lines = place / "config.json", []
    for seed in (0, 1, 1):
        config.write_text(json.dumps({"seed": seed}))
        run(place, "demo", "--arms", "none")
        text = (place / "demo" / "needle_map" / "none.jsonl").read_text()
        lines.append(len(text.splitlines()))
    assert lines == [lines[0], 2 * lines[0], 2 * lines[0]]


def test_another_split_is_asked_anew(place):
    run(place, "demo", "--arms", "none")
    scenes = (place / "heldout.scenes.jsonl").read_text()
    (place / "other.scenes.jsonl").write_text(scenes)
    run(place, "demo", "--arms", "none", "--split", "other")
    one, other = (
        (place / "demo" / name / "none.jsonl").read_text().splitlines()
        for name in ("needle_map", "needle_map_other")
    )
    assert len(one) == len(other) > 0


def test_a_shuffled_video_is_another_one_with_its_needle_elsewhere(place):
    args = needle_map._parse(["--data", str(place), *FLAGS])
    cells = needle_map.make_cells(args)
    task = needle_map.Task(run="none", cells=tuple(cells), control="vision_shuffled")
    for cell in cells:
        elsewhere = task._elsewhere(cell)
        assert list(elsewhere.by_name) == list(cell.by_name)
        for own, other in zip(cell.videos, elsewhere.videos, strict=True):
            assert own.seconds == other.seconds
            assert own.depth != other.depth
            assert own.pieces != other.pieces


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--depths", "0,2"), "--depths 2.0 is not within 0 to 1"),
        (("--kinds", "mcq,count"), "--kinds count is not one of"),
        (("--frames", "8"), "--frames 8 leaves no room"),
        (("--frames", "32,64", "--max_questions", "1,2,3"), "3 numbers for 2 lengths"),
    ],
)
def test_a_flag_that_cannot_be_is_one_clear_line(flags, says, capsys):
    with pytest.raises(SystemExit):
        needle_map._parse(flags)
    assert says in capsys.readouterr().err


def test_missing_data_are_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: There is no .*heldout.scenes.jsonl"):
        needle_map.main(["--data", str(tmp_path), "--workdir", str(tmp_path / "demo")])
