"""Text survives the round trip, and never turns into a special id."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from timeviper_jax.data.tokenizer import (
    SPECIALS,
    ByteTokenizer,
    JsonTokenizer,
    train_bpe,
)

TEXTS = [
    "Which of these is shown? A coffee B cat C page D eye",
    "When is the coffee shown?",
    "From 12 to 17 seconds.",
] * 20


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(TEXTS, 400, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def test_a_file_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no tokenizer .*x.json; put"):
        JsonTokenizer(tmp_path / "x.json")


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return bpe if request.param == "bpe" else ByteTokenizer()


# Any text, and text that tries: special names whole, cut and glued to other words.
_TEXT = st.lists(
    st.one_of(
        st.text(),
        st.sampled_from(SPECIALS),
        st.sampled_from(SPECIALS).map(lambda s: s[:-1]),
        st.sampled_from([" ", "\n", ">", "System\n", "<image>"]),
    )
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=_TEXT)
def test_no_text_becomes_a_special_id_and_none_is_lost(tokenizer, text):
    ids = tokenizer.encode(text)
    special = {tokenizer.special(name) for name in SPECIALS}
    assert not special & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text


def test_vision_tokens_follow_the_vocabulary(tokenizer):
    assert tokenizer.image_id == tokenizer.vocab_size
    assert max(map(tokenizer.special, SPECIALS)) < tokenizer.vocab_size


def test_decoding_leaves_special_and_vision_tokens_out(tokenizer):
    ids = [
        tokenizer.special("<SPECIAL_11>"),
        *tokenizer.encode("yes"),
        tokenizer.image_id,
        tokenizer.eos_id,
    ]
    assert tokenizer.decode(ids) == "yes"


def test_an_unknown_special_token_is_an_error(tokenizer):
    with pytest.raises(KeyError, match="<SPECIAL_99>.* is not a special token"):
        tokenizer.special("<SPECIAL_99>")


def test_bpe_learns_common_words_and_the_template(bpe):
    for word in (" coffee", "System", "User", "Assistant", "\n"):
        assert len(bpe.encode(word)) == 1, word


def test_bpe_keeps_digits_single(bpe):
    assert len(bpe.encode("12")) == 2
    assert bpe.encode("12 17") == [
        *bpe.encode("12"),
        *bpe.encode(" "),
        *bpe.encode("17"),
    ]


def test_bpe_is_the_same_each_time(tmp_path, bpe):
    again = train_bpe(TEXTS, 400, tmp_path / "tokenizer.json")
    assert again.encode(TEXTS[0]) == bpe.encode(TEXTS[0])
    one, two = tmp_path / "tokenizer.json", tmp_path / "two.json"
    train_bpe(TEXTS, 400, two)
    assert one.read_bytes() == two.read_bytes()


def test_bpe_needs_room_for_bytes(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100 .* use at least 266"):
        train_bpe(TEXTS, 100, tmp_path / "tokenizer.json")


def test_a_vocabulary_without_all_bytes_is_refused(tmp_path):
    path = tmp_path / "words.json"
    words = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    words.add_special_tokens(["</s>"])
    words.save(str(path))
    with pytest.raises(ValueError, match="lacks 254 of the 256 bytes"):
        JsonTokenizer(path)


def test_special_ids_are_those_of_the_file(tmp_path, bpe):
    path = tmp_path / "tokenizer.json"
    train_bpe(TEXTS, 400, path)
    ids = {t["content"]: t["id"] for t in json.loads(path.read_text())["added_tokens"]}
    assert {name: bpe.special(name) for name in SPECIALS} == ids
    assert bpe.eos_id == ids["</s>"]
