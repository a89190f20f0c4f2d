"""Loading needs little more memory than the arrays that it fills."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

# Six files of 64 MB; the arrays take 384 MB, and one tensor 32.
_LOAD = """
import pathlib, resource, sys
import jax, numpy as np
from timeviper_jax import sharding
from timeviper_jax.conversion import stream
from timeviper_jax.conversion.files import open_files
from timeviper_jax.conversion.rules import Rule

folder, peak = pathlib.Path(sys.argv[1]), lambda: (
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
mesh = sharding.make_mesh(fsdp=-1)
shape = jax.ShapeDtypeStruct((12, 2048, 4096), np.float32)
shapes = {"llm/mlp/mixer/up/kernel": shape}
rules = [Rule(r"up\\.(\\d+)", r"llm/mlp/mixer/up/kernel[\\1]", "M D -> D M")]
files = open_files(folder)
small = {"llm/norm/scale": jax.ShapeDtypeStruct((4,), np.float32)}
stream.load(open_files(folder / "small"), small, [Rule("norm", "llm/norm/scale")], mesh)
before = peak()
params = stream.load(files, shapes, rules, mesh)
jax.block_until_ready(params)
print(peak() - before, params["llm/mlp/mixer/up/kernel"].nbytes)
last = np.asarray(params["llm/mlp/mixer/up/kernel"][11])
assert np.array_equal(last, files.read("up.11").T)
"""


@pytest.mark.slow
def test_memory_beyond_the_arrays_is_that_of_a_few_tensors(tmp_path):
    for number in range(6):
        tensors = {
            f"up.{2 * number + i}": np.full((4096, 2048), number + i, np.float32)
            for i in (0, 1)
        }
        safetensors.numpy.save_file(tensors, tmp_path / f"{number}.safetensors")
    (tmp_path / "small").mkdir()
    norm = {"norm": np.ones(4, np.float32)}
    safetensors.numpy.save_file(norm, tmp_path / "small" / "norm.safetensors")
    root = pathlib.Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    rise, arrays = map(int, run.stdout.split())
    tensor = 4096 * 2048 * 4
    assert arrays == 12 * tensor
    # One on its way from the file, one laid out anew, one on the device, and the
    # compiler; a second copy of the arrays would be twelve.
    assert rise < arrays + 8 * tensor, (rise, arrays)
