"""One recording, and the tally of what a comparison with it found.

A recording is `NAME.json` (its kind, config and notes) beside `NAME.safetensors`, whose
keys begin with `param.`, `in.`, `out.` and `grad.`. What it holds decides what is
compared; a recording of which nothing can be compared does not pass.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import nnx
from jaxtyping import Shaped

ABSOLUTE = 1e-4  # Of any value in float32.
RELATIVE = 1e-3  # Of a gradient, against the largest entry of its tensor.
# A gradient that is zero but for rounding has no scale of its own; it gets a share of
# the largest of all.
_SMALLEST_SCALE = 1e-3

Arrays = Mapping[str, Shaped[np.ndarray, "..."]]


def under(prefix: str, arrays: Arrays) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays below `prefix`, without it: `under("param.", arrays)`."""
    return {
        key.removeprefix(prefix): array
        for key, array in arrays.items()
        if key.startswith(prefix)
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A recording: its description, and its arrays by key."""

    name: str
    about: Mapping[str, Any]
    arrays: Arrays

    @classmethod
    def read(cls, folder: pathlib.Path, name: str) -> "Case":
        about = json.loads((folder / f"{name}.json").read_text())
        arrays = safetensors.numpy.load_file(folder / f"{name}.safetensors")
        return cls(name, about, arrays)

    def under(self, prefix: str) -> dict[str, Shaped[np.ndarray, "..."]]:
        return under(prefix, self.arrays)

    @property
    def params(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        return self.under("param.")


class Tally:
    """Gathers differences. What is not recorded is not compared."""

    def __init__(self, case: Case):
        self._arrays = case.arrays
        self.compared: list[str] = []
        self.problems: list[str] = []
        self._errors: list[float] = []
        self._gradients: list[tuple[float, float]] = []  # (error, scale)
        self._kept: list[bool] = []
        self._tokens: list[bool] = []

    def value(self, name: str, got: Any) -> None:
        """Compares with the recorded array `name`, to an absolute tolerance."""
        if self._same_shape(name, got):
            self._errors.append(_difference(got, self._arrays[name]))
            if not self._errors[-1] <= ABSOLUTE:
                self.problems.append(f"{name} is off by {self._errors[-1]:.3g}")

    def values(self, got: Mapping[str, Any]) -> None:
        for name, array in got.items():
            self.value(name, array)

    def gradients(self, got: Mapping[str, Any]) -> None:
        """Compares each recorded gradient with the one under its published name."""
        for name in self._arrays:
            if name.startswith("grad."):
                own = got.get(name.removeprefix("grad."))
                if own is None:
                    self.problems.append(f"{name} is not computed")
                elif self._same_shape(name, own):
                    want = self._arrays[name]
                    scale = float(np.max(np.abs(want), initial=0.0))
                    self._gradients.append((_difference(own, want), scale))

    def kept(self, name: str, got: Any) -> None:
        """Compares the indices that a TransV stage keeps."""
        self._equal(name, got, self._kept)

    def tokens(self, name: str, got: Any) -> None:
        """Compares ids, labels and whatever else is a whole number."""
        self._equal(name, got, self._tokens)

    def _equal(self, name: str, got: Any, results: list[bool]) -> None:
        if name not in self._arrays:
            return
        self.compared.append(name)
        results.append(bool(np.array_equal(np.asarray(got), self._arrays[name])))
        if not results[-1]:
            self.problems.append(f"{name} differs")

    def _same_shape(self, name: str, got: Any) -> bool:
        if name not in self._arrays:
            return False
        self.compared.append(name)
        if np.shape(got) == self._arrays[name].shape:
            return True
        self.problems.append(
            f"{name} is {np.shape(got)}, not {self._arrays[name].shape}"
        )
        return False

    def line(self, case: str) -> dict[str, Any]:
        """What is printed of the case."""
        largest = max((scale for _, scale in self._gradients), default=0.0)
        floor = max(_SMALLEST_SCALE * largest, np.finfo(np.float32).tiny)
        relative = [error / max(scale, floor) for error, scale in self._gradients]
        worst = max(relative, default=0.0)
        if not worst <= RELATIVE:
            self.problems.append(f"a gradient is off by {worst:.3g} of its scale")
        if not self.compared:
            self.problems.append("nothing in it can be compared")
        return {
            "case": case,
            "compared": list(dict.fromkeys(self.compared)),
            "max_abs_error": _largest(self._errors),
            "max_rel_grad_error": _largest(relative),
            "kept_equal": all(self._kept) if self._kept else None,
            "tokens_equal": all(self._tokens) if self._tokens else None,
            "ok": not self.problems,
        }


def not_run(case: str) -> dict[str, Any]:
    """What is printed of a case that could not be run."""
    return {
        "case": case,
        "compared": [],
        "max_abs_error": None,
        "max_rel_grad_error": None,
        "kept_equal": None,
        "tokens_equal": None,
        "ok": False,
    }


def _difference(got: Any, want: Any) -> float:
    """The largest absolute difference; infinite where one is not a number."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = float(np.max(np.abs(got - want), initial=0.0))
    return error if np.isfinite(error) else float("inf")


def _largest(errors: list[float]) -> float | None:
    """JSON has no infinity: what is not finite prints as the largest number."""
    if not errors:
        return None
    return min(max(errors), float(np.finfo(np.float64).max))


def compile_once(f: Callable) -> Callable:
    """`f(module, *args)` compiled to run a few times, so in little time."""
    quick = {"xla_backend_optimization_level": 0}

    @functools.partial(
        jax.jit,
        static_argnums=0,
        compiler_options=quick if jax.default_backend() == "cpu" else None,
    )
    def run(graph, params, *args):
        return f(nnx.merge(graph, params), *args)

    return lambda module, *args: run(*nnx.split(module), *args)
