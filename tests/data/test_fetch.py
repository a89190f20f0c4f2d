"""URLs are followed where they are allowed, whole or not at all, and bounded."""

import dataclasses
import http.server
import json
import pathlib
import re
import threading

import numpy as np
import pytest
import yaml

from timeviper_jax.data.features import file_digest
from timeviper_jax.data.fetch import UrlConfig
from timeviper_jax.data.images import Fit
from timeviper_jax.data.manifest_rules import ManifestError
from timeviper_jax.data.pipeline import DataConfig, load_items, make_batches
from timeviper_jax.data.tokenizer import ByteTokenizer

MOST = 100_000


class _Handler(http.server.BaseHTTPRequestHandler):
    """Says whatever the last part of the path asks for."""

    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        whole = self.server.film
        if name in self.server.moved:
            self.send_response(302)
            self.send_header("Location", self.server.moved[name])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(404 if name == "missing.mp4" else 200)
        if name == "packed.mp4":
            self.send_header("Content-Encoding", "gzip")
        size = 2 * len(whole) if name == "short.mp4" else len(whole)
        size = 0 if name == "empty.mp4" else size
        if name != "endless.mp4":
            self.send_header("Content-Length", str(size))
        self.end_headers()
        if name == "endless.mp4":
            whole *= 2 + MOST // len(whole)
        self.wfile.write(whole[:size] if name == "empty.mp4" else whole)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(film):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.film, server.asked = film("3s.mp4", 3).read_bytes(), []
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.moved = {
        "within.mp4": "/clips/a.mp4",
        "outside.mp4": "/private/a.mp4",
        "file.mp4": "file:///etc/passwd",
        "ftp.mp4": "ftp://127.0.0.1/a.mp4",
        "nowhere.mp4": "http://[/a.mp4",
        "circle.mp4": "/clips/circle.mp4",
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(server, tmp_path, monkeypatch):
    """A manifest of these names below the server, and what may be fetched of it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def config(*names, **changes):
        talk = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A film."},
        ]
        names = [n if "://" in n else f"{server.url}/clips/{n}" for n in names]
        items = [dict(image=n, conversations=talk) for n in names]
        (tmp_path / "items.json").write_text(json.dumps(items))
        entry = dict(name="web", format="conversation", json_path="items.json")
        path = tmp_path / "data.yaml"
        path.write_text(yaml.safe_dump({"data": [entry]}))
        urls = dict(allow=(f"{server.url}/clips/",), folder=str(tmp_path / "fetched"))
        return DataConfig(
            manifest=str(path),
            batch_size=2,
            num_frames=4,
            text_tokens=60,
            tokens_per_frame=2,
            fit=Fit(size=16),
            urls=UrlConfig(**{**urls, "max_bytes": MOST, **changes}),
        )

    return config


def test_what_is_fetched_is_a_file_like_any_other(server, config, film):
    cfg = config("a.mp4", "b.mp4?size=1")
    first, second = load_items(cfg)
    (here,) = first.media
    assert pathlib.Path(here).suffix == ".mp4" and second.media != first.media
    # Features are known by content, so both share theirs with the original.
    assert pathlib.Path(here).read_bytes() == film("3s.mp4", 3).read_bytes()
    assert file_digest(here) == file_digest(second.media[0])
    batch = next(make_batches(cfg, ByteTokenizer(), seed=0))
    assert np.any(batch.frames)
    asked = len(server.asked)
    assert load_items(cfg) == [first, second]
    assert len(server.asked) == asked  # Nothing is fetched twice.


def test_redirections_stay_where_urls_may_lead(server, config, caplog):
    bad = ("outside.mp4", "file.mp4", "ftp.mp4", "nowhere.mp4", "circle.mp4")
    cfg = config("within.mp4", *bad)
    asked = len(server.asked)
    good, *others = load_items(cfg)
    assert pathlib.Path(*good.media).exists()
    for item, name in zip(others, bad, strict=True):
        assert not pathlib.Path(*item.media).exists()
        assert f"Not fetched: {server.url}/clips/{name}: " in caplog.text
    assert not any("private" in path for path in server.asked[asked:])
    batches = make_batches(cfg, ByteTokenizer(), seed=0)
    next(batches)
    assert batches.bad == batches.skipped > 0  # As other files that cannot be read.


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.mp4", "404"),
        ("endless.mp4", "more than 100000 bytes"),
        ("short.mp4", r"cut short: \d+ of \d+ bytes|IncompleteRead"),
        ("empty.mp4", "cut short: 0 of some bytes"),
        ("packed.mp4", "compressed, though not asked for"),
        ("late.mp4", "took over 1e-09 s"),
        ("http://127.0.0.1:9/a.mp4", "refused"),
    ],
)
def test_what_is_no_whole_file_leaves_a_note(server, config, tmp_path, name, reason):
    seconds = 1e-9 if name == "late.mp4" else 60
    allow = (f"{server.url}/clips/", "http://127.0.0.1:9/")
    cfg = config("a.mp4", name, allow=allow, seconds=seconds)
    load_items(cfg)
    notes = [p.read_text() for p in (tmp_path / "fetched").glob("*/*.refused")]
    (note,) = [note for note in notes if name in note]
    assert re.search(reason, note)
    asked = len(server.asked)
    load_items(cfg)
    assert len(server.asked) == asked  # A run that resumes does not try again.


def test_a_folder_that_is_full_ends_the_run(config):
    with pytest.raises(OSError, match="raise data.urls.max_folder_bytes"):
        load_items(config("a.mp4", max_folder_bytes=1_000))


@pytest.mark.parametrize(
    "url, reason",
    [
        ("{}/private/a.mp4", "not below the URLs that are allowed"),
        ("{}/clips/../private/a.mp4", "leads out of its folder"),
        ("{}/clips/%2e%2E/private/a.mp4", "leads out of its folder"),
        ("{}@evil.example/clips/a.mp4", "not below"),
        ("https://evil.example/clips/a.mp4", "not below"),
        ("file:///etc/passwd", "not below"),
        ("{}/clips/a b.mp4", "percent-encode it"),
        ("{}/clips/a\\b.mp4", "percent-encode it"),
        ("{}/clips/a\r\nHost: x", "percent-encode it"),
    ],
)
def test_other_urls_are_refused_before_anything_is_fetched(server, config, url, reason):
    asked = len(server.asked)
    with pytest.raises(ManifestError, match=f"item 1 .*{reason}"):
        load_items(config("a.mp4", url.format(server.url)))
    assert len(server.asked) == asked


def test_urls_are_off_unless_allowed(config):
    cfg = config("a.mp4")
    off = dataclasses.replace(cfg, urls=UrlConfig())
    with pytest.raises(ManifestError, match="only files are read .data.urls.allow"):
        load_items(off)


@pytest.mark.parametrize(
    "start",
    ["https://host", "ftp://host/", "https://host/clips", "https://u@host/"],
)
def test_what_is_allowed_is_a_folder_of_a_host(start):
    with pytest.raises(ValueError, match="A URL cannot be allowed by"):
        UrlConfig(allow=(start,))
