"""What lmms-eval reads at its start to know this model; it loads no JAX."""

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` behind the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="timeviper_jax",
        simple_class_path="timeviper_jax.evals.lmms.TimeViperJax",
    )
