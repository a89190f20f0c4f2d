"""Reading text that strangers wrote: bounded, plain, and within its folder."""

import functools
import json
import math
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What RFC 3986 lets stand in a URL.
_PLAIN_URL = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Refused(ValueError):
    """Something that is not taken from a stranger; the message says why."""


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases and tags.

    A few hundred bytes of aliases can stand for gigabytes.
    """

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise Refused("has an alias (*name); write it out")
        if getattr(event, "tag", None) is not None:
            raise Refused(f"has a tag, {event.tag!r:.60}; write plain values")
        return super().compose_node(parent, index)


def read_text(path: pathlib.Path, max_bytes: int) -> str:
    """The whole of a plain file of UTF-8."""
    try:
        if not path.is_file():
            raise Refused("no such file; check the path")
        size = path.stat().st_size
        if size > max_bytes:
            raise Refused(f"{size} bytes, but the limit is {max_bytes}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"cannot be read ({_one_line(error)})") from error


def parse_yaml(text: str) -> Any:
    """Plain values."""
    loader = _PlainLoader(text)
    try:
        return loader.get_single_data()
    except Refused:
        raise
    # Dates that are none are ValueErrors.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Refused(f"cannot be read ({_one_line(error)})") from error
    finally:
        loader.dispose()


def parse_json(text: str) -> Any:
    """One JSON value; neither NaN nor numbers of thousands of digits."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        raise Refused(f"no JSON ({_one_line(error)})") from error


def _no_number(name: str) -> None:
    raise Refused(f"{name} is no number of JSON")


def _one_line(error: Exception) -> str:
    return " ".join(f"{str(error) or type(error).__name__:.300}".split())


def shown(value: Any) -> str:
    """A value for a message, however large it is or whatever controls it holds."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**18:
        return "a number of many digits"
    return f"{value!r:.60}"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and abs(value) < 1e18 and math.isfinite(value)


def check_text(text: str, max_chars: int) -> None:
    """Raises `Refused` unless `text` is Unicode, and not too long."""
    if len(text) > max_chars:
        raise Refused(f"{len(text)} characters, but the limit is {max_chars}")
    if half := _SURROGATE.search(text):
        raise Refused(f"half a surrogate pair at character {half.start()}")


def is_url(name: str) -> bool:
    """Whether a name would lead to a network, or to wherever its scheme does."""
    return "://" in name


def check_url(url: str, allowed: Sequence[str]) -> None:
    """Raises `Refused` unless the URL leads below one of those that are allowed."""
    if not allowed:
        raise Refused("a URL, but only files are read (data.urls.allow allows some)")
    if len(url) > 4096 or not _PLAIN_URL.fullmatch(url):
        raise Refused("no URL as it is written down: percent-encode it")
    if not url.startswith(tuple(allowed)):
        raise Refused("not below the URLs that are allowed (data.urls.allow)")
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    if ".." in re.split(r"[/\\]", path):
        raise Refused("leads out of its folder; use a URL without '..'")


def check_name(name: str) -> None:
    """Raises `Refused` unless `name` leads further down, as far as links do not."""
    if is_url(name):
        raise Refused("a URL, but only files are read; fetch it first")
    if len(name) > 4096 or _CONTROL.search(name) or _SURROGATE.search(name):
        raise Refused("no name of a file")
    if name.startswith(("/", "\\", "~")) or ".." in re.split(r"[/\\]", name):
        raise Refused("leads out of its folder; use a path below it, without '..'")


class Root:
    """A folder that files must really lie in, wherever links lead."""

    def __init__(self, folder: str | os.PathLike):
        self._folder = os.path.realpath(folder)
        # Of many files in a folder only the last part of each path is looked at.
        self._real_folder = functools.lru_cache(1 << 16)(os.path.realpath)
        self._checked: dict[str, None] = {}

    def check(self, path: str) -> None:
        """Raises `Refused` if a link takes `path` out of the folder."""
        if path in self._checked:
            return
        try:
            real = os.path.join(
                self._real_folder(os.path.dirname(path)), os.path.basename(path)
            )
            if os.path.islink(real):
                real = os.path.realpath(real)
        except (OSError, ValueError) as error:
            raise Refused(f"no name of a file ({_one_line(error)})") from error
        if os.path.commonpath([self._folder, os.path.normpath(real)]) != self._folder:
            raise Refused(f"a link takes it out of {self._folder}")
        self._checked[path] = None


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines and their numbers, from 1; only a line feed ends one, as JSON lines say."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line
