"""The long-video benchmark measures what it says, on a film of seconds."""

import json

import pytest

from timeviper_jax.benchmarks.long_video import __main__ as program
from timeviper_jax.benchmarks.long_video import film
from timeviper_jax.data.video import probe, read_frames


def test_the_film_has_the_needle_where_it_says_and_its_content_varies(tmp_path):
    path = tmp_path / "film.mp4"
    film.make(path, 112)
    info = probe(path)
    assert (info.duration, info.width, info.height) == (112, film.WIDTH, film.HEIGHT)
    # The photograph leaves a border of a sixteenth of the film around it.
    times = [99.5, 100.5, 107.5]
    before, shown, again = read_frames(path, times, 32)[:, 3:29, 3:29].astype(int)
    assert abs(shown - again).mean() < 8 < abs(shown - before).mean()
    frames = read_frames(path, [k + 0.5 for k in range(0, 96, 12)], 32).astype(int)
    far = [abs(a - b).mean() for a, b in zip(frames, frames[1:], strict=False)]
    assert min(far) > 4


def measured(seconds, peak=500, kept=1):
    return {
        "seconds": {"watch": seconds, "answer": 1.0, "second answer": 0.1},
        "peak_bytes": peak << 20,
        "kept_bytes": {"attention": kept << 20, "transfer": 0},
        "filled_bytes": {"attention": 1000, "transfer": 0},
        "encoded_bytes": 1 << 20,
        "answer": "coffee",
    }


def fed(drift=0):
    samples = [
        {
            "frames": n,
            "seconds": n / 100,
            "resident_bytes": (100 + 5 * n + drift * (n > 500)) << 20,
            "cache_bytes": 5 * n << 20,
        }
        for n in (10, 100, 500, 1000)
    ]
    filled = {"attention": 64_000, "transfer": 128_000}
    return {
        "samples": samples,
        "answers": [(10, 0.5)],
        "filled_bytes": filled,
        "peak_bytes": 900 << 20,
        "policy": "blocks",
        "block_frames": 256,
    }


def results(watched, ended):
    second = program.second_question(watched[4096], measured(9.0), 4096)
    values = program.by_frames(watched)
    return values | {"second_question": second, "open_ended": program.open_ended(ended)}


def test_goals_are_met_or_missed_by_what_is_measured():
    good = {256: measured(3), 1024: measured(10), 4096: measured(44, 802, 2)}
    found = results(good, fed())
    assert found["kept_mib"][4096] == 3
    assert found["seconds_per_frame"][1024] == pytest.approx(10 / 1024, rel=1e-3)
    assert found["open_ended"]["apart_from_caches_varies"] == 0
    assert found["open_ended"]["cache_bytes_per_frame"]["dropped_keys_values"] == 128
    goals = program.goals(found)
    assert [goal["met"] for goal in goals.values()] == [True] * 5
    bad = good | {1024: measured(8), 4096: measured(40, 804, 2)}
    missed = program.goals(results(bad, fed(drift=20)))
    rise, drift, same, new, flat = missed.values()
    assert (rise["measured"], rise["met"]) == (301, False)
    assert (drift["met"], flat["met"], same["met"], new["met"]) == (
        *(False, False, True, True),
    )


@pytest.mark.slow
def test_the_command_measures_a_film_of_seconds(tmp_path, capsys):
    command = ["--preset=tiny", "--frames=8,24", "--film_frames=24"]
    command += ["--open_frames=600", f"--data={tmp_path}", f"--out={tmp_path}/out"]
    program.main([*command, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["peak_rss_mib"]) == {"8", "24"}
    assert printed["peak_rss_mib"]["24"] > printed["start_up"]["peak_rss_mib"] > 50
    parts = printed["seconds_by_part"]["24"]
    assert min(parts[name] for name in ("decode", "encode", "prefill", "answer")) > 0
    assert printed["kept_parts_mib"]["24"]["residual"] > 0  # A stage that ranks.
    ended = printed["open_ended"]
    assert list(map(int, ended["rss_mib"]))[-1] == 600
    assert len(ended["answer_seconds"]) == 3
    (written,) = (tmp_path / "out").iterdir()
    assert json.loads(written.read_text()) == printed
    program.main([*command, "--resume"])
    assert "    24 " in capsys.readouterr().out


def test_more_frames_than_the_film_has_are_an_error(capsys):
    with pytest.raises(SystemExit):
        program.parse(["--frames=8,24", "--film_frames=16"])
    assert "--frames 24 of a film of 16" in capsys.readouterr().err
