"""Every way to split a step over eight devices gives what one device gives."""

import contextlib
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys

import jax
import pytest

MESHES = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(s) == 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


def _run(folder, what, meshes, *, processes=1):
    """What each process of `tests/training/meshes.py` prints, on 8 devices in all."""
    flags = f"--xla_force_host_platform_device_count={8 // processes}"
    if jax.__version_info__ < (0, 11):
        # A third of the time to compile; later versions have but one emitter.
        flags += " --xla_cpu_use_fusion_emitters=false"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}"}
    if processes > 1:
        environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{_free_port()}"
        environment["JAX_NUM_PROCESSES"] = str(processes)
    command = [sys.executable, "-m", "tests.training.meshes"]
    command += [str(folder / f"{what}.npz"), what]
    command += [",".join(map(str, sizes)) for sizes in meshes]
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(processes):
            out, log = (
                stack.enter_context((folder / f"{name}{number}.txt").open("w+"))
                for name in ("out", "log")
            )
            if processes > 1:
                environment["JAX_PROCESS_ID"] = str(number)
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=log)
            stack.callback(process.kill)
            started.append((process, out, log))
        for process, _, log in started:
            status = process.wait(600)
            assert not status, log.seek(0) or log.read()[-3000:]
        return [out.seek(0) or out.read() for _, out, _ in started]


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _check(line):
    """That this mesh's loss and gradients are a single device's, in float32."""
    found = json.loads(line)
    assert found["loss"] < 1e-5, found
    assert found["grads"] < 1e-5, found


@pytest.mark.slow
def test_every_mesh_of_eight_gives_one_devices_loss_and_gradients(folder):
    (printed,) = _run(folder, "mixed", MESHES)
    lines = printed.splitlines()
    assert len(lines) == len(MESHES) == 20
    for line in lines:
        _check(line)


@pytest.fixture(scope="module")
def plain(folder):
    """What a mesh of three axes gives, and the program that it ran."""
    (printed,) = _run(folder, "plain", [(1, 2, 2, 2)])
    return printed.split("\n", 1)


@pytest.mark.slow
def test_rows_of_one_sample_and_two_stages_do_too(plain):
    _check(plain[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "what", "sizes"),
    [
        # What cuts first goes across processes: fsdp, then tensor and context, whose
        # hosts make the same rows.
        (2, "single", (1, 2, 2, 2)),
        (4, "mixed", (1, 1, 2, 4)),
    ],
)
def test_processes_that_share_a_mesh_do_too(folder, processes, what, sizes):
    if not (folder / f"{what}.npz").exists():
        _run(folder, what, [])
    for printed in _run(folder, what, [sizes], processes=processes):
        (line,) = [x for x in printed.splitlines() if x.startswith("{")]
        assert json.loads(line)["processes"] == processes
        _check(line)


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
