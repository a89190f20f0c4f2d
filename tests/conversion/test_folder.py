"""Published checkpoints into folders and back: every byte, and what is in the way."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden_cases import load, under

from timeviper_jax import presets, sharding
from timeviper_jax.conversion import folder as folders
from timeviper_jax.conversion.__main__ import main
from timeviper_jax.conversion.files import open_files

CASE = "vlm_nano_generate_pdrop"


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(fsdp=-1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A tiny checkpoint as the release names it, in two files, and the sizes it has."""
    description, arrays = load(CASE)
    published = under("param.", arrays)
    published = {n: a.astype(ml_dtypes.bfloat16) for n, a in published.items()}
    published["llm_backbone.llm.backbone.alpha"] = under("param.", arrays)[
        "llm_backbone.llm.backbone.alpha"
    ]
    published["vision_backbone.featurizer.norm.weight"] = np.ones(64, np.float32)
    folder = tmp_path_factory.mktemp("release")
    names, index = sorted(published), {}
    for number, some in enumerate((names[:70], names[70:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        own = {name: published[name] for name in some}
        safetensors.numpy.save_file(own, folder / file, {"format": "pt"})
        index |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(description["config"]))
    base = folder / "sizes.json"
    presets.write_config(base, _sizes())
    return folder, published


def _sizes():
    import dataclasses

    base = presets.PRESETS["tiny"]
    vision = dataclasses.replace(
        base.vision,
        image_size=58,
        patch_size=14,
        embed_dim=64,
        depth=4,
        num_heads=4,
        mlp_dim=239,
    )
    projector = dataclasses.replace(base.projector, vision_dim=64)
    return dataclasses.replace(base, vision=vision, projector=projector)


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory):
    """The folder that the command makes of it."""
    target = tmp_path_factory.mktemp("converted") / "folder"
    sizes = release[0] / "sizes.json"
    main(["load", str(release[0]), str(target), "--preset", str(sizes)])
    return target


def test_a_release_checkpoint_comes_back_to_the_byte(release, converted, tmp_path):
    source, published = release
    main(["save", str(converted), str(tmp_path / "out")])
    for file in sorted(source.glob("*.safetensors")):
        want, got = open_files(file), open_files(tmp_path / "out" / file.name)
        assert sorted(got.entries) == sorted(want.entries)
        for name, entry in want.entries.items():
            assert got.entries[name].dtype == entry.dtype, name
            assert got.read(name).tobytes() == want.read(name).tobytes(), name
    assert open_files(tmp_path / "out").shapes == open_files(source).shapes
    assert (tmp_path / "out/config.json").read_text() == (
        source / "config.json"
    ).read_text()


def test_the_checkpoints_own_config_sizes_the_model(converted):
    cfg = presets.read_config(converted / "model.json")
    assert cfg.llm.pattern == "M-M*-M-*-M*-"
    assert [stage.layer for stage in cfg.llm.transv] == [1, 7]
    assert cfg.llm.param_dtype == "float32"  # What holds bfloat16 and float32.
    assert cfg.projector.llm_dim == cfg.llm.embed_dim == 64


def test_parts_are_found_by_their_paths(converted, mesh):
    params = folders.read_converted(converted, mesh, parts=[r"^projector/"])
    assert {path.split("/")[0] for path in params} == {"projector"}
    both = folders.read_converted(converted, mesh)
    assert {path.split("/")[0] for path in both} == {"vision", "projector", "llm"}


def test_missing_extra_and_misshapen_tensors_are_all_named(release, tmp_path, mesh):
    _, published = release
    wrong = dict(published)
    del wrong["llm_backbone.llm.lm_head.weight"]
    wrong["llm_backbone.llm.backbone.layers.12.norm.weight"] = np.ones(64, np.float32)
    name = "llm_backbone.llm.backbone.layers.0.mixer.D"
    wrong[name] = wrong[name][:7]
    safetensors.numpy.save_file(wrong, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((release[0] / "config.json").read_text())
    opened = folders.open_published(tmp_path, _sizes())
    with pytest.raises(ValueError) as error:
        folders.load_published(opened, mesh)
    for line in (
        "3 names do not fit the model",
        "llm/head/kernel (64, 262): no tensor fills it",
        "layers.12.norm.weight (64,): no rule matches it",
        "llm/mamba/mixer/d[0]: got (7,), want (8,)",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    "dtype, message",
    [
        (np.float64, "norm_f.weight is float64, llm/norm/scale is float32"),
        (np.int8, "norm_f.weight is int8: quantised weights are not read"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn: quantised weights are not read"),
    ],
)
def test_a_wrong_dtype_is_an_error(release, tmp_path, mesh, dtype, message):
    wrong = dict(release[1])
    name = "llm_backbone.llm.backbone.norm_f.weight"
    wrong[name] = wrong[name].astype(dtype)
    (tmp_path / "config.json").write_text((release[0] / "config.json").read_text())
    _save(wrong, tmp_path / "model.safetensors")
    opened = folders.open_published(tmp_path, _sizes())
    with pytest.raises(ValueError, match=message):
        folders.load_published(opened, mesh)
    if dtype is np.float64:
        params = folders.load_published(opened, mesh, cast=True, parts=["llm.norm"])
        assert params["llm/norm/scale"].dtype == np.float32


def _save(tensors, path: pathlib.Path):
    from timeviper_jax.conversion.files import Abstract, write_file

    about = {n: Abstract(dtype=t.dtype, shape=t.shape) for n, t in tensors.items()}
    write_file(path, about, tensors.values(), {})


def test_a_folder_is_not_converted_into_twice(release, converted):
    sizes = str(release[0] / "sizes.json")
    with pytest.raises(FileExistsError, match="is there already"):
        main(["load", str(release[0]), str(converted), "--preset", sizes])


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a converted folder nor a run"):
        main(["save", str(tmp_path), str(tmp_path / "out")])
