"""Media by URL, where a config allows it: fetched once, within bounds, into a folder.

Nothing else knows of URLs. What was fetched is a plain file, named by the SHA-256 of
its URL and held to the same limits as any other; no decoder ever sees a network. Why
one was not fetched is noted beside where it would lie, so that a run that resumes
replaces the samples that it replaced before.
"""

import dataclasses
import hashlib
import http.client
import pathlib
import re
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from absl import logging
from tqdm import tqdm

from timeviper_jax.data.items import Item
from timeviper_jax.data.media import Number
from timeviper_jax.data.untrusted import Refused, check_url, is_url
from timeviper_jax.data.whole_file import new_file

_ALLOWED = re.compile(r"https?://[a-z0-9.-]+(:\d{1,5})?/(\S*/)?")
_SILENCE = 30.0  # Seconds without a byte, after which a server is given up.
_PART_BYTES = 1 << 18
_SUFFIX = re.compile(r"\.[a-z0-9]{2,4}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UrlConfig:
    """From where media are fetched, where they are kept, and how much at most."""

    allow: tuple[str, ...] = ()  # What a URL begins with: "https://host/clips/".
    folder: str = "data/fetched"
    max_bytes: int = 1 << 30  # Of a file.
    max_folder_bytes: int = 1 << 40
    seconds: Number = 600  # For a file.
    threads: int = 8

    def __post_init__(self):
        for start in self.allow:
            if not _ALLOWED.fullmatch(start):
                raise ValueError(
                    f"A URL cannot be allowed by {start!r}; give http or https, a host"
                    " and a folder, with a slash at the end: https://host/clips/"
                )

    def place(self, url: str) -> pathlib.Path:
        """Where the file of a URL lies; its suffix says whether it is an image."""
        suffix = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).suffix.lower()
        name = hashlib.sha256(url.encode()).hexdigest()
        known = suffix if _SUFFIX.fullmatch(suffix) else ""
        return pathlib.Path(self.folder, name[:2], f"{name}{known}")


def local(items: Sequence[Item], cfg: UrlConfig) -> list[Item]:
    """The items with all their media on this machine, as far as they could be had."""
    if not cfg.allow:
        return list(items)
    media = {path for item in items for path in item.media}
    _Fetcher(cfg).fetch(sorted(filter(is_url, media)))
    here = {path: str(cfg.place(path)) if is_url(path) else path for path in media}
    return [
        dataclasses.replace(item, media=tuple(here[path] for path in item.media))
        for item in items
    ]


class _Fetcher:
    """Fetches what its folder lacks; from any number of threads."""

    def __init__(self, cfg: UrlConfig):
        self._cfg, self._lock = cfg, threading.Lock()
        self._bytes = sum(map(_size, pathlib.Path(cfg.folder).glob("*/*")))
        self._opener = urllib.request.OpenerDirector()
        # Not the usual opener: that one reads files and data: too.
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
            _Redirects(cfg.allow),
        ):
            self._opener.add_handler(handler)

    def fetch(self, urls: Sequence[str]) -> None:
        missing = [url for url in urls if not self._is_known(url)]
        with ThreadPoolExecutor(self._cfg.threads) as threads:
            done = threads.map(self._fetch, missing)
            for _ in tqdm(done, "fetch", len(missing), disable=not missing):
                pass

    def _is_known(self, url: str) -> bool:
        place = self._cfg.place(url)
        return place.exists() or _note(place).exists()

    def _fetch(self, url: str) -> None:
        place, size = self._cfg.place(url), 0
        try:
            with new_file(place) as file:
                for part in self._parts(url):
                    size += len(part)
                    self._make_room(len(part))
                    file.write(part)
        except Refused as error:
            self._make_room(-size)
            note = _note(place)
            logging.warning("Not fetched: %s: %s; %s says so.", url, error, note)
            note.write_text(f"{url}: {error}\n")

    def _make_room(self, size: int) -> None:
        with self._lock:
            self._bytes += size
            if self._bytes > self._cfg.max_folder_bytes:
                raise OSError(
                    f"{self._cfg.folder} would hold more than"
                    f" {self._cfg.max_folder_bytes} bytes; raise"
                    " data.urls.max_folder_bytes, or delete what is not needed."
                )

    def _parts(self, url: str) -> Iterator[bytes]:
        """What the server sends; raises `Refused` for what is no whole file."""
        cfg, size, end = self._cfg, 0, time.monotonic() + self._cfg.seconds
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
        try:
            with self._opener.open(request, timeout=_SILENCE) as answer:
                declared = answer.length  # None where it comes in chunks.
                if answer.headers.get("Content-Encoding", "identity") != "identity":
                    raise Refused("compressed, though not asked for")
                while part := answer.read1(_PART_BYTES):
                    size += len(part)
                    if size > cfg.max_bytes:
                        raise Refused(f"more than {cfg.max_bytes} bytes")
                    if time.monotonic() > end:
                        raise Refused(f"took over {cfg.seconds:g} s")
                    yield part
        except Refused:
            raise
        # Of a redirection that is no URL, ValueError.
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Refused(" ".join(str(error).split()) or "no answer") from error
        if not size or size != (declared or size):
            raise Refused(f"cut short: {size} of {declared or 'some'} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Leads only to where a URL of a manifest may."""

    max_redirections = 5

    def __init__(self, allow: Sequence[str]):
        self._allow = allow

    def redirect_request(self, request, answer, code, text, headers, url):
        check_url(url, self._allow)
        return super().redirect_request(request, answer, code, text, headers, url)


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # Another process has just given it its name.
        return 0


def _note(place: pathlib.Path) -> pathlib.Path:
    return place.with_suffix(".refused")
