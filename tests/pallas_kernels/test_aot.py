"""The kernels compile for real TPUs, forward and backward, with no chip."""

import pytest

from pallas_kernels.bench import compiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not compiled.available(),
        reason="the TPU compiler is not installed: pip install libtpu",
    ),
]

# One group and several parts of it; few and narrow heads; float32 and a ragged end.
ODD = [
    (2304, 80, 64, 1, 128, "bfloat16"),
    (100, 4, 16, 1, 16, "bfloat16"),
    (700, 4, 64, 2, 128, "float32"),
]


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_nano_9b_compiles_in_little_memory(chip):
    forward = compiled.compile_apart(chip, "forward")
    assert forward["temp_bytes"] <= 0.05 * forward["input_bytes"]
    backward = compiled.compile_apart(chip, "backward")
    assert backward["temp_bytes"] <= 0.3 * forward["input_bytes"]


@pytest.mark.parametrize("shape", ODD)
def test_odd_shapes_compile(shape):
    report = compiled.compile_apart("v5e", "backward", shape)
    assert report["bundles"]["ssd_backward"] > 0
