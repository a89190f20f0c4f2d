"""Checkpoints that are pickles: read as weights where that is allowed, or refused."""

import json
import os

import numpy as np
import pytest
from peers import peer

from timeviper_jax.conversion.files import open_files

torch = peer("torch")


class RunsCode:
    """What a pickle can do to whoever opens it."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_weights_are_those_that_were_saved(tmp_path):
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.tensor([0.1, 3.0], dtype=torch.bfloat16),
        "c": torch.tensor(7, dtype=torch.int64),
    }
    names = {"a": "pytorch_model-1-of-2.bin"} | dict.fromkeys(
        "bc", "pytorch_model-2-of-2.bin"
    )
    for file in set(names.values()):
        part = {name: tensors[name] for name in names if names[name] == file}
        torch.save(part, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    files = open_files(tmp_path, allow_pickle=True)
    assert sorted(files.entries) == sorted(tensors)
    for name, tensor in tensors.items():
        read = files.read(name)
        assert (str(read.dtype), read.shape) == (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        )
        np.testing.assert_array_equal(
            read.astype(np.float32), tensor.to(torch.float32).numpy()
        )


@pytest.mark.parametrize(
    "content", [{"a": RunsCode()}, {"a": [1, 2]}, [torch.ones(2)], "cut"]
)
def test_anything_else_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(9)} if content == "cut" else content, file)
    if content == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        open_files(file, allow_pickle=True)
    assert not (tmp_path / "ran").exists()
