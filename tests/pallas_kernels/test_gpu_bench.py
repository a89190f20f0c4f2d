"""What `bench gpu` says of programs and machines, where there is no GPU."""

import argparse
import json

import pytest

from pallas_kernels.bench import gpu, gpu_compiled, gpu_timing
from pallas_kernels.bench.programs import Shape

# 1000 float32 in and 1000 bfloat16 out; then both in and two numbers out.
PROGRAM = """HloModule jit_f, is_scheduled=true

%inside (p.1: f32[9]) -> f32[9] {
  ROOT %p.1 = f32[9]{0} parameter(0)
}

ENTRY %main.3 (x.1: f32[10,100]) -> (bf16[], f32[]) {
  %x.1 = f32[10,100]{1,0} parameter(0), metadata={op_name="x"}
  %half.2 = bf16[10,100]{1,0} fusion(%x.1), kind=kLoop, calls=%inside
  %flat.1 = bf16[1000]{0} bitcast(%half.2)
  %both = (f32[], /*index=1*/bf16[]) custom-call(%x.1, %flat.1), custom_call_target="z"
  %one.0 = f32[] get-tuple-element(%both), index=0
  ROOT %tuple.1 = (f32[], bf16[]) tuple(%one.0, %one.0)
}
"""


def _arguments(**changes):
    values = dict(aot=False, json=False, mamba=None, results=None) | changes
    return argparse.Namespace(**values)


def test_bytes_moved_are_those_of_operations():
    assert gpu_compiled.moved_bytes(PROGRAM) == (4000 + 2000) + (4000 + 2000 + 4 + 2)


def test_without_a_gpu_it_ends_with_one_line():
    with pytest.raises(SystemExit, match="^No GPU: JAX sees 'cpu'.*--aot$"):
        gpu.run(_arguments())


def test_a_run_checks_times_and_writes_a_file(monkeypatch, tmp_path):
    """Interpreted, as if this processor were the GPU: everything but the times."""
    monkeypatch.setattr(gpu_timing, "NANO_9B", Shape(64, 4, 16, 2, 16))
    monkeypatch.setattr(gpu_timing, "CHECKED", Shape(64, 4, 16, 2, 16))
    monkeypatch.setattr(gpu_timing, "LENGTHS", (64,))
    monkeypatch.setattr(gpu_timing, "SCAN_CHUNKS", (32,))
    monkeypatch.setattr(gpu_timing, "TURNS", 1)
    results = gpu_timing.measure(tmp_path)
    path = gpu_timing.write(results, tmp_path / "results")
    assert path.name == f"cpu_{results['date']}.json"
    assert json.loads(path.read_text())["accurate"]
    assert results["times"][0]["backward"]["moved_bytes"] > 0
    assert "ssd_combined.py" in results["mamba"]
    assert "64 tokens, backward" in gpu_timing.text(results)
