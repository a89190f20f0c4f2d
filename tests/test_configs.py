"""Every config builds, its smoke mode trains, and its sweep names real fields."""

import importlib
import json
import pathlib

import pytest

import train
from configs.common import MODELS, parse_arg
from timeviper_jax import sharding
from timeviper_jax.benchmarks.fit import __main__ as command
from timeviper_jax.benchmarks.fit import program, report, table
from timeviper_jax.layers.lora import is_lora
from timeviper_jax.presets import PRESETS
from timeviper_jax.training.checkpoint import load_model, open_run
from timeviper_jax.training.experiment import StageConfig, describe, model_config
from timeviper_jax.training.optimizer import OptimizerConfig, make_optimizer

CONFIGS = sorted(
    path.stem
    for path in pathlib.Path("configs").glob("*.py")
    if path.stem not in ("__init__", "common")
)


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def get_config(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def smoke(name, folder):
    """A smoke config that keeps its data in a test's own folder."""
    c = get_config(name, "smoke")
    c.data.manifest = str(folder / "data" / "data.yaml")
    c.data.features = str(folder / "features")
    return c


def test_a_config_says_how_to_run_it(name):
    doc = importlib.import_module(f"configs.{name}").__doc__
    assert f"python train.py --config configs/{name}.py --workdir" in doc
    assert f"configs/{name}.py:smoke" in doc


@pytest.mark.parametrize("arg", ["", "smoke"])
def test_every_stage_fits_its_model(name, arg):
    c = get_config(name, arg)
    assert set(c.stage_order) <= set(c.stages)
    for stage in map(StageConfig.from_dict, c.to_dict()["stages"].values()):
        cfg = model_config(**c.model).with_transv(stage.transv)
        _, shapes = describe(cfg)
        moving = {path: shapes[path] for path in stage.moving(shapes)}
        assert moving
        make_optimizer(
            moving, lambda _: 1.0, OptimizerConfig(**c.optimizer), stage.lr_multipliers
        )


def make_step(name, arg, row):
    """A config's last stage on the chips of a row of docs/pods.md's table."""
    config = json.loads(json.dumps(get_config(name, arg).to_dict()))
    mesh = report.devices_without(row.topology, command.axes(row.mesh))
    return program.make(config, mesh, rows=row.rows)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_both_stages_of_every_model_divide_on_the_documents_meshes(model):
    """Which also finds each parameter's one rule, and what each pattern names."""
    for row in table.ROWS:
        video = f"model={model},frames={row.frames}"
        for name, arg in (("stage1_align", f"model={model}"), ("stage2_video", video)):
            step = make_step(name, arg, row)
            assert step.arguments.batch.tokens.shape[0] == row.rows
            assert step.cfg.llm.pattern == PRESETS[model].llm.pattern


@pytest.mark.parametrize("model", sorted(MODELS))
def test_transv_stands_at_the_same_depth_in_every_model(model):
    step = make_step("stage2_video", f"model={model}", table.ROWS[0])
    llm = step.cfg.llm
    depths = [stage.layer / len(llm.pattern) for stage in llm.transv]
    assert depths == pytest.approx([7 / 56, 39 / 56], abs=1 / 50)
    assert llm.layers[llm.transv[1].layer][0] == "attention"
    if "M" not in llm.pattern:
        assert not any(stage.layer % 2 for stage in llm.transv)


def test_lora_trains_pairs_projector_and_transv_alone():
    step = make_step("stage2_video", "lora,frames=144", table.ROWS[0])
    state, frozen, _ = step.arguments
    pairs = {path for path in state.params if is_lora(path)}
    assert {path.split("/")[0] for path in state.params.keys() - pairs} == {
        "projector",
        "llm",
    }
    others = {path for path in state.params.keys() - pairs if path.startswith("llm/")}
    assert others and all(path.startswith("llm/transv/") for path in others)
    matrices = {path.rpartition("/")[0] for path in pairs}
    assert matrices <= frozen.keys() and len(pairs) == 2 * len(matrices) == 2 * 12
    assert state.params["llm/mlp/mixer/up/kernel/lora_a"].shape == (25, 4480, 128)


def test_an_unknown_model_is_an_error():
    with pytest.raises(ValueError, match="model='nano_13b' is not one of"):
        get_config("stage1_align", "model=nano_13b")


@pytest.mark.parametrize("arg", ["long", "arm=drop,long"])
def test_long_stages_fit_too(arg):
    test_every_stage_fits_its_model("needles", arg)
    (stage,) = get_config("needles", arg).stage_order
    assert stage == arg.partition("=")[0]


def test_a_sweep_names_real_fields(name):
    for overrides in importlib.import_module(f"configs.{name}").sweep():
        c = get_config(name).lock()
        c.update_from_flattened_dict(overrides)
        for key, value in overrides.items():
            *path, last = key.split(".")
            place = c
            for part in path:
                place = place[part]
            assert place[last] == value


def test_smoke_trains_every_stage_it_names(name, tmp_path):
    c = smoke(name, tmp_path)
    train.run(c, str(tmp_path / "run"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in lines]
    assert stages == [stage for stage in c.stage_order for _ in range(4)]
    model = load_model(open_run(tmp_path / "run"), sharding.make_mesh(fsdp=-1))
    assert model.cfg.vision == model_config(**c.model).vision


def test_a_stage_does_not_move_what_it_does_not_read():
    stages = get_config("needles").to_dict()["stages"]
    _, shapes = describe(model_config(**get_config("needles").model))
    moving = {
        name: StageConfig.from_dict(s).moving(shapes) for name, s in stages.items()
    }
    parts = {name: {p.split("/")[0] for p in paths} for name, paths in moving.items()}
    assert parts["warmup"] == {"vision", "projector", "llm"}
    assert parts["scenes"] == {"projector", "time", "llm"}
    in_llm = {path for path in moving["warmup"] if path.startswith("llm/")}
    assert in_llm == {"llm/embed/embedding"}


def test_a_field_that_is_misspelt_or_missing_is_an_error():
    stage = get_config("stage1_align").to_dict()["stages"]["align"]
    with pytest.raises(TypeError, match="stepz"):
        StageConfig.from_dict({**stage, "stepz": 4})
    with pytest.raises(TypeError, match="lr_multipliers"):
        StageConfig.from_dict({k: v for k, v in stage.items() if k != "lr_multipliers"})
    with pytest.raises(ValueError, match="'pictures' is not one of"):
        StageConfig.from_dict({**stage, "task": {"kind": "pictures"}})
    with pytest.raises(ValueError, match=r"'\^visoin/' names no parameter"):
        shapes = dict.fromkeys(["vision/a", "llm/b"])
        StageConfig.from_dict({**stage, "frozen": ("^visoin/",)}).moving(shapes)


def test_arguments_take_the_type_of_their_default():
    values = parse_arg("frames=512,smoke,lr=1e-3", frames=256, smoke=False, lr=0.1)
    assert (values.frames, values.smoke, values.lr) == (512, True, 1e-3)
    assert parse_arg("smoke=false", smoke=True).smoke is False


def test_a_misspelt_argument_is_an_error():
    with pytest.raises(ValueError, match="'frame' is not one of"):
        get_config("stage2_video", "frame=512")
    with pytest.raises(ValueError, match="smoke='yes' is neither true nor false"):
        get_config("stage2_video", "smoke=yes")
