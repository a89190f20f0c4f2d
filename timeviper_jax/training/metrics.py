"""Means that add up exactly, and the files they are written to."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from jaxtyping import Array, Float, Shaped


class Mean(NamedTuple):
    """A mean kept as sum and count, so that parts of a batch add up to all of it."""

    total: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def of(cls, values: Shaped[Array, "*n"], weights: Shaped[Array, "*n"]) -> "Mean":
        """The mean of `values`, each counting as much as its weight."""
        weights = weights.astype(jnp.float32)
        return cls(jnp.sum(values.astype(jnp.float32) * weights), jnp.sum(weights))

    @classmethod
    def single(cls, value: Shaped[Array, ""]) -> "Mean":
        return cls(value.astype(jnp.float32), jnp.ones((), jnp.float32))


Means = dict[str, Mean]


def summarise(window: Sequence[Means]) -> dict[str, float]:
    """The means over the steps of a window; nan where nothing was counted."""
    window = jax.device_get(window)  # The one time the host waits for the device.
    return {name: _mean([means[name] for means in window]) for name in window[-1]}


def _mean(parts: Sequence[Mean]) -> float:
    count = float(np.sum([part.count for part in parts]))
    return float(np.sum([part.total for part in parts])) / count if count else np.nan


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; none where there is no file.

    A line that a killed run left half written has no end, and is left out.

    Raises:
      ValueError: A line is no JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        if line[-1] != "\n":
            continue
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is damaged: line {number} is no JSON ({error}); take it out."
            ) from None
    return found


class MetricsWriter:
    """Writes `metrics.jsonl` and TensorBoard events into a run's directory.

    A run that resumes at `step` takes back the lines it had written after it, and
    keeps the last of them in `taken_back`. Of several hosts only the first writes.
    """

    def __init__(self, workdir: str | os.PathLike, *, step: int = 0):
        self.taken_back: dict[str, Any] = {}
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._take_back(step)
        self._events = tensorboardX.SummaryWriter(
            str(self._path.parent / "events"), purge_step=step + 1
        )

    def write(self, step: int, scalars: Mapping[str, float], **labels: str) -> None:
        """Adds one line; `labels` say what the numbers are of (a stage's name)."""
        if not self._writes:
            return
        line = {"step": step, **labels, **scalars}
        # First of the two: a full disk raises here, and would block the events.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_as_text(line))
        prefix = "/".join(labels.values())
        for name, value in scalars.items():
            self._events.add_scalar(f"{prefix}/{name}".lstrip("/"), value, step)

    def close(self) -> None:
        if self._writes:
            self._events.close()

    def _take_back(self, step: int) -> None:
        if not self._path.exists():
            return
        lines = read_lines(self._path)
        kept = [line for line in lines if line["step"] <= step]
        if len(kept) < len(lines):
            self.taken_back = lines[-1]
        part = self._path.with_suffix(".part")
        part.write_text("".join(map(_as_text, kept)), encoding="utf-8")
        part.replace(self._path)


def _as_text(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"
