"""Makes Nano's tokenizer.json from the tekken file that mistral-common ships.

pip download --no-deps mistral-common && unzip -j mistral_common-*.whl '*/tekken_*'
python -m timeviper_jax.data.tekken tekken_240718.json data/nano/tokenizer.json

A tekken file ranks byte sequences and merges the pair whose union ranks first; as BPE
that is a list of every split of every sequence into two others, by rank. Ids begin with
the special tokens, the rest follows by rank.
"""

import argparse
import base64
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

# Names of the first special tokens, where the file does not say; the others have
# numbers for names, among them those that Nano's template uses.
_FIRST_SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
)


def convert(source: pathlib.Path, target: pathlib.Path) -> int:
    """Writes `target`, a Hugging Face tokenizer.json, and returns its vocabulary size.

    Raises:
      ValueError: The file is of another kind, or its vocabulary lacks single bytes.
    """
    spec = json.loads(source.read_text(encoding="utf-8"))
    if not {"config", "vocab"} <= spec.keys():
        raise ValueError(f"{source} is no tekken file: it has {sorted(spec)[:5]}.")
    config = spec["config"]
    size, num_special = (
        config["default_vocab_size"],
        config["default_num_special_tokens"],
    )
    entries = sorted(spec["vocab"], key=lambda entry: entry["rank"])[
        : size - num_special
    ]
    ranks = {base64.b64decode(e["token_bytes"]): e["rank"] for e in entries}
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing or len(ranks) != size - num_special:
        raise ValueError(
            f"{source} ranks {len(ranks)} sequences where its config says"
            f" {size - num_special}, and lacks {missing} of the 256 bytes."
        )
    specials = _special_names(spec.get("special_tokens") or (), num_special)
    tokenizer = _byte_level_bpe(ranks, num_special, config["pattern"])
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = [_added(i, name) for i, name in enumerate(specials)]
    whole["model"]["vocab"] |= {name: i for i, name in enumerate(specials)}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    return size


def _special_names(told: Sequence[Mapping[str, object]], count: int) -> list[str]:
    names = {int(entry["rank"]): str(entry["token_str"]) for entry in told}
    names = names or dict(enumerate(_FIRST_SPECIALS))
    return [names.get(i, f"<SPECIAL_{i}>") for i in range(count)]


def _byte_level_bpe(
    ranks: Mapping[bytes, int], first_id: int, pattern: str
) -> tokenizers.Tokenizer:
    letters = _letters()
    spell = lambda sequence: "".join(letters[byte] for byte in sequence)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={spell(token): first_id + rank for token, rank in ranks.items()},
            merges=[(spell(left), spell(right)) for left, right in _merges(ranks)],
            # A piece of text that is itself a token is taken whole.
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every split of every token into two others, by the token's rank."""
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(a, b) for a, b in splits if a in ranks and b in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _added(number: int, name: str) -> dict[str, object]:
    return dict(
        id=number,
        content=name,
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=False,
        special=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", type=pathlib.Path, help="tekken_240718.json")
    parser.add_argument("target", type=pathlib.Path, help="tokenizer.json")
    arguments = parser.parse_args(argv)
    size = convert(arguments.source, arguments.target)
    print(f"{arguments.target}: {size:,} ids")


if __name__ == "__main__":
    main()
