"""Conversations to token ids: the template, the media's places, what is supervised.

A turn's content is text and `Media`, never a string with markers in it, so what a
user types is only ever text. Each part of the prompt gets its `Role`: TransV reads
into the INSTRUCTION, the text between the last vision token and the next answer.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from timeviper_jax.data.examples import Role
from timeviper_jax.data.tokenizer import Tokenizer


class Media(NamedTuple):
    """The place of an image (one frame) or a video (all its frames, in order)."""

    num_frames: int


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one speaker says: pieces of text, and media in the order of the frames."""

    speaker: Literal["system", "user", "assistant"]
    content: tuple[str | Media, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """How turns are written down; `{}` is where a turn's content goes.

    Names in `specials` become special ids, here and nowhere else.
    """

    system: str
    user: str
    assistant: str
    default_system: str
    specials: tuple[str, ...]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that end an answer: the end of turn and the end of text."""
        _, end, _ = _around(self, "assistant")
        stops = {tokenizer.special(p.name) for p in end if isinstance(p, _Special)}
        return tuple(sorted(stops | {tokenizer.eos_id}))


NANO = Template(
    system="<SPECIAL_10>System\n{}<SPECIAL_12>\n",
    user="<SPECIAL_11>User\n{}\n<SPECIAL_12>",
    assistant="<SPECIAL_11>Assistant\n{}\n<SPECIAL_12>",
    default_system="",
    specials=("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"),
)
CHATML = Template(
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{}<|im_end|>\n",
    default_system="You are a helpful assistant.",
    specials=("<|im_start|>", "<|im_end|>"),
)
TEMPLATES = {"nano": NANO, "chatml": CHATML}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedText:
    """The ids of a conversation; vision positions hold the tokenizer's image_id."""

    tokens: Int[np.ndarray, "T"]
    roles: Int[np.ndarray, "T"]
    loss_mask: Bool[np.ndarray, "T"]

    @property
    def media_positions(self) -> Int[np.ndarray, "V"]:
        """Where the vision tokens go, in order."""
        return np.flatnonzero(self.roles == Role.VISION)


def encode(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: Template,
    *,
    tokens_per_frame: int,
    supervise_header: bool = False,
) -> EncodedText:
    """Encodes a whole conversation for training.

    Every answer and its end of turn are targets. With `supervise_header` so is the
    assistant's header, as in the authors' release; its role stays INSTRUCTION, as it
    is when a prompt is answered.
    """
    writer = _Writer(tokenizer, tokens_per_frame)
    for turn in _with_system(turns, template):
        header, end, rest = _around(template, turn.speaker)
        if turn.speaker == "assistant":
            writer.write(header, target=supervise_header)
            writer.write((*turn.content, *end), target=True, role=Role.ANSWER)
            writer.write(rest)
        else:
            writer.write((*header, *turn.content, *end, *rest))
    return writer.finish()


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: Template,
    *,
    tokens_per_frame: int,
    answer_prefix: str = "",
) -> EncodedText:
    """Encodes a conversation up to where the assistant is to speak.

    `answer_prefix` puts words in the assistant's mouth ("Best Option: (").
    """
    writer = _Writer(tokenizer, tokens_per_frame)
    for turn in _with_system(turns, template):
        header, end, rest = _around(template, turn.speaker)
        if turn.speaker == "assistant":
            writer.write(header)
            writer.write((*turn.content, *end), role=Role.ANSWER)
            writer.write(rest)
        else:
            writer.write((*header, *turn.content, *end, *rest))
    writer.write(_around(template, "assistant")[0])
    writer.write((answer_prefix,), role=Role.ANSWER)
    return writer.finish()


def encode_follow_up(
    content: Sequence[str],
    tokenizer: Tokenizer,
    template: Template,
    *,
    answer_prefix: str = "",
) -> EncodedText:
    """Encodes the next question after an answer that a model has just written.

    It begins with the special token at which the answer stopped; a line break before
    that is the model's own. What was said and seen before is in the model's memory.
    """
    writer = _Writer(tokenizer, tokens_per_frame=0)
    _, end, rest = _around(template, "assistant")
    stopped = [part for part in end if isinstance(part, _Special)]
    writer.write(stopped, role=Role.ANSWER)
    writer.write(rest)
    header, end, rest = _around(template, "user")
    writer.write((*header, *content, *end, *rest))
    writer.write(_around(template, "assistant")[0])
    writer.write((answer_prefix,), role=Role.ANSWER)
    return writer.finish()


class _Special(NamedTuple):
    name: str


_Part = str | Media | _Special


@functools.cache
def _around(template: Template, speaker: str) -> tuple[tuple[_Part, ...], ...]:
    """A turn's header, its end up to the last special, and what follows that."""
    before, _, after = getattr(template, speaker).partition("{}")
    header, end = _split(before, template), _split(after, template)
    cut = 1 + max(i for i, part in enumerate(end) if isinstance(part, _Special))
    return header, end[:cut], end[cut:]


def _split(text: str, template: Template) -> tuple[_Part, ...]:
    """A piece of the template's own text, its special tokens apart."""
    names = "|".join(map(re.escape, template.specials))
    return tuple(
        _Special(piece) if piece in template.specials else piece
        for piece in re.split(f"({names})", text)
        if piece
    )


def _with_system(turns: Sequence[Turn], template: Template) -> Iterator[Turn]:
    """The turns, the template's own system turn before them if they have none."""
    if not turns or turns[0].speaker != "system":
        yield Turn("system", (template.default_system,))
    yield from turns


class _Writer:
    """Gathers ids, roles and targets, and encodes each run of text in one piece."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_frame: int):
        self._tokenizer = tokenizer
        self._tokens_per_frame = tokens_per_frame
        self._tokens: list[int] = []
        self._roles: list[int] = []
        self._targets: list[bool] = []

    def write(
        self, parts: Sequence[_Part], *, target: bool = False, role: Role = Role.TEXT
    ) -> None:
        for kind, run in itertools.groupby(parts, type):
            if kind is str:
                self._add(self._tokenizer.encode("".join(run)), role, target)
            elif kind is _Special:
                ids = [self._tokenizer.special(part.name) for part in run]
                self._add(ids, role, target)
            else:
                num_frames = sum(part.num_frames for part in run)
                count = num_frames * self._tokens_per_frame
                self._add([self._tokenizer.image_id] * count, Role.VISION, False)

    def finish(self) -> EncodedText:
        roles = np.array(self._roles, np.int32)
        vision = np.flatnonzero(roles == Role.VISION)
        start = vision[-1] + 1 if len(vision) else 0
        answers = np.flatnonzero(roles[start:] == Role.ANSWER)
        stop = start + answers[0] if len(answers) else len(roles)
        roles[start:stop] = Role.INSTRUCTION
        return EncodedText(
            tokens=np.array(self._tokens, np.int32),
            roles=roles,
            loss_mask=np.array(self._targets, bool),
        )

    def _add(self, ids: list[int], role: Role, target: bool) -> None:
        self._tokens += ids
        self._roles += [role] * len(ids)
        self._targets += [target] * len(ids)
