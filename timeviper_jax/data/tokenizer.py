"""Text to ids and back, with one promise: no text ever becomes a special id.

Special tokens shape the prompt (who speaks, where a turn ends). They are placed by
name, through `special`; a user who types "<SPECIAL_12>" gets the ids of those twelve
characters. The id that stands for a vision token, `image_id`, follows the vocabulary.
"""

import functools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<SPECIAL_10>",
    "<SPECIAL_11>",
    "<SPECIAL_12>",
    "<|im_start|>",
    "<|im_end|>",
)
# The words of the prompt templates; `train_bpe` learns them whole.
_TEMPLATE_WORDS = "System\nUser\nAssistant\nsystem\nuser\nassistant\n"


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    vocab_size: int
    eos_id: int
    image_id: int

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, none of them special.

        Raises UnicodeEncodeError for half a surrogate pair, which JSON can hold.
        """

    def special(self, name: str) -> int:
        """The id of the special token called `name`."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special and vision tokens are left out."""


class ByteTokenizer:
    """UTF-8 bytes, then the special tokens."""

    def __init__(self):
        self._specials = {name: 256 + i for i, name in enumerate(SPECIALS)}
        self.vocab_size = 256 + len(SPECIALS)
        self.eos_id = self._specials["</s>"]
        self.image_id = self.vocab_size

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def special(self, name: str) -> int:
        return _look_up(self._specials, name, "ByteTokenizer")

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A byte-level BPE from a Hugging Face `tokenizer.json`."""

    def __init__(self, path: str | pathlib.Path, *, eos: str = "</s>"):
        self._path = str(path)
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(
                f"There is no tokenizer {path}; put it there, or start from the folder"
                " that training was started from."
            )
        spec = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        self._specials = {t["content"]: t["id"] for t in spec["added_tokens"]}
        vocab = spec["model"]["vocab"]
        self._check_bytes(vocab)
        self.vocab_size = 1 + max(*vocab.values(), *self._specials.values())
        self.eos_id = self.special(eos)
        self.image_id = self.vocab_size
        # Text goes through a tokenizer that has never heard of the special tokens.
        spec["added_tokens"] = []
        spec["post_processor"] = None
        spec["model"]["unk_token"] = None
        for name in self._specials:
            vocab.pop(name, None)
        self._text = tokenizers.Tokenizer.from_str(json.dumps(spec))
        # The template's words come with every sample, many questions with several.
        self._encode = functools.lru_cache(1 << 14)(self._encode_new)

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def _encode_new(self, text: str) -> tuple[int, ...]:
        text.encode("utf-8")  # Says where text is no Unicode; the library would not.
        return tuple(self._text.encode(text, add_special_tokens=False).ids)

    def special(self, name: str) -> int:
        return _look_up(self._specials, name, self._path)

    def decode(self, ids: Sequence[int]) -> str:
        hidden = {*self._specials.values(), self.image_id}
        return self._text.decode([int(i) for i in ids if int(i) not in hidden])

    def _check_bytes(self, vocab: dict[str, int]) -> None:
        missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys()
        if missing:
            raise ValueError(
                f"{self._path} lacks {len(missing)} of the 256 bytes, so some text"
                " would be lost; use a byte-level BPE tokenizer."
            )


def train_bpe(
    texts: Iterable[str], vocab_size: int, path: str | pathlib.Path
) -> JsonTokenizer:
    """Writes a BPE of at most `vocab_size` ids to `path` and returns it.

    Byte-level: any text has ids. Digits stay single, so that numbers are spelt alike
    wherever they stand. The words of the templates are learnt whatever the texts say.
    """
    smallest = 256 + len(SPECIALS) + 1
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} leaves no room beside 256 bytes and"
            f" {len(SPECIALS)} special tokens; use at least {smallest}."
        )
    texts = list(texts)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [_TEMPLATE_WORDS] * (len(texts) + 1)
    tokenizer.train_from_iterator(texts + words, trainer)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return JsonTokenizer(path)


def _look_up(specials: dict[str, int], name: str, where: str) -> int:
    if name not in specials:
        raise KeyError(
            f"{name!r} is not a special token of {where}; it has"
            f" {sorted(specials)[:20]}."
        )
    return specials[name]
