"""Compiles a step and says what the compiler and the arithmetic say of it."""

import collections
import dataclasses
import math
import pathlib
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.chips import CHIPS, Chip
from timeviper_jax import flops, sharding
from timeviper_jax.benchmarks.fit import hlo, least, program
from timeviper_jax.benchmarks.fit.program import GIB, Program


def fit(
    config: Mapping[str, Any],
    topology: str,
    axes: Mapping[str, int],
    *,
    rows: int = 0,
    texts: pathlib.Path,
) -> dict[str, Any]:
    """A report of a config's last stage on a mesh of chips that are not there.

    The compiler was told, by its environment, to write what it makes into `texts`.

    Raises:
      ValueError: The mesh does not divide something, or the step cannot fit.
    """
    chip = chip_of(topology)
    devices_without(topology, axes)
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = sharding.make_mesh(**axes, devices=devices)
    step = program.make(config, mesh, rows=rows)
    check_fits(step, topology, chip)
    traced = step.trace()
    before, cpu = time.monotonic(), _cpu_seconds()
    with jax.set_mesh(mesh):
        compiled = traced.lower().compile()
    spent = time.monotonic() - before, _cpu_seconds() - cpu
    once = program.make(config, mesh, rows=rows, remat=False).trace()
    counts = flops.count(traced.jaxpr), flops.count(once.jaxpr)
    exchanges = hlo.read(_text(texts), branch_shares(step))
    return {
        "topology": topology,
        "mesh": dict(mesh.shape),
        **_memory(step, compiled.memory_analysis(), chip),
        **_speed(step, counts, exchanges, chip),
        "compile_seconds": round(spent[0]),
        "compile_cpu_seconds": round(spent[1]),
    }


def reckon(
    config: Mapping[str, Any], topology: str, axes: Mapping[str, int], *, rows: int = 0
) -> dict[str, Any]:
    """What a chip must hold and take in at least: arithmetic, which needs no compiler.

    Raises:
      ValueError: The mesh does not divide something, or the step cannot fit.
    """
    chip = chip_of(topology)
    step = program.make(config, devices_without(topology, axes), rows=rows)
    check_fits(step, topology, chip)
    minimum = least.least_bytes(step)
    return {
        "topology": topology,
        "mesh": dict(step.mesh.shape),
        "rows": step.stage.batch_size,
        "tokens_per_row": step.arguments.batch.tokens.shape[1],
        "least_gib": {
            name: round(size / GIB, 2) for name, size in least_memory(step).items()
        },
        "least_bytes": minimum,
        "exchange_seconds": float(f"{sum(minimum.values()) / chip.links:.3g}"),
    }


def devices_without(topology: str, axes: Mapping[str, int]) -> AbstractMesh:
    """The mesh of a topology's chips, with sizes alone.

    Raises:
      ValueError: The axes do not take all chips.
    """
    chips = math.prod(int(size) for size in topology.partition(":")[2].split("x"))
    sizes = tuple(axes.get(axis, 1) for axis in sharding.AXES)
    if math.prod(sizes) != chips:
        raise ValueError(
            f"A mesh of {dict(axes)} takes {math.prod(sizes)} chips and {topology} has"
            f" {chips}; give axes whose product is {chips}."
        )
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(sizes, sharding.AXES, axis_types=types)


def chip_of(topology: str) -> Chip:
    """What is published of the chip of a topology such as v5p:4x4x4."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(f"{topology!r} is not of {sorted(CHIPS)}; try v5p:4x4x4.")
    return CHIPS[name]


def least_memory(step: Program) -> dict[str, int]:
    """Bytes that a chip holds at once whatever the compiler does, by what they are.

    All gradients stand beside parameters and moments until their norm is known, and
    before the first of them all that entered the layers.
    """
    state, frozen, batch = step.arguments
    held = {
        "weights": program.bytes_of_a_chip((state.params, frozen)),
        "optimizer": program.bytes_of_a_chip(state.opt_state),
        "batch": program.bytes_of_a_chip(batch),
    }
    gradients = program.bytes_of_a_chip(state.params)
    entering = least.layer_inputs(step)
    later = "gradients" if gradients > entering else "layer inputs"
    return held | {later: max(gradients, entering)}


def check_fits(step: Program, topology: str, chip: Chip) -> None:
    """Raises if a chip cannot hold what a step needs whatever the compiler does.

    Raises:
      ValueError: Says what takes how much.
    """
    held = {name: size / GIB for name, size in least_memory(step).items()}
    limit = chip.memory / GIB
    if sum(held.values()) > limit:
        parts = " + ".join(f"{size:.1f} ({name})" for name, size in held.items())
        raise ValueError(
            f"A chip of {topology} has {limit:.0f} GiB and the step needs {parts} ="
            f" {sum(held.values()):.1f} GiB at least; use more chips, larger fsdp,"
            " tensor or context axes, or fewer rows."
        )


def branch_shares(step: Program) -> hlo.Shares:
    """How often each kind of layer runs, in the loops over layers."""
    shares = {}
    for span in step.cfg.llm.segments:
        kinds = [kind for kind, _ in step.cfg.llm.layers[slice(*span)]]
        # The order in which the rolled stack switches between them.
        taken = [kinds.count(kind) for kind in sorted(set(kinds))]
        shares[len(kinds), len(taken)] = taken
    return shares


def gathers_in_chunks(step: Program, exchanges: hlo.Exchanges) -> list[str]:
    """Where tokens are gathered within a layer's own loops, again for each chunk.

    Loops over layers and over parts of a batch may gather: parameters, and states. The
    encoder, whose loops are others, gathers nothing but parameters: some lose their
    name where the compiler joins them.
    """
    named = ("/parameters/", "vision")
    passes = {stop - start for start, stop in step.cfg.llm.segments}
    passes.add(step.stage.accumulate)
    deepest = 1 + (step.stage.accumulate > 1)
    found = {
        one.source
        for one in exchanges.found
        if one.kind == "all-gather" and not any(x in one.source for x in named)
        if len(one.loops) > deepest or not passes.issuperset(one.loops)
    }
    return sorted(found)


def _memory(step: Program, memory: Any, chip: Chip) -> dict[str, Any]:
    state, frozen, batch = step.arguments
    argument, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    parts = {
        "weights": (state.params, frozen),
        "optimizer": state.opt_state,
        "batch": batch,
    }
    in_gib = lambda size: round(size / GIB, 2)
    return {
        "rows": step.stage.batch_size,
        "tokens_per_row": batch.tokens.shape[1],
        "gib_per_chip": in_gib(argument + temp),
        "argument_gib": in_gib(argument),
        **{
            f"{name}_gib": in_gib(program.bytes_of_a_chip(tree))
            for name, tree in parts.items()
        },
        "temp_gib": in_gib(temp),
        "fits": argument + temp < chip.memory,
    }


def _speed(
    step: Program,
    counts: Sequence[flops.Count],
    exchanges: hlo.Exchanges,
    chip: Chip,
) -> dict[str, Any]:
    done, needed = counts
    tokens = math.prod(step.arguments.batch.tokens.shape)
    minimum = least.least_bytes(step)
    moved = exchanges.by_kind
    seconds = {
        "arithmetic": done.flops / chip.peak,
        "exchanges": sum(moved.values()) / chip.links,
    }
    slowest = max(seconds.values())
    return {
        "flops_per_token": round(done.flops * step.mesh.size / tokens),
        "model_flops_per_token": round(needed.flops * step.mesh.size / tokens),
        "collective_bytes": moved,
        "least_bytes": minimum,
        "collective_ratio": round(
            sum(moved.values()) / max(1, sum(minimum.values())), 2
        ),
        "gathers_in_chunks": gathers_in_chunks(step, exchanges),
        "exact": done.exact and exchanges.exact,
        "largest_exchanges": [
            dataclasses.asdict(one) for one in _largest(exchanges.found)
        ],
        "bound_by": max(seconds, key=seconds.get),
        "bound_seconds": float(f"{slowest:.4g}"),
        "bound_mfu": round(needed.flops / chip.peak / slowest, 3),
    }


def _largest(found: Sequence[hlo.Exchange], number: int = 8) -> list[hlo.Exchange]:
    """Those that move most, like ones together."""
    same = collections.defaultdict(float)
    for one in found:
        same[dataclasses.replace(one, times=0)] += one.times
    whole = [dataclasses.replace(one, times=times) for one, times in same.items()]
    return sorted(whole, key=lambda one: -one.bytes * one.times)[:number]


def _text(texts: pathlib.Path) -> str:
    """The program as the compiler left it."""
    (path,) = texts.glob("*-TLP-hlo.txt")
    return path.read_text(encoding="utf-8")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
