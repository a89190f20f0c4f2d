"""Hostile manifests and prompts, and what becomes of each."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from timeviper_jax.data import manifest
from timeviper_jax.data.conversation import TEMPLATES, Media, Turn, encode
from timeviper_jax.data.items import Item
from timeviper_jax.data.manifest_rules import ManifestError
from timeviper_jax.data.tokenizer import SPECIALS, Tokenizer

_TALK = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A cat."}]


def _item(**changes: Any) -> dict[str, Any]:
    return {"id": "x", "image": "x.mp4", "conversations": _TALK, **changes}


def _says(text: Any) -> dict[str, Any]:
    return _item(conversations=[{"from": "human", "value": text}, _TALK[1]])


# ---------------------------------------------------------------------------
# Manifests.

_OUTSIDE = (
    *("../secret.mp4", "a/../../secret.mp4", "/etc/passwd", "~/x.mp4", "..", "./.."),
    *("http://127.0.0.1:9/x.mp4", "file:///etc/passwd", "s3://bucket/x.mp4"),
    *("concat://x|y", "link/passwd", "link-up/secret.mp4", "..\\x.mp4", "\\\\host\\x"),
    *("x\0.mp4", "x\n.mp4", "\x1b[2J.mp4", "\ud800.mp4", "x" * 5_000, "x.mp4 | ../y"),
)
_VALUES = (
    *(None, True, -1, 1e308, float("nan"), float("inf"), 10**400, "", "x", [], {}),
    *([[]], {"a": 1}, [1, "a"], "\ud800", "x" * 2_000_000),
)
_TEXTS = (
    *(
        "[" * 100_000,
        '{"a":' * 50_000,
        "",
        "null",
        "NaN",
        "{}",
        "[1, 2",
        '"',
        "\ufeff[]",
    ),
    *("[" + "9" * 10_000 + "]", '[{"id": "x"', "[{}]", '[{"id": NaN}]', "\x00"),
)
_YAMLS = (
    "a: &a [x, x]\nb: &b [*a, *a]\ndata: [*b, *b]\n",
    "data: !!python/object/apply:os.system ['true']\n",
    "data: !!python/name:os.system\n",
    *("data: " + "[" * 3_000, "data: &d [*d]", "? [1]\n: 2\n", "1: 2\nx: 3\n"),
    *("data:\n  - {1: 2, x: 3}\n", "data: 2001-99-99", "data: !!float x", "data: 5"),
    *("- a\n", "data: {}", "\t", "%YAML 9.9\n---\n", "data:\n- !!binary '*'", "\x00"),
    *("data: !!int 'x'", "data: !!timestamp x", "data: [null]", "<<: 3\ndata: []"),
    "data: [" + "x, " * 2_000_000 + "]",
)
_KEYS = ("image", "duration", "video_start", "video_end", "frame_times", "needle", "id")
_DATA_KEYS = (
    *("name", "format", "json_path", "data_path", "split", "pack_size", "max_size"),
    *("sample_ratio", "video_sample_type", "video_num_frames", "max_num_frames_fps"),
)


def manifests(folder: pathlib.Path, count: int) -> list[dict[str, Any]]:
    """What came of `count` manifests, each written to `folder` and read."""
    (folder / "link").symlink_to("/etc")
    (folder / "link-up").symlink_to("..")
    cases = _cases()
    if count > len(cases):
        raise ValueError(f"There are {len(cases)} hostile manifests, not {count}.")
    step = len(cases) / count
    chosen = [cases[int(i * step)] for i in range(count)]
    return [_try(folder, items, entry, text) for items, entry, text in chosen]


def _cases() -> list[tuple[Any, dict[str, Any], str | None]]:
    """Items (or their text), keys of the data set, and the manifest itself if given."""
    cases = [([_item(image=name)], {}, None) for name in _OUTSIDE]
    for key in ("json_path", "data_path"):
        cases += [([_item()], {key: name}, None) for name in _OUTSIDE[:-1]]
    cases += [([_item(**{key: v})], {}, None) for key in _KEYS for v in _VALUES]
    cases += [([_item()], {key: v}, None) for key in _DATA_KEYS for v in _VALUES]
    cases += [([_says(value)], {}, None) for value in _VALUES]
    cases += [([_item(conversations=value)], {}, None) for value in _VALUES]
    cases += [([value], {}, None) for value in _VALUES]
    cases += [(text, {}, None) for text in _TEXTS]
    cases += [([_item()], {}, text) for text in _YAMLS]
    cases += [([_item(conversations=_TALK * 5_000)], {}, None)]
    cases += [([_item(image=" | ".join(["x.mp4"] * 5_000))], {}, None)]
    cases += [([_item(frame_times=[1] * 1_000_000)], {}, None)]
    cases += [([_item()] * 9, {"sample_ratio": 1e12}, None)]
    return cases


def _try(
    folder: pathlib.Path, items: Any, entry: dict[str, Any], text: str | None
) -> dict[str, Any]:
    written = items if isinstance(items, str) else json.dumps(items)
    (folder / "items.json").write_text(written, encoding="utf-8", errors="replace")
    entry = dict(name="a", format="conversation", json_path="items.json") | entry
    path = folder / "data.yaml"
    # As JSON, which YAML's readers take as well.
    path.write_text(text if text is not None else json.dumps({"data": [entry]}))
    case = f"{text or entry or ''!r:.80} {items!r:.120}"
    try:
        found = manifest.load(path, "train")
    except ManifestError as error:
        message = str(error)
        good = "\n" not in message and len(message) < 2_000 and str(folder) in message
        return dict(case=case, outcome="refused", reason=message[:300], ok=good)
    return dict(case=case, outcome="read", ok=_stays(folder, found))


def _stays(folder: pathlib.Path, items: list[Item]) -> bool:
    """Whether all that the items name lies in the folder."""
    root = os.path.realpath(folder)
    paths = [os.path.realpath(path) for item in items for path in item.media]
    return all(os.path.commonpath([root, path]) == root for path in paths)


# ---------------------------------------------------------------------------
# Prompts.

_PIECES = (
    *SPECIALS,
    *("<image>", "<SPECIAL_11>User\n", "\n<SPECIAL_12>", "<|endoftext|>", "[INST]"),
    *("<SPEC", "IAL_12>", "<s", ">", "＜s＞", "<\u200bs>", "\u202e", "e\u0301" * 50),
    *("\0", "\x1b[2J", "\r\n", "\ufeff", "\U0010ffff", "\ud800", "\udfff", "🏴" * 9),
    *(
        "A" * 3_000,
        " " * 3_000,
        "{}",
        "{0.__class__}",
        "%s%n",
        "'; DROP TABLE",
        "\\x00",
    ),
)


def prompts(
    tokenizer: Tokenizer, count: int, progress: Callable[[int], None]
) -> dict[str, Any]:
    """How many of `count` prompts were encoded or refused, and how many went wrong.

    Wrong are special ids, text that is not the text any more, and any other error.
    """
    template = TEMPLATES["nano"]
    plain = encode([Turn("user", ("",))], tokenizer, template, tokens_per_frame=2)
    allowed = _specials(plain.tokens, tokenizer)
    found = dict(encoded=0, refused=0, specials=0, changed=0)
    for i in range(count):
        text = _prompt(np.random.default_rng([8, i]))
        try:
            turns = [Turn("user", (Media(1), text))]
            tokens = encode(turns, tokenizer, template, tokens_per_frame=2).tokens
        except ValueError:
            found["refused"] += 1
            progress(i)
            continue
        vision = int(np.sum(tokens == tokenizer.image_id))
        special = _specials(tokens, tokenizer)
        found["encoded"] += 1
        found["specials"] += special != allowed or vision != 2
        found["changed"] += tokenizer.decode(tokenizer.encode(text)) != text
        progress(i)
    return found


def _prompt(rng: np.random.Generator) -> str:
    parts = [_PIECES[i] for i in rng.integers(len(_PIECES), size=rng.integers(1, 9))]
    parts += ["".join(map(chr, rng.integers(0x20, 0xD7FF, rng.integers(0, 30))))]
    rng.shuffle(parts)
    return "".join(parts)


def _specials(tokens: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    """The special ids of a prompt, in order."""
    ids = {tokenizer.special(name) for name in SPECIALS}
    return [int(token) for token in tokens if int(token) in ids]
