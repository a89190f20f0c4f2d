"""A tokenizer.json from a tekken file splits text as the file ranks it."""

import base64
import json
import random

import pytest

from timeviper_jax.data.tekken import main
from timeviper_jax.data.tokenizer import JsonTokenizer

NUM_SPECIAL = 14
# The whole words of the pattern: a capital or not, then letters; spaces; the rest.
PATTERN = r" ?[A-Za-z]+|[0-9]|\s+|[^\sA-Za-z0-9]+"
LONGER = (
    " t",
    "th",
    "he",
    "the",
    " the",
    "in",
    "ing",
    "an",
    "and",
    " and",
    "\n\n",
    "é",
)


def _tekken(path, **changes):
    tokens = [bytes([i]) for i in range(256)] + [text.encode() for text in LONGER]
    tokens += [b"beyond the size"]
    vocab = [
        dict(rank=i, token_bytes=base64.b64encode(token).decode(), token_str=None)
        for i, token in enumerate(tokens)
    ]
    config = dict(
        pattern=PATTERN,
        default_vocab_size=256 + len(LONGER) + NUM_SPECIAL,
        default_num_special_tokens=NUM_SPECIAL,
    )
    random.Random(0).shuffle(vocab)
    path.write_text(json.dumps(dict(config=config, vocab=vocab) | changes))


def _merge(text):
    """The slow way: again and again the pair whose union ranks first."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {text.encode(): 256 + i for i, text in enumerate(LONGER)}
    parts = [bytes([byte]) for byte in text.encode()]
    while True:
        pairs = [
            (ranks[a + b], i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in ranks
        ]
        if not pairs:
            return [NUM_SPECIAL + ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tekken")
    _tekken(folder / "tekken.json")
    main([str(folder / "tekken.json"), str(folder / "tokenizer.json")])
    return JsonTokenizer(folder / "tokenizer.json")


def test_words_are_merged_by_rank(tokenizer):
    words = [
        "the",
        " the",
        " thing",
        "and",
        " handing",
        "\n\n",
        "é!",
        "7",
        "th",
        "日本",
    ]
    for word in words:
        assert tokenizer.encode(word) == _merge(word), word
    text = "the thing and 7 hands\n\n日本é"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_come_first_and_are_numbered(tokenizer):
    assert tokenizer.special("<SPECIAL_12>") == 12
    assert tokenizer.special("[INST]") == 3
    assert tokenizer.eos_id == 2
    assert tokenizer.vocab_size == tokenizer.image_id == 256 + len(LONGER) + NUM_SPECIAL
    assert min(tokenizer.encode("<SPECIAL_12></s>the")) >= NUM_SPECIAL


def test_names_in_the_file_are_used(tmp_path):
    _tekken(tmp_path / "t.json", special_tokens=[dict(rank=2, token_str="</s>")])
    main([str(tmp_path / "t.json"), str(tmp_path / "tokenizer.json")])
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.special("<SPECIAL_3>") == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vocab=[]), "ranks 0 sequences where its config says 268"),
        (dict(vocab=[dict(rank=0, token_bytes="QQ==")]), "lacks 255 of the 256 bytes"),
    ],
)
def test_what_is_no_tekken_file_is_an_error(tmp_path, changes, message):
    _tekken(tmp_path / "t.json", **changes)
    with pytest.raises(ValueError, match=message):
        main([str(tmp_path / "t.json"), str(tmp_path / "tokenizer.json")])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tekken file"):
        main([str(tmp_path / "other.json"), str(tmp_path / "tokenizer.json")])
