"""Checkpoints on disk: read and written to the byte, and whatever is wrong is said."""

import json
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from timeviper_jax.conversion.files import (
    Abstract,
    in_shards,
    open_files,
    read_header,
    write_file,
    write_index,
)

RNG = np.random.default_rng(0)
TENSORS = {
    "b.weight": RNG.normal(size=(3, 5)).astype(np.float32),
    "a.weight": RNG.normal(size=(4,)).astype(ml_dtypes.bfloat16),
    "gate": np.array(0.5, np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
}


def _write(path, tensors=TENSORS, metadata=None):
    about = {n: Abstract(dtype=t.dtype, shape=t.shape) for n, t in tensors.items()}
    write_file(path, about, tensors.values(), metadata or {})


def _assert_same(files, tensors=TENSORS):
    assert sorted(files.entries) == sorted(tensors)
    for name, tensor in tensors.items():
        read = files.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.tobytes() == tensor.tobytes()


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    _write(path, metadata={"format": "pt"})
    _assert_same(open_files(path))
    _assert_same(open_files(tmp_path))
    assert read_header(path)[1] == {"format": "pt"}
    assert not list(tmp_path.glob("*.partial"))


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    _write(ours)
    loaded = safetensors.numpy.load_file(ours)
    for name, tensor in TENSORS.items():
        assert loaded[name].tobytes() == tensor.tobytes()
    safetensors.numpy.save_file(TENSORS, theirs)
    _assert_same(open_files(theirs))


def test_a_sharded_checkpoint_is_one(tmp_path):
    about = {n: Abstract(dtype=t.dtype, shape=t.shape) for n, t in TENSORS.items()}
    layout = dict(in_shards(about, limit=60))
    assert list(layout.values()) == [["b.weight"], ["a.weight", "gate", "empty", "ids"]]
    for file, names in layout.items():
        _write(tmp_path / file, {name: TENSORS[name] for name in names})
    write_index(tmp_path, layout)
    _assert_same(open_files(tmp_path))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["gate"] == "model-00002-of-00002.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())

    index["weight_map"]["gate"] = "model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="gate: the index says model-00001-of"):
        open_files(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00002.safetensors is in the index"):
        open_files(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 40, -1])
def test_a_truncated_file_is_an_error(tmp_path, left):
    path = tmp_path / "model.safetensors"
    _write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    with pytest.raises(ValueError, match="model.safetensors is cut short"):
        open_files(path)


def _with_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "name, field, value, message",
    [
        ("gate", "dtype", "Q4", "gate has unknown dtype 'Q4'"),
        ("b.weight", "shape", [3, 6], r"takes 72 bytes, the header gives it 0\.\.60"),
        ("gate", "data_offsets", [60, 62], r"gives it 60\.\.68 after 62"),
    ],
)
def test_a_header_that_does_not_add_up_is_an_error(
    tmp_path, name, field, value, message
):
    path = tmp_path / "model.safetensors"
    _write(path)
    _with_header(path, lambda header: header[name].update({field: value}))
    with pytest.raises(ValueError, match=message):
        open_files(path)


def test_a_file_of_another_kind_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((4).to_bytes(8, "little") + b"what" + b"ever")
    with pytest.raises(ValueError, match="is no safetensors file"):
        open_files(path)
    with pytest.raises(FileNotFoundError, match="holds no .safetensors or .bin file"):
        open_files(tmp_path / "nothing")


def test_a_tensor_in_two_files_is_an_error(tmp_path):
    for name in ("one", "two"):
        _write(tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"repeats tensors of other files: \['a.weig"):
        open_files(tmp_path)


def test_a_pickle_is_read_only_where_that_is_said(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        open_files(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="needs torch, which is not instal"):
        open_files(tmp_path, allow_pickle=True)


def test_what_is_written_must_be_as_announced(tmp_path):
    about = {"a": Abstract(dtype=np.dtype(np.float32), shape=(2,))}
    with pytest.raises(
        ValueError, match="a is bfloat16.2., but was announced as float"
    ):
        write_file(tmp_path / "x", about, [np.asarray(jnp.zeros(2, jnp.bfloat16))], {})
    assert not (tmp_path / "x").exists()
