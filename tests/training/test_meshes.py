"""Every way to split a step over eight devices gives what one device gives."""

import itertools
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest

MESHES = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(s) == 8]


def _run(what, meshes):
    """What `tests/training/meshes.py` prints on eight simulated devices."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    if jax.__version_info__ < (0, 11):
        # A third of the time to compile; later versions have but one emitter.
        flags += " --xla_cpu_use_fusion_emitters=false"
    arguments = [",".join(map(str, sizes)) for sizes in meshes]
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.meshes", what, *arguments],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _check(line):
    """That this mesh's loss and gradients are a single device's, in float32."""
    found = json.loads(line)
    assert found["loss"] < 1e-5, found
    assert found["grads"] < 1e-5, found


@pytest.mark.slow
def test_every_mesh_of_eight_gives_one_devices_loss_and_gradients():
    lines = _run("mixed", MESHES).splitlines()
    assert len(lines) == len(MESHES) == 20
    for line in lines:
        _check(line)


@pytest.fixture(scope="module")
def plain():
    """What a mesh of three axes gives, and the program that it ran."""
    return _run("plain", [(1, 2, 2, 2)]).split("\n", 1)


@pytest.mark.slow
def test_rows_of_one_sample_and_two_stages_do_too(plain):
    _check(plain[0])


def _computations(program):
    """The instructions of each computation of a program, by name."""
    header = r"^(?:ENTRY )?(%\S+) \([^\n]*\{\n"
    blocks = re.findall(header + r"(.*?)^\}", program, re.M | re.S)
    return dict(blocks)


def _reached(name, computations):
    """The text of a computation and of all that it calls."""
    text = computations[name]
    called = re.findall(r"(?:to_apply|calls|body|condition)=(%[\w.\-]+)", text)
    return text + "".join(_reached(other, computations) for other in called)


@pytest.mark.slow
def test_no_loop_within_a_layer_gathers_anything(plain):
    computations = _computations(plain[1])
    bodies = {
        name
        for text in computations.values()
        for name in re.findall(r"body=(%[\w.\-]+)", text)
    }
    loops = {name: _reached(name, computations) for name in bodies}
    gathering = [name for name, text in loops.items() if " all-gather" in text]
    # Rings, chunks of tokens, the head's parts: they pass on, or add up.
    assert len(loops) > 10 and not gathering
    assert any(" collective-permute" in text for text in loops.values())
    # Parameters and states are gathered, outside.
    assert " all-gather" in "".join(computations.values())
