"""Published checkpoints on disk: what tensors there are, one of them at a time.

safetensors files are read by their own header, so that a file that was cut short or
changed is noticed before anything is loaded, and no more than one tensor is in memory.
`.bin` files are pickles; they are read only where that is asked for, by torch, and
only as weights.
"""

import dataclasses
import json
import math
import os
import pathlib
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_BIN_INDEX = "pytorch_model.bin.index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file, and where in it its bytes lie."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The tensors of a checkpoint by name, in the order of its files."""

    def __init__(self, entries: Mapping[str, Entry], pickled: Mapping[str, Any]):
        self.entries = dict(entries)
        self._pickled = pickled

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """One tensor, in the dtype it is stored in."""
        entry = self.entries[name]
        if name in self._pickled:
            return _as_numpy(self._pickled[name])
        with open(entry.file, "rb") as file:
            file.seek(entry.start)
            flat = np.fromfile(file, np.uint8, entry.nbytes)
        return flat.view(entry.dtype).reshape(entry.shape)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def files(self) -> list[pathlib.Path]:
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))


def open_files(path: str | os.PathLike, *, allow_pickle: bool = False) -> TensorFiles:
    """Opens a file, or a folder of them: with an index, or without.

    Args:
      path: A `.safetensors` or `.bin` file, or the folder a model was published as.
      allow_pickle: Read `.bin` files too, which needs torch.

    Raises:
      FileNotFoundError: There is no checkpoint, or a file of it is missing.
      ValueError: A file is cut short or is not what its header or the index says.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _open_all([path], allow_pickle, None)
    for name, suffix in ((_INDEX, ".safetensors"), (_BIN_INDEX, ".bin")):
        if (path / name).is_file():
            index = json.loads((path / name).read_text())["weight_map"]
            files = sorted({path / file for file in index.values()})
            return _open_all(files, allow_pickle, index)
        if files := sorted(path.glob(f"*{suffix}")):
            return _open_all(files, allow_pickle, None)
    raise FileNotFoundError(
        f"{path} holds no .safetensors or .bin file; give a checkpoint or its folder."
    )


def _open_all(
    files: list[pathlib.Path], allow_pickle: bool, index: Mapping[str, str] | None
) -> TensorFiles:
    entries: dict[str, Entry] = {}
    pickled: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is in the index, but is not there.")
        if file.suffix == ".safetensors":
            found = read_header(file)[0]
        else:
            tensors = _unpickle(file, allow_pickle)
            pickled |= tensors
            found = {name: _pickled_entry(file, t) for name, t in tensors.items()}
        if twice := sorted(entries.keys() & found.keys()):
            raise ValueError(f"{file} repeats tensors of other files: {twice[:5]}.")
        entries |= found
    if index is not None:
        _check_index(index, entries)
    return TensorFiles(entries, pickled)


def _check_index(index: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    wrong = [
        f"{name}: the index says {index.get(name, 'nothing')}, it is in"
        f" {entries[name].file.name if name in entries else 'no file'}"
        for name in sorted({*index, *entries})
        if name not in entries or index.get(name) != entries[name].file.name
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors are not where the index says; download the"
            " checkpoint again:\n  " + "\n  ".join(wrong)
        )


def read_header(file: pathlib.Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """A safetensors file's tensors in the order of their bytes, and its metadata.

    Raises:
      ValueError: The file is cut short, or its parts do not add up.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{file} is cut short: {size} bytes cannot hold its header; copy or"
                " download it again."
            )
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is no safetensors file: {error}.") from error
    metadata = header.pop("__metadata__", {})
    entries, end = {}, 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if about["dtype"] not in _DTYPES:
            raise ValueError(f"{file}: {name} has unknown dtype {about['dtype']!r}.")
        start, stop = about["data_offsets"]
        entry = Entry(
            file=file,
            dtype=_DTYPES[about["dtype"]],
            shape=tuple(about["shape"]),
            start=8 + length + start,
        )
        if start != end or stop - start != entry.nbytes:
            raise ValueError(
                f"{file}: {name} {entry.dtype}{list(entry.shape)} takes {entry.nbytes}"
                f" bytes, the header gives it {start}..{stop} after {end}."
            )
        entries[name], end = entry, stop
    if 8 + length + end != size:
        raise ValueError(
            f"{file} is cut short or has grown: {size} bytes where its header says"
            f" {8 + length + end}; copy or download it again."
        )
    return entries, metadata


def _unpickle(file: pathlib.Path, allow_pickle: bool) -> dict[str, Any]:
    """The tensors of a `.bin` file, left on disk until they are read."""
    if not allow_pickle:
        raise ValueError(
            f"{file} is a pickle, which can run code; convert it to safetensors, or"
            " say --allow_pickle if you trust whoever made it."
        )
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Reading {file} needs torch, which is not installed; `pip install torch`,"
            " or use the checkpoint's safetensors files."
        ) from error
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        # Torch explains at length how to run the file's code; the first line will do.
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read as weights alone: {reason}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} holds a {type(tensors).__name__}, not named tensors.")
    wrong = [n for n, t in tensors.items() if not isinstance(t, torch.Tensor)]
    if wrong:
        raise ValueError(f"{file} holds more than tensors: {wrong[:5]}.")
    return tensors


def _pickled_entry(file: pathlib.Path, tensor: Any) -> Entry:
    # A single element tells the dtype; the rest stays on disk.
    dtype = _as_numpy(tensor.flatten()[:1]).dtype
    return Entry(file=file, dtype=dtype, shape=tuple(tensor.shape))


def _as_numpy(tensor: Any) -> Shaped[np.ndarray, "..."]:
    """torch has dtypes that NumPy lacks: their bytes come across as integers."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        import torch

        same_size = {1: torch.uint8, 2: torch.int16}[tensor.element_size()]
        dtype = np.dtype(getattr(ml_dtypes, name))
        return tensor.contiguous().view(same_size).numpy().view(dtype)
    return tensor.contiguous().numpy()


# Writing.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Abstract:
    """A tensor that is still to be written."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, entry: Entry) -> "Abstract":
        return cls(dtype=entry.dtype, shape=entry.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(
    path: pathlib.Path,
    tensors: Mapping[str, Abstract],
    arrays: Iterable[Shaped[np.ndarray, "..."]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file as its arrays come, one at a time, in their order.

    The file appears under its name when it is whole.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = dict(
            dtype=_CODES[tensor.dtype],
            shape=list(tensor.shape),
            data_offsets=[end, end + tensor.nbytes],
        )
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), array in zip(tensors.items(), arrays, strict=True):
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(
                    f"{name} is {array.dtype}{list(array.shape)}, but was announced as"
                    f" {tensor.dtype}{list(tensor.shape)}."
                )
            file.write(np.ascontiguousarray(array).tobytes())
    os.replace(partial, path)


def write_index(folder: pathlib.Path, layout: Mapping[str, Iterable[str]]) -> None:
    """Says which tensors are in which file, if there is more than one file."""
    if len(layout) < 2:
        return
    where = {name: file for file, names in layout.items() for name in names}
    total = sum(
        entry.nbytes
        for file in layout
        for entry in read_header(folder / file)[0].values()
    )
    index = dict(
        metadata=dict(total_size=total), weight_map=dict(sorted(where.items()))
    )
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def in_shards(
    tensors: Mapping[str, Abstract], limit: int
) -> Iterator[tuple[str, list[str]]]:
    """Names for files of at most `limit` bytes (or one tensor), and what is in them."""
    groups, size = [[]], 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    for number, names in enumerate(groups, start=1):
        several = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        yield (several if len(groups) > 1 else "model.safetensors"), names


def copy_side_files(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what lies beside the weights: config, tokenizer, and the like."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.json")) + sorted(source.glob("*.txt")):
        if file.name not in (_INDEX, _BIN_INDEX):
            shutil.copyfile(file, target / file.name)
