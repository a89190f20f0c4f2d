"""Reads the recorded cases of tests/golden/ (see extract.py there)."""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

GOLDEN = pathlib.Path(__file__).parent / "golden"


def load(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns a case's description and its arrays, by `param.*`, `in.*`, `out.*`."""
    config = json.loads((GOLDEN / f"{case}.json").read_text())
    return config, safetensors.numpy.load_file(GOLDEN / f"{case}.safetensors")


def under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays below `prefix`, without it: `under("param.", arrays)`."""
    return {
        key.removeprefix(prefix): array
        for key, array in arrays.items()
        if key.startswith(prefix)
    }
