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


# Nano-9B's heads and a length that no large block divides; the encoder's heads; one
# key head, float32 and a ragged end.
ATTENTION = [
    ("v5e", (4352, 40, 8, 128)),
    ("v5p", (4352, 40, 8, 128)),
    ("v6e", (4352, 40, 8, 128)),
    ("v5e", (729, 16, 16, 72)),
    ("v5e", (500, 4, 1, 80, "float32")),
]


@pytest.mark.parametrize("chip, shape", ATTENTION)
def test_attention_compiles_to_splash_kernels(chip, shape):
    for direction in ("forward", "backward"):
        report = compiled.compile_apart(chip, direction, shape, op="attention")
        assert all(report["bundles"][kernel] > 0 for kernel in report["counted"])


def test_the_convolution_compiles():
    report = compiled.compile_apart(
        "v5e", "backward", (1000, 256, 4), op="causal_conv1d"
    )
    assert report["accessed_bytes"] > report["input_bytes"]
