"""Whether a step fits: what is read from programs, and the arithmetic beside it."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.bench import compiled
from pallas_kernels.chips import CHIPS
from timeviper_jax import sharding
from timeviper_jax.benchmarks.fit import __main__ as command
from timeviper_jax.benchmarks.fit import (
    hlo,
    least,
    lengths,
    prefill,
    program,
    report,
    table,
)
from timeviper_jax.benchmarks.prefill import settings
from timeviper_jax.training.arithmetic import step_flops

SMOKE = "configs/stage2_video.py:smoke"

# As libtpu writes it, cut down: a loop whose condition alone says that it runs four
# times, one that says so itself, a choice of three within it, and a fused sum.
LOOPS = """\
HloModule jit_train_step, is_scheduled=true, num_partitions=8

%all-reduce-scatter (input: bf16[64,8]) -> bf16[8,8] {
  %all-reduce.18 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=19, \
replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add
}

%condition.1 (wide.param: (s32[], f32[16])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[]{:T(512)} compare(%element, %constant.5), direction=LT
}

%body.1 (wide.param.1: (s32[], f32[16])) -> (s32[], f32[16]) {
  %psum = (f32[16]{0:T(128)S(1)}, f32[16]{0}) all-reduce(%a, %b), channel_id=1, \
replica_groups=[2,4]<=[8], to_apply=%add, \
metadata={op_name="jit(train_step)/shard_map/psum"}
}

%mlp (param.1: bf16[4]) -> bf16[4] {
  %gathered = bf16[1,32,16]{1,2,0:T(8,128)(2,1)} all-gather(%w), channel_id=14, \
replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={2}
}

%attention (param.2: bf16[4]) -> bf16[4] {
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%k), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
}

%mamba (param.3: bf16[4]) -> bf16[4] {
  %copy = bf16[4]{0} copy(%param.3)
}

%condition.2 (state: (s32[])) -> pred[] {
  %constant.6 = s32[]{:T(128)} constant(99)
}

%body.2 (state.1: (s32[])) -> (s32[]) {
  %mixed = bf16[4]{0} conditional(%kind, %x, %x, %x), \
branch_computations={%attention, %mamba, %mlp}
}

ENTRY %main.74_spmd (param.4: bf16[4]) -> bf16[4] {
  %while.60 = (s32[]{:T(128)}, f32[16]{0}) while(%tuple), condition=%condition.1, \
body=%body.1, metadata={op_name="jit(train_step)/while"}
  %while.61 = (s32[]{:T(128)}) while(%tuple.1), condition=%condition.2, body=%body.2, \
backend_config={"known_trip_count":{"n":"7"},"known_init_step":{"init":"0"}}
  %fusion.2 = bf16[8,8]{1,0} fusion(%dw), kind=kCustom, calls=%all-reduce-scatter
  %norm = f32[2,3]{1,0} all-reduce(%n), replica_groups=mesh['a'=4,'b'=2] {'a'}, \
to_apply=%add
}
"""


def test_exchanges_count_as_often_as_their_loops_run():
    found = hlo.read(LOOPS, {(7, 3): [1, 4, 2]})
    assert found.exact
    assert found.by_kind == {
        # Two arrays around a ring of four, four times; one around the axis of four.
        "all-reduce": 4 * (2 * 64 * 2 * 3 // 4) + 24 * 2 * 3 // 4,
        # The other half of a matrix, in the two layers of seven that have it.
        "all-gather": 2 * (32 * 16 * 2) // 2,
        "collective-permute": 4 * 8 * 2,
        "reduce-scatter": 64 * 8 * 2 * 7 // 8,
    }
    (psum,) = [one for one in found.found if one.times == 4]
    assert psum.source == "jit(train_step)/shard_map/psum"
    gather, *_ = [one for one in found.found if one.kind == "all-gather"]
    assert (psum.loops, gather.loops) == ((4,), (7,))


def test_the_dearest_branch_counts_where_nobody_says_which_is_taken():
    found = hlo.read(LOOPS)
    assert not found.exact
    assert found.by_kind["all-gather"] == 7 * 32 * 16 * 2 // 2
    assert "collective-permute" not in found.by_kind


def _in_loops(source, *trips, kind="all-gather"):
    return hlo.Exchange(kind=kind, bytes=1, times=1, source=source, loops=trips)


def test_only_tokens_in_a_layers_own_loops_are_gathered_in_chunks():
    """The tiny model's segments are of 1, 5 and 2 layers."""
    found = [
        _in_loops("jit(f)/while/body/ssd/all_gather", 5),  # States, once a layer.
        _in_loops("jit(f)/while/body/while/body/parameters/all_gather", 3, 2),
        _in_loops("jit(f)/jvp(vision)/while/body/while/body/shard_map", 4, 2),
        _in_loops("jit(f)/while/body/while/body/ppermute", 5, 8, kind="all-to-all"),
        _in_loops("jit(f)/while/body/while/body/keys", 5, 5),
        _in_loops("jit(f)/while/body/words", 8),
    ]
    exchanges = hlo.Exchanges(found=tuple(found), exact=True)
    late = ["jit(f)/while/body/while/body/keys", "jit(f)/while/body/words"]
    assert report.gathers_in_chunks(make(), exchanges) == late


@pytest.mark.parametrize(
    "line, moved",
    [
        ("(bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x)", 8 * 8 * 2 * 3 // 4),
        ("bf16[2,8]{1,0} reduce-scatter(%x)", 2 * 8 * 2 * 3),
        ("s32[4,8]{1,0} all-to-all(%x)", 4 * 8 * 4 * 3 // 4),
        ("pred[64]{0} all-gather(%x)", 64 * 3 // 4),
    ],
)
def test_bytes_are_those_a_device_takes_in(line, moved):
    text = f"ENTRY %main () -> f32[] {{\n  %a = {line}, replica_groups=[2,4]<=[8]\n}}"
    (found,) = hlo.read(text).found
    assert found.bytes == moved


def make(rows: int = 8, **sizes: int) -> program.Program:
    """The smoke run's step, on devices that nobody has."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    mesh = AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    return program.make(program.read_config(SMOKE), mesh, rows=rows)


def test_without_a_mesh_nothing_is_exchanged():
    assert set(least.least_bytes(make()).values()) == {0}


def test_fsdp_gathers_weights_twice_and_scatters_gradients_once():
    step = make(fsdp=2)
    found = least.least_bytes(step)
    state, frozen, _ = step.arguments
    split = lambda params: sum(
        math.prod(array.shape) * 4
        for path, array in params.items()
        if "fsdp" in jax.tree.leaves(tuple(sharding.spec_of(path)))
        and not path.startswith(("llm/embed", "llm/head"))
    )
    # Of each matrix the other half; the encoder, which stands still, once.
    assert found["weights"] == (2 * split(state.params) + split(frozen)) // 2
    assert found["gradients"] == split(state.params) // 2
    assert found["tensor_parallel"] == found["keys_and_values"] == 0


def test_tensor_and_context_exchange_what_tokens_make():
    """Rows of 6 x 4 vision tokens and 120 others, of which TransV leaves 132, 126."""
    wide = least.least_bytes(make(tensor=2))
    tokens = 8 * (1 * 144 + 5 * 132 + 2 * 126)
    # Two sums a layer, each of an array of which a device lacks one half, twice.
    assert wide["tensor_parallel"] == 2 * 2 * tokens * 32 * 4 // 2
    long = least.least_bytes(make(context=2))
    # Attention stands at 3 and 6: keys and values, 2 x 2 heads of 8, four times.
    assert long["keys_and_values"] == 4 * 8 * (132 + 126) // 2 * 2 * 2 * 8 * 4
    state, halo = 4 * (16 * 8 + 1) * 4, 3 * (4 * 16 + 2 * 2 * 8) * 4
    assert long["states_and_halos"] == 3 * 3 * 8 * (state + halo)


def test_context_splits_parameters_and_moments_as_fsdp_does():
    """But for the encoder's, and what is too small to gather again in every layer."""
    split = lambda **sizes: program.bytes_of_a_chip(
        {
            path: array
            for path, array in make(**sizes).arguments.state.opt_state[1].mu.items()
            if path.startswith("llm/") and path.endswith(("kernel", "embedding"))
        }
    )
    assert split(context=4) < 1.1 * split(fsdp=4) < 0.3 * split()


def test_what_cannot_fit_is_said_with_the_arithmetic():
    config = program.read_config("configs/stage2_video.py:frames=144")
    mesh = AbstractMesh((1, 8, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    step = program.make(config, mesh, rows=64)
    with pytest.raises(ValueError, match=r"16 GiB and the step needs .*\(optimizer\)"):
        report.check_fits(step, "v5e:2x4", CHIPS["v5e"])
    report.check_fits(step, "v5p:2x2x2", CHIPS["v5p"])


def test_the_arithmetic_needs_no_compiler():
    config = program.read_config(SMOKE)
    found = report.reckon(config, "v5e:2x4", {"fsdp": 4, "context": 2}, rows=8)
    assert set(found["least_gib"]) == {"weights", "optimizer", "batch", "layer inputs"}
    assert found["exchange_seconds"] < 1e-3
    with pytest.raises(ValueError, match="takes 4 chips and v5e:2x4 has 8"):
        report.reckon(config, "v5e:2x4", {"fsdp": 4})


def test_a_row_of_the_table_is_of_the_chips_or_says_why_not():
    row = table.Row("v5e:2x4", "fsdp=4,context=2", 8, 6)
    start = "| v5e:2x4, 8 × 2,144 | fsdp=4,context=2 | "
    assert table.line(row, {"error": "Too many."}) == start + "Too many. |"
    config = program.read_config(SMOKE)
    found = report.reckon(config, row.topology, command.axes(row.mesh), rows=row.rows)
    cells = table.line(row, found).removeprefix(start).split(" | ")
    assert len(cells) == len(table.HEADS[True].split(" | "))
    assert cells[2].endswith(" (layer inputs)")


def test_all_but_attention_is_so_much_a_frame():
    def parts(frames):
        config = program.read_config(SMOKE)
        config["stages"]["instruct"]["task"]["num_frames"] = frames
        step = program.make(config, report.devices_without("v5p:1", {}), rows=2)
        attention = lengths.attention_flops(step)
        whole = step_flops(step.cfg, step.stage, step.arguments.state.params)
        return np.array([whole - attention, attention])

    (first, attention), (second, more) = np.diff(
        [parts(n) for n in (8, 16, 24)], axis=0
    )
    assert first == second > 0
    # Rows of 152 to 216 tokens, of which the layers of attention see 136, 152, 168 and
    # 128, 136, 144: two products forward, and two for each one's gradients.
    pairs = lambda n: n * (n + 1) // 2
    want = pairs(152) - pairs(136) + pairs(136) - pairs(128)
    assert attention == 2 * 2 * 3 * 2 * 4 * 8 * want < more


def test_lengths_are_of_a_step_of_the_same_tokens():
    config = program.read_config("configs/stage2_video.py:transv=false")
    found = lengths.cost(config, 32_768)
    assert (found["tokens_per_row"], found["frames"], found["rows"]) == (
        32768,
        1920,
        20,
    )
    assert found["layer_input_kb_per_token"] == round(56 * 4480 * 2 / 1e3, 1)
    cells = lengths.line(found | {"temp_kb_per_token": 1.5}).split(" | ")
    assert len(cells) == 6 and cells[-1] == "1.5 |"


def test_a_config_says_which_inference_to_compile():
    config = program.read_config("configs/stage2_video.py:frames=512,transv=false")
    setting = settings.make(**prefill.setting_of(config))
    assert (setting.frames, setting.sizes.llm.transv) == (512, ())
    # The preset has no TransV of its own.
    config = program.read_config("configs/stage2_video.py:model=nano_12b")
    setting = settings.make(**prefill.setting_of(config))
    assert [stage.layer for stage in setting.sizes.llm.transv] == [7, 43]


def test_what_is_asked_for_wrongly_is_said(monkeypatch, capsys):
    with pytest.raises(ValueError, match="try v5p:4x4x4"):
        report.chip_of("v3:8")
    with pytest.raises(ValueError, match="no config 'nowhere.py'"):
        program.read_config("nowhere.py:frames=4")
    with pytest.raises(SystemExit):
        command.parse(["--config", "a", "--topology", "b", "--mesh", "fsdp:8"])
    with pytest.raises(SystemExit):
        command.parse(
            ["--config", "a", "--topology", "b", "--prefill", "--mesh", "tensor=8"]
        )
    assert "inference runs on one chip" in capsys.readouterr().err
    monkeypatch.setattr(compiled, "available", lambda: False)
    monkeypatch.setattr(
        sys,
        "argv",
        ["fit", "--config", SMOKE, "--topology", "v5e:2x4", "--mesh", "a=1"],
    )
    with pytest.raises(SystemExit, match="not installed: pip install libtpu"):
        command.main()


@pytest.mark.slow
@pytest.mark.skipif(
    not compiled.available(),
    reason="The TPU compiler is not installed: pip install libtpu.",
)
def test_a_step_compiles_for_a_pod():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "timeviper_jax.benchmarks.fit", "--json"),
            *("--config", SMOKE, "--topology", "v5e:2x4", "--rows", "8"),
            *("--mesh", "fsdp=2,tensor=2,context=2"),
        ],
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["fits"] and 0 < found["bound_mfu"] < 1
    assert found["gib_per_chip"] >= found["argument_gib"]
    assert found["collective_bytes"] and found["compile_cpu_seconds"] > 0
    assert found["collective_bytes"]["all-gather"] and not found["gathers_in_chunks"]
