"""PyTorch peers, imported if they are there."""

import importlib
import importlib.util
from types import ModuleType

import pytest


def peer(name: str) -> ModuleType:
    """The module; where it is not installed, the file that asks for it is skipped."""
    package = name.split(".")[0]
    needed = ("torch", "torchvision", package) if package == "timm" else (package,)
    missing = [part for part in needed if importlib.util.find_spec(part) is None]
    if missing:
        pytest.skip(
            f"{' and '.join(missing)} not installed: run `make test-parity`",
            allow_module_level=True,
        )
    if importlib.util.find_spec("torchvision"):
        _import_torchvision()
    return importlib.import_module(name)


def _import_torchvision() -> None:
    """Imports it also where its operators were built for another torch.

    A torch for CPUs cannot load those of a torchvision for GPUs. Neither timm nor
    transforms call them, but importing torchvision asks that they exist.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        library = importlib.import_module("torch").library.Library
        _DECLARED.append(library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _DECLARED[-1].define(f"{name}(Tensor boxes, Tensor s, float iou) -> Tensor")
        importlib.import_module("torchvision")


_DECLARED = []  # An operator is gone when its library is.
