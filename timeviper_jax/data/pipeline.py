"""From a manifest to batches without end: shuffle, decode, tokenise, pack, batch.

A batch depends on the seed and its number alone: not on threads, nor on how many hosts
share the work (its lanes), nor on where a run was stopped. Each draw has a position in
one global order; what is random about it is seeded by that position, and a sample that
cannot be used (a damaged file, too many tokens) is replaced by another that the
position names. On which files workers died is remembered, and saved with the state:
such a death may not happen twice.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import logging
from jaxtyping import Float64

from timeviper_jax.data import fetch, lanes, manifest
from timeviper_jax.data.conversation import TEMPLATES, encode
from timeviper_jax.data.examples import Batch, Example, RowSize, collate
from timeviper_jax.data.features import FeatureStore
from timeviper_jax.data.fetch import UrlConfig
from timeviper_jax.data.images import Fit
from timeviper_jax.data.items import Item
from timeviper_jax.data.iterator import NamedBatches
from timeviper_jax.data.manifest_rules import ManifestLimits
from timeviper_jax.data.media import MediaLimits, Number, VideoError, is_image
from timeviper_jax.data.packing import Load, first_fit
from timeviper_jax.data.quarantine import Quarantine
from timeviper_jax.data.tokenizer import Tokenizer
from timeviper_jax.data.workers import Decoder, WorkerConfig, WorkerDied, decoder

# A share is a share of at least so many.
_FEWEST_DRAWS = 200
# A window may end this much after its video: annotations are rounded.
_ROUNDING_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a batch holds and how it is made."""

    manifest: str
    root: str = ""  # What it names lies here; by default, where it lies itself.
    split: str = "train"
    where: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # As in `manifest.select`.
    batch_size: int  # Rows, over all hosts.
    num_frames: int  # Of a row; longer videos are spread over as many.
    text_tokens: int  # Of a row, beside its vision tokens.
    tokens_per_frame: int
    fit: Fit
    clip_frames: int = 1  # The encoder sees frames in clips of this length.
    num_segments: int = 1  # Examples of a row, if their data set is packed.
    pack_window: int = 32  # Examples that are packed together.
    template: str = "nano"  # Or chatml.
    supervise_header: bool = False
    lanes: int = 1  # What hosts can share, evenly; each packs its own rows.
    num_threads: int = 4  # Of a host, at least one a lane; so are the next two.
    prefetch_examples: int = 16
    prefetch_batches: int = 2
    max_tries: int = 10  # For one draw, before the data are declared unusable.
    max_bad_share: Number = 1.0  # Of the draws so far, those of unreadable media.
    media: MediaLimits = MediaLimits()
    workers: WorkerConfig = WorkerConfig()
    urls: UrlConfig = UrlConfig()

    def __post_init__(self):
        if self.num_frames > self.clip_frames and self.num_frames % self.clip_frames:
            raise ValueError(
                f"num_frames={self.num_frames} are not whole clips of"
                f" {self.clip_frames}; use a multiple."
            )
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share={self.max_bad_share} is no share of 1.")

    @property
    def row(self) -> RowSize:
        return RowSize(
            num_frames=self.num_frames,
            text_tokens=self.text_tokens,
            tokens_per_frame=self.tokens_per_frame,
            num_segments=self.num_segments,
        )


def load_items(cfg: DataConfig) -> list[Item]:
    """The items of the split, their media on this machine."""
    limits = ManifestLimits(urls=cfg.urls.allow)
    items = manifest.load(cfg.manifest, cfg.split, root=cfg.root, limits=limits)
    return fetch.local(items, cfg.urls)


def make_batches(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    features: FeatureStore | None = None,
) -> "Batches":
    """This host's rows of every batch, forever; with `features` nothing is decoded."""
    mine, rows = lanes.share(
        *(cfg.lanes, cfg.batch_size),
        process_index=process_index,
        process_count=process_count,
    )
    items = manifest.select(load_items(cfg), cfg.where)
    order_seed = int(np.random.SeedSequence([seed, 0]).generate_state(1)[0])
    draws = grain.MapDataset.range(len(items)).shuffle(seed=order_seed).repeat()
    # Positions are given out before the lanes part, so they are the global ones.
    draws = draws.map_with_index(_Draw)
    options = grain.ReadOptions(
        num_threads=-(-cfg.num_threads // len(mine)),
        prefetch_buffer_size=-(-cfg.prefetch_examples // len(mine)),
    )
    # Alone in its row, an example need not wait for others.
    window = cfg.pack_window if cfg.num_segments > 1 else 1

    # A lane of its own: how far apart lanes are depends on how their rows fill.
    at_once = options.prefetch_buffer_size * cfg.lanes
    quarantines = {number: Quarantine(at_once=at_once) for number in mine}

    def lane(number: int) -> grain.IterDataset:
        quarantine = quarantines[number]
        make = _ExampleMaker(cfg, tokenizer, items, seed, features, quarantine)
        examples = draws[number :: cfg.lanes].map(make).to_iter_dataset(options)
        return _Packed(examples, cfg.row, window)

    batches = lanes.Lanes({number: lane(number) for number in mine}, rows).map(
        functools.partial(_collate, size=cfg.row)
    )
    ahead = grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=cfg.prefetch_batches
    )
    return Batches(iter(ahead), quarantines, cfg.max_bad_share)


class TooManyBad(RuntimeError):
    """More media could not be read than the config allows."""


class Batches(NamedBatches[Batch]):
    """The batches, and how many samples had to be replaced so far, of how many.

    `skipped` are all of them, `bad` those whose media could not be read.
    """

    def __init__(
        self,
        parent: grain.DatasetIterator,
        quarantines: Mapping[int, Quarantine],
        max_bad_share: Number,
    ):
        super().__init__(parent)
        self._quarantines, self._max_bad_share = quarantines, max_bad_share
        self.drawn = self.bad = 0

    def __next__(self) -> Batch:
        made = next(self._parent)
        for problem in made.problems:
            logging.warning("Skipped a sample: %s", problem)
        self.skipped += len(made.problems)
        self.bad += sum(problem.is_bad for problem in made.problems)
        self.drawn += len(made.samples) + len(made.problems)
        self._check_share(made.problems)
        self.samples = made.samples
        return made.batch

    def _check_share(self, problems: Sequence["_Problem"]) -> None:
        most = self._max_bad_share * max(self.drawn, _FEWEST_DRAWS)
        if self.bad > most:
            raise TooManyBad(
                f"The media of {self.bad} of {self.drawn} samples cannot be read, more"
                f" than max_bad_share={self._max_bad_share:g}; the last is"
                f" {problems[-1]}"
            )

    def get_state(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        deaths = {str(lane): q.deaths() for lane, q in self._quarantines.items()}
        return {**super().get_state(), **counts, "deaths": deaths}

    def set_state(self, state: dict[str, Any]) -> None:
        if "deaths" not in state:
            raise ValueError(
                "The input was saved by a version without lanes and quarantine, so its"
                " batches cannot be gone on with; begin a run with its parameters"
                " (init_from)."
            )
        # First of all: what is read ahead from here on is to know of it.
        for lane, quarantine in self._quarantines.items():
            quarantine.restore(state["deaths"].get(str(lane), ()))
        super().set_state(state)
        for name in _COUNTS:
            setattr(self, name, state[name])


_COUNTS = ("drawn", "skipped", "bad")


class _Problem(NamedTuple):
    """Why a sample was replaced: its media are bad, or it does not fit."""

    item_id: str
    error: Exception

    @property
    def is_bad(self) -> bool:
        return isinstance(self.error, VideoError)

    def __str__(self) -> str:
        return f"{self.item_id}: {self.error}"


class _Draw(NamedTuple):
    position: int  # In the global, endless order.
    index: int  # Of the item.


class _Drawn(NamedTuple):
    item_id: str
    example: Example
    max_in_row: int
    problems: tuple[_Problem, ...]  # Of the samples that it replaces.


class _ExampleMaker:
    """Makes the example of a draw, or of the first usable item that replaces it."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: Tokenizer,
        items: Sequence[Item],
        seed: int,
        features: FeatureStore | None,
        quarantine: Quarantine,
    ):
        self._quarantine = quarantine
        self._cfg, self._tokenizer, self._seed = cfg, tokenizer, seed
        self._items, self._features = items, features

    def __call__(self, draw: _Draw) -> _Drawn:
        problems = []
        for attempt in range(self._cfg.max_tries):
            rng = np.random.default_rng([self._seed, 1, draw.position, attempt])
            index = rng.integers(len(self._items)) if attempt else draw.index
            item = self._items[index]
            try:
                self._quarantine.check(item.media, draw.position, attempt)
                example = load_example(
                    item, self._cfg, self._tokenizer, rng, self._features
                )
            except (VideoError, Misfit) as error:
                if isinstance(error, WorkerDied):
                    self._quarantine.add(error.path, draw.position, attempt)
                problems.append(_Problem(item.id, error))
                continue
            return _Drawn(item.id, example, item.dataset.pack_size, tuple(problems))
        raise ValueError(
            f"{len(problems)} samples in a row cannot be used; the last is"
            f" {problems[-1]}"
        )


class Misfit(Exception):
    """A sample that no row can hold; the message says by how much."""


def load_example(
    item: Item,
    cfg: DataConfig,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    features: FeatureStore | None = None,
    media: Decoder | None = None,
) -> Example:
    """An item with its frames (or their features) and its text as ids.

    `media` reads files; without one, what the config says of limits and workers does.
    Raises `VideoError` for media that cannot be read, `Misfit` before reading them.
    """
    media = media or decoder(cfg.media, cfg.workers)
    times, seconds = _frame_times(item, cfg, rng, media)
    if (frames := sum(map(len, times))) > cfg.num_frames:
        raise Misfit(f"{frames} frames, but a row holds {cfg.num_frames}")
    if features is None:
        times = [_fill_clip(t, cfg) for t in times]
    text = encode(
        item.turns([len(t) for t in times], seconds, rng),
        tokenizer,
        TEMPLATES[cfg.template],
        tokens_per_frame=cfg.tokens_per_frame,
        supervise_header=cfg.supervise_header,
    )
    example = Example(
        tokens=text.tokens,
        roles=text.roles,
        loss_mask=text.loss_mask,
        frame_times=np.concatenate([*times, np.zeros(0)]).astype(np.float32),
    )
    _check_fits(item, example, cfg.row)
    pairs = list(zip(item.media, times, strict=True))
    if features is None:
        none = np.zeros((0, cfg.fit.size, cfg.fit.size, 3), np.uint8)
        frames = [media.read_frames(path, t, cfg.fit) for path, t in pairs]
        return dataclasses.replace(example, frames=np.concatenate([none, *frames]))
    if not pairs:
        raise ValueError(
            f"{item.id} has no media, so no features; leave such items out, or decode."
        )
    merged = [features.at(path, t) for path, t in pairs]
    return dataclasses.replace(example, features=np.concatenate(merged))


def _frame_times(
    item: Item, cfg: DataConfig, rng: np.random.Generator, media: Decoder
) -> tuple[list[np.ndarray], float]:
    """The moments to show of each medium, and the seconds they stand for in all."""
    times, seconds = [], 0.0
    for path in item.media:
        if is_image(path):  # A second long, whatever is in it.
            times.append(np.array([0.5]))
            seconds += 1.0
            continue
        start, end = _window(item, path, media)
        seconds += end - start
        if item.frame_times is not None:
            times.append(np.array(item.frame_times, np.float64))
            continue
        sampling = item.dataset.sampling
        times.append(sampling.times(start, end, rng, capacity=cfg.num_frames))
    return times, seconds


def _fill_clip(
    times: Float64[np.ndarray, "F"], cfg: DataConfig
) -> Float64[np.ndarray, " _"]:
    """The last moment again, until a clip is full; rows of images have none to fill."""
    if cfg.num_frames < cfg.clip_frames:
        return times
    return np.append(times, np.repeat(times[-1:], -len(times) % cfg.clip_frames))


def _window(item: Item, path: str, media: Decoder) -> tuple[float, float]:
    """The part of a medium that is asked for, within what there is of it."""
    duration = media.probe(path).duration
    start, end = item.start or 0.0, item.end or duration
    if start >= duration or end > duration + _ROUNDING_SECONDS:
        raise VideoError(
            f"{path}: lasts {duration:g} s, so it has no window from {start:g} to"
            f" {end:g} s; correct video_start and video_end."
        )
    return float(start), float(min(end, duration))


def _check_fits(item: Item, example: Example, row: RowSize) -> None:
    limit = item.dataset.max_txt_seq_len
    problem = row.misfit(example)
    if limit is not None and example.num_text_tokens > limit:
        problem = f"{example.num_text_tokens} text tokens, max_txt_seq_len={limit}"
    if problem is not None:
        raise Misfit(problem)


class _Made(NamedTuple):
    batch: Batch
    samples: tuple[str, ...]
    problems: tuple[_Problem, ...]


def _collate(rows: list[list[_Drawn]], size: RowSize) -> _Made:
    batch = collate([[drawn.example for drawn in row] for row in rows], size)
    drawn = list(itertools.chain(*rows))
    problems = itertools.chain(*(one.problems for one in drawn))
    return _Made(batch, tuple(one.item_id for one in drawn), tuple(problems))


class _Packed(grain.IterDataset[list[_Drawn]]):
    """Rows of examples, `window` examples at a time."""

    def __init__(self, parent: grain.IterDataset, size: RowSize, window: int):
        super().__init__(parent)
        self._size, self._window = size, window

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(iter(self._parent), self._size, self._window)


class _PackedIterator(grain.DatasetIterator[list[_Drawn]]):
    """Packs a window, hands out its rows, and packs the next.

    Its state is where the window began and how many rows of it are gone; a resumed
    run reads that window again.
    """

    def __init__(self, parent: grain.DatasetIterator, size: RowSize, window: int):
        super().__init__(parent)
        self._size, self._window = size, window
        self._start = parent.get_state()
        self._rows: list[list[_Drawn]] | None = None
        self._next_row = 0

    def __next__(self) -> list[_Drawn]:
        if self._rows is None:
            self._rows = self._pack()
        if self._next_row == len(self._rows):
            self._start = self._parent.get_state()
            self._rows, self._next_row = self._pack(), 0
        row = self._rows[self._next_row]
        self._next_row += 1
        return row

    def _pack(self) -> list[list[_Drawn]]:
        drawn = [next(self._parent) for _ in range(self._window)]
        loads = [
            Load(
                num_frames=d.example.num_frames,
                text_tokens=d.example.num_text_tokens,
                max_in_row=d.max_in_row,
            )
            for d in drawn
        ]
        return [[drawn[i] for i in row] for row in first_fit(loads, self._size)]

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._start, "next_row": self._next_row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._start, self._next_row = state["parent"], state["next_row"]
        self._rows = None
