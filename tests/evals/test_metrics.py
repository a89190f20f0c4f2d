"""Metrics of captions and spans: equal to the published programs' recorded numbers."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from timeviper_jax.evals import dense
from timeviper_jax.evals.cider import cider, words
from timeviper_jax.evals.meteor import Meteor
from timeviper_jax.evals.spans import Event, parse_events, parse_span, span_overlap

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CAPTIONS = json.loads((GOLDEN / "caption_scores.json").read_text())
DENSE = json.loads((GOLDEN / "dense_scores.json").read_text())
GIVEN = [pair["given"] for pair in CAPTIONS["pairs"]]
REFERENCES = [pair["references"] for pair in CAPTIONS["pairs"]]


def events(recorded: list[dict]) -> list[Event]:
    return [Event(tuple(map(float, e["span"])), e["text"]) for e in recorded]


def video(name: str) -> tuple[list[Event], list[Event]]:
    recorded = DENSE["videos"][name]
    return events(recorded["pred"]), events(recorded["true"])


def recorded_meteor(name: str):
    """METEOR as it was recorded for a video's captions; none is known together."""
    given, true = video(name)
    given = sorted(given, key=lambda event: event.span[0])
    table = {
        (words(other.text), words(event.text)): DENSE["soda"][name]["meteor"][i][j]
        for i, other in enumerate(true)
        for j, event in enumerate(given)
    }

    def score(captions, references):
        pairs = zip(captions, references, strict=True)
        return np.nan, [table[caption, reference] for caption, (reference,) in pairs]

    return score


@pytest.fixture(scope="module")
def meteor():
    jar = os.environ.get("METEOR_JAR", "")
    if not (jar and shutil.which("java")):
        pytest.skip("METEOR_JAR names no meteor-1.5.jar, or there is no Java.")
    with Meteor(jar) as program:
        yield program


@pytest.mark.parametrize("text, tokens", CAPTIONS["tokens"])
def test_words_are_those_of_the_penn_treebank(text, tokens):
    assert words(text) == tokens


def test_cider_is_that_of_coco_caption():
    scores = cider(GIVEN, REFERENCES)
    np.testing.assert_allclose(scores, CAPTIONS["cider"]["scores"], atol=1e-6)
    assert np.mean(scores) == pytest.approx(CAPTIONS["cider"]["mean"], abs=1e-6)


def test_cider_of_what_every_video_says_is_zero():
    # In one document every n-gram is in all of them, and so says nothing.
    assert cider(["add oil"], [["add oil"]]) == [0]
    assert cider(["", "add oil"], [["cut it"], ["boil"]]) == [0, 0]
    with pytest.raises(ValueError, match="2 captions for 1"):
        cider(["a", "b"], [["a"]])


@pytest.mark.parametrize("name", DENSE["videos"])
def test_dense_captions_score_as_the_reference_recorded(name):
    found, recorded = dense.score_events(*video(name), None), DENSE["dense"][name]
    assert found["CIDEr"] == pytest.approx(recorded["CIDER"], abs=1e-6)
    assert found["F1"] == pytest.approx(recorded["F1_Score"], abs=1e-6)
    for low in dense.THRESHOLDS:
        for kind in ("Precision", "Recall"):
            value = recorded[f"{kind}@{low}"]
            assert found[f"{kind.lower()} {low}"] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", DENSE["videos"])
def test_soda_is_that_of_its_authors(name):
    given, true = (
        [Event(event.span, words(event.text)) for event in listed]
        for listed in video(name)
    )
    f1 = DENSE["soda"][name]["precision_recall_f1"][2]
    found = dense.score_story(given, true, recorded_meteor(name))
    assert found == pytest.approx(f1, abs=1e-6)


def test_meteor_is_that_of_its_program(meteor):
    together, each = meteor(GIVEN, REFERENCES)
    assert together == pytest.approx(CAPTIONS["meteor"]["mean"], abs=1e-6)
    np.testing.assert_allclose(each, CAPTIONS["meteor"]["scores"], atol=1e-6)
    for name, recorded in DENSE["dense"].items():
        found = dense.score_events(*video(name), meteor)
        soda = DENSE["soda"][name]["precision_recall_f1"][2]
        assert found["METEOR"] == pytest.approx(recorded["METEOR"], abs=1e-6)
        assert found["SODA_c"] == pytest.approx(soda, abs=1e-6)


def test_meteor_says_what_it_lacks(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="--meteor_jar"):
        Meteor(tmp_path / "meteor-1.5.jar")
    (tmp_path / "meteor-1.5.jar").touch()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="needs Java"):
        Meteor(tmp_path / "meteor-1.5.jar")


def test_no_events_score_nothing():
    true = [Event((0.0, 5.0), "cut")]
    found = dense.score_events([], true, recorded_meteor("touching"))
    assert set(found.values()) == {0}
    assert {"METEOR", "SODA_c", "CIDEr", "F1", "F1 0.9"} <= set(found)


def test_where_nothing_happens_whatever_is_said_scores_nothing():
    given = [Event((0.0, 5.0), "cut")]
    found = dense.score_events(given, [], None)
    assert found["recall 0.3"] == 0 and set(found.values()) == {0}


def test_a_story_told_backwards_matches_one_event():
    assert dense.soda(np.eye(3)) == 1
    assert dense.soda(np.eye(3)[::-1]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "text, found",
    [
        (
            "90 - 102 seconds, spread it.\n110 to 120 seconds: cut for 5 to 10 minutes",
            [((90, 102), "spread it."), ((110, 120), "cut for 5 to 10 minutes")],
        ),
        (
            "1. from 0.5s - 2s, begin. 3 – 4 sec, end; go on",
            [((0.5, 2), "begin."), ((3, 4), "end; go on")],
        ),
        ("7 - 9 seconds", []),
        ("nothing happens", []),
        ("", []),
    ],
)
def test_events_are_read_line_by_line_or_sentence_by_sentence(text, found):
    assert parse_events(text) == found


@pytest.mark.parametrize(
    "text, span",
    [
        ("00012 to 00017", (12, 17)),
        ("from 1 to 2, or rather 3.5 to 4", (3.5, 4)),
        ("at 12", None),
        ("", None),
    ],
)
def test_the_last_span_of_an_answer_counts(text, span):
    assert parse_span(text) == span


@pytest.mark.parametrize(
    "one, other, overlap",
    [
        ((0.0, 10.0), (0.0, 10.0), 1),
        ((0.0, 10.0), (5.0, 15.0), 1 / 3),
        ((0.0, 5.0), (5.0, 10.0), 0),
        ((9.0, 3.0), (3.0, 9.0), 0),
        (None, (3.0, 9.0), 0),
    ],
)
def test_overlap_is_intersection_over_union(one, other, overlap):
    assert span_overlap(one, other) == pytest.approx(overlap)


def test_overlap_is_that_of_the_reference():
    recorded = CAPTIONS["spans"]
    pairs = zip(recorded["given"], recorded["true"], strict=True)
    found = [
        span_overlap(tuple(map(float, one)), tuple(map(float, other)))
        for one, other in pairs
    ]
    np.testing.assert_allclose(found, recorded["iou"], atol=1e-6)
    assert 100 * np.mean(found) == pytest.approx(recorded["mIoU"], abs=1e-6)
    for low in (0.3, 0.5, 0.7):
        share = 100 * np.mean(np.array(found) >= low)
        assert share == pytest.approx(recorded[f"R@1 {low}"], abs=1e-6)
