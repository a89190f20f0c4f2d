"""What all tests share: shapes checked at each call, one cache of compilations."""

import importlib.metadata
import importlib.util
import os
import pathlib

# Set before JAX is imported, and inherited by the processes that a test starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile for minutes what they run for milliseconds: don't optimise it.
_QUICK = ["--xla_backend_optimization_level=0"]
_OLD = int(importlib.metadata.version("jaxlib").split(".")[1]) < 11
if _OLD and importlib.util.find_spec("libtpu") is None:
    # Takes a third off the suite; newer ones and the TPU compiler have no such flag.
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_QUICK))
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

from jaxtyping import install_import_hook  # noqa: E402 (after the environment)

install_import_hook(["timeviper_jax", "pallas_kernels"], "beartype.beartype")
