"""Reads the recorded cases of tests/golden/ (see extract.py there)."""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from timeviper_jax.benchmarks.recorded.case import under

__all__ = ["GOLDEN", "load", "under"]

GOLDEN = pathlib.Path(__file__).parent / "golden"


def load(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns a case's description and its arrays, by `param.*`, `in.*`, `out.*`."""
    config = json.loads((GOLDEN / f"{case}.json").read_text())
    return config, safetensors.numpy.load_file(GOLDEN / f"{case}.safetensors")
