"""What every layer of a model takes of a video while it answers one question."""

import dataclasses

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from timeviper_jax.analysis import maps
from timeviper_jax.analysis.intermediates import (
    Regions,
    frame_regions,
    ids_there,
    layer_map,
    walk,
)
from timeviper_jax.analysis.regions import region_sums
from timeviper_jax.data.examples import Batch, Example, Role, RowSize, collate
from timeviper_jax.llm.stream import Stream
from timeviper_jax.timeviper import TimeViper


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReading:
    """Means over heads of what one layer's tokens take of each other.

    `regions[y, x]` is what a token of region y takes of all of region x, on average
    over y's tokens; `undriven` is the same of a Mamba-2 layer's map without dt.
    `sizes` is `regions` of magnitudes, which for attention are the same. `readers`
    holds, for the last token of the instruction and of the answer, what each takes of
    each frame.
    """

    layer: int
    kind: str
    regions: Float[np.ndarray, "Y Y"]
    sizes: Float[np.ndarray, "Y Y"]
    undriven: Float[np.ndarray, "Y Y"] | None
    readers: Float[np.ndarray, "Z F"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """All layers, the regions their maps are of, and what TransV left of each frame."""

    regions: Regions
    reader_names: tuple[str, ...]
    layers: tuple[LayerReading, ...]
    kept: dict[str, Int[np.ndarray, "F"]]  # Tokens of each frame, by stage.


def read(model: TimeViper, example: Example, *, num_groups: int) -> Reading:
    """One pass over the example, layer by layer; maps are never held whole."""
    V = model.cfg.tokens_per_frame
    size = RowSize(
        num_frames=example.num_frames,
        text_tokens=example.num_text_tokens,
        tokens_per_frame=V,
    )
    regions = frame_regions(example.roles, V, num_groups=num_groups)
    frames = frame_regions(example.roles, V)
    embed = jax.jit(_embed, static_argnums=0)
    stream = embed(*nnx.split(model), collate([[example]], size))
    llm = model.llm
    stages = {
        stage.layer: f"before layer {stage.layer}"
        for stage in llm.cfg.transv
        if stage.keep < 1
    }
    readers = _readers(example.roles)
    layers, kept = [], {}
    for layer, entering in walk(llm, stream):
        if layer in stages:
            there = ids_there(frames, entering)
            counts = np.bincount(there, minlength=len(frames.names))
            kept[stages[layer]] = counts[frames.groups]
        if layer < len(llm.cfg.layers) and llm.cfg.layers[layer][0] != "mlp":
            found = read_layer(
                model, layer, entering, regions, frames, [*readers.values()]
            )
            layers.append(found)
    return Reading(
        regions=regions, reader_names=tuple(readers), layers=tuple(layers), kept=kept
    )


def _embed(graph: nnx.GraphDef, params: nnx.State, batch: Batch) -> Stream:
    return nnx.merge(graph, params).embed(batch)


def _readers(roles: Int[np.ndarray, "T"]) -> dict[str, int]:
    """The last token of the instruction and of the answer, by where they stand."""
    last = {}
    for role in (Role.INSTRUCTION, Role.ANSWER):
        if np.any(roles == role):
            last[f"last token of the {role.name.lower()}"] = int(
                np.flatnonzero(roles == role)[-1]
            )
    return last


def read_layer(
    model: TimeViper,
    layer: int,
    stream: Stream,
    regions: Regions,
    frames: Regions,
    readers: list[int],
) -> LayerReading:
    """What one layer's map amounts to."""
    llm, ids = model.llm, ids_there(regions, stream)
    kind, _ = llm.cfg.layers[layer]
    map_ = layer_map(llm, layer, stream)
    names = len(regions.names)
    mean = _mean_rows(map_, ids, names)
    sizes, undriven = mean, None
    if kind == "mamba":
        sizes = _mean_rows(map_, ids, names, absolute=True)
        bare = layer_map(llm, layer, stream, with_dt=False)
        undriven = _mean_rows(bare, ids, names)
    positions = np.asarray(stream.positions[0])
    rows = maps.rows(map_, [int(np.flatnonzero(positions == at)[0]) for at in readers])
    there = ids_there(frames, stream)
    by_frame = [
        np.bincount(there, weights=row, minlength=len(frames.names))[frames.groups]
        for row in rows.mean(axis=0, dtype=np.float64)
    ]
    return LayerReading(
        layer=layer,
        kind=kind,
        regions=mean,
        sizes=sizes,
        undriven=undriven,
        readers=np.array(by_frame),
    )


def _mean_rows(
    map_: maps.Map, ids: Int[np.ndarray, "T"], names: int, *, absolute: bool = False
) -> Float[np.ndarray, "Y Y"]:
    """What the mean token of each region takes of each region, mean over heads."""
    found = region_sums(map_, ids, ids, absolute=absolute).mean(axis=0)
    sums = np.zeros((names, names))
    sums[: found.shape[0], : found.shape[1]] = found
    counts = np.bincount(ids[ids >= 0], minlength=names)
    return sums / np.maximum(counts, 1)[:, None]
