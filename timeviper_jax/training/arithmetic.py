"""The arithmetic that a step of training needs, from the sizes of model and batch.

Two operations for a multiply and add: of kernels, on all tokens that go through them;
of attention, where it is causal on the pairs that see each other; of the recurrence of
state spaces. Each counts once forward, once more for its input's gradient where
something before it learns, and once more for its own where it learns. Rows count as if
they were full, each of one sample. What a program does beside that counts nothing:
recomputation, tiles and chunks, merging and ranking of tokens, LoRA's own small
matrices, the optimizer.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from timeviper_jax.llm.hybrid import HybridConfig
from timeviper_jax.llm.transv import dropped_capacity, kept_capacity
from timeviper_jax.timeviper import TimeViperConfig
from timeviper_jax.training.experiment import StageConfig, TextTask, describe
from timeviper_jax.vision.pair import PairConfig
from timeviper_jax.vision.vit import VitConfig


def step_flops(cfg: TimeViperConfig, stage: StageConfig, moving: Iterable[str]) -> int:
    """Of a step of a stage on all devices together; `moving` paths learn.

    As in https://arxiv.org/abs/2204.02311, appendix B, but that pairs which a causal
    mask hides count nothing.
    """
    shapes = {path: array.shape for path, array in describe(cfg)[1].items()}
    tally = _Tally(shapes, frozenset(moving))
    task, rows = stage.task, stage.batch_size
    frames = task.num_frames if isinstance(task, TextTask) else 1
    if not (isinstance(task, TextTask) and task.cached):
        _encode(tally, cfg, rows, frames)
    _project(tally, cfg, rows * frames)
    if isinstance(task, TextTask):
        _read(tally, cfg, task, rows)
    return tally.flops


class _Tally:
    """Walks a model in the order of its computation, and adds up."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], moving: frozenset[str]):
        self.flops = 0
        self._shapes, self._moving = shapes, moving
        self._learning = False  # Whether anything so far does.

    def matrices(self, paths: Sequence[str], tokens: int, stack: int = 1):
        """Those of these that there are, side by side, on so many tokens.

        Of a `stack` of layers it is one layer's.
        """
        for path in set(paths) & self._shapes.keys():
            once = 2 * math.prod(self._shapes[path]) // stack * tokens
            self.flops += once * (1 + self._learning + (path in self._moving))
        self.note(*paths)

    def products(self, multiply_adds: int):
        """Of two things that were both computed, as of queries with keys."""
        self.flops += 2 * multiply_adds * (1 + 2 * self._learning)

    def note(self, *prefixes: str):
        """Parameters came whose paths begin so; what follows learns if they do."""
        self._learning |= any(path.startswith(prefixes) for path in self._moving)


def _kernels(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}{name}/kernel" for name in names]


def _encode(tally: _Tally, cfg: TimeViperConfig, rows: int, frames: int) -> None:
    """Frames by one encoder, or by two."""
    encoders = {"vision/": cfg.vision}
    if isinstance(cfg.vision, PairConfig):
        encoders = {
            "vision/first/": cfg.vision.first,
            "vision/second/": cfg.vision.second,
        }
    for prefix, encoder in encoders.items():
        _encode_by(tally, encoder, prefix, rows, frames)
    tally.note("vision/")


def _encode_by(
    tally: _Tally, cfg: VitConfig, prefix: str, rows: int, frames: int
) -> None:
    clip = cfg.clip_frames if frames >= cfg.clip_frames else 1
    passes, patches = rows * frames // clip, clip * cfg.num_tokens
    tokens = patches + cfg.own_tokens
    tally.matrices(_kernels(prefix, "patch"), passes * patches)
    blocks = f"{prefix}blocks/"
    first = _kernels(blocks, "attn/q", "attn/k", "attn/v")
    tally.matrices(first, passes * tokens)
    tally.products((cfg.depth - 1) * passes * 2 * cfg.embed_dim * tokens**2)
    for name in ("attn/out", "mlp/up", "mlp/down"):
        tally.matrices(_kernels(blocks, name), passes * tokens)


def _project(tally: _Tally, cfg: TimeViperConfig, frames: int) -> None:
    """All tokens, of a pair by both projectors."""
    tokens = frames * cfg.tokens_per_frame
    for layer in range(3):
        names = (f"{one}layers/{layer}" for one in ("", "first/", "second/"))
        tally.matrices(_kernels("projector/", *names), tokens)
    tally.note("projector/", "time/")


def _read(tally: _Tally, cfg: TimeViperConfig, task: TextTask, rows: int) -> None:
    """Vision tokens and text through the language model, answers through its head."""
    llm, transfers = cfg.llm, 0
    vision = left = task.num_frames * cfg.tokens_per_frame
    tally.note("llm/embed/")
    for number, (start, stop) in enumerate(llm.segments):
        if number:
            stage, before = llm.transv[number - 1], left
            left = min(left, kept_capacity(stage.keep, vision, task.num_segments))
            gone = dropped_capacity(before, left, task.num_segments)
            if stage.transfer:
                path = f"llm/transv/{transfers}/"
                _transfer(tally, llm, path, rows, task.text_tokens, gone)
                transfers += 1
        for kind, _ in llm.layers[start:stop]:
            _mix(tally, llm, kind, rows, left + task.text_tokens)
    tally.note("llm/norm/")
    head = "llm/embed/embedding" if llm.tied else "llm/head/kernel"
    tally.matrices([head], rows * task.answer_tokens)


def _transfer(
    tally: _Tally, llm: HybridConfig, path: str, rows: int, text: int, dropped: int
) -> None:
    tally.matrices(_kernels(path, "q"), rows * text)
    tally.matrices(_kernels(path, "k", "v"), rows * dropped)
    tally.products(rows * 2 * llm.num_heads * llm.head_dim * text * dropped)
    tally.matrices(_kernels(path, "out"), rows * text)


def _mix(tally: _Tally, llm: HybridConfig, kind: str, rows: int, tokens: int) -> None:
    """One layer: what its mixer computes first, then of that, then last."""
    layers = sum(kind == other for other, _ in llm.layers)
    inside = llm.ssm_heads * llm.ssm_head_dim * llm.ssm_state
    pairs = tokens * (tokens + 1) // 2
    first, products, last = {
        "mamba": (_MAMBA, 2 * inside * tokens, "out"),
        "attention": (("q", "k", "v"), 2 * llm.num_heads * llm.head_dim * pairs, "out"),
        "mlp": (("up", "gate"), 0, "down"),
    }[kind]
    tally.note(f"llm/{kind}/norm/")
    path = f"llm/{kind}/mixer/"
    tally.matrices(_kernels(path, *first), rows * tokens, layers)
    tally.products(rows * products)
    tally.matrices(_kernels(path, last), rows * tokens, layers)


_MAMBA = (
    *("in_z", "in_x", "in_b", "in_c", "in_dt"),
    *("conv_x", "conv_b", "conv_c"),
)
