"""A checkpoint that is not as it was written is not read."""

import json
import subprocess

import pytest

from timeviper_jax import checksums


@pytest.fixture
def checkpoints(tmp_path):
    """Steps 3, 20 and 100, whole."""
    for step in (3, 20, 100):
        folder = tmp_path / str(step)
        (folder / "params").mkdir(parents=True)
        (folder / "run").mkdir()
        (folder / "params" / "array").write_bytes(bytes(range(256)))
        (folder / "run" / "metadata").write_text('{"versions": {}}')
        checksums.write(folder)
    (tmp_path / "120.orbax-checkpoint-tmp").mkdir()
    return tmp_path


def test_the_newest_is_found(checkpoints):
    assert checksums.newest(checkpoints) == (checkpoints / "100", {})


def test_sha256sum_reads_the_manifest(checkpoints):
    command = ["sha256sum", "--check", "--strict", checksums.MANIFEST]
    subprocess.run(command, cwd=checkpoints / "3", check=True, capture_output=True)


@pytest.mark.parametrize("name", ["params/array", "run/metadata"])
def test_a_flipped_bit_and_a_lost_byte_are_named(checkpoints, name):
    path = checkpoints / "100" / name
    whole = path.read_bytes()
    for damaged in (bytes([whole[0] ^ 4]) + whole[1:], whole[:-1], b""):
        path.write_bytes(damaged)
        folder, problems = checksums.newest(checkpoints)
        assert folder == checkpoints / "20"
        assert problems == {
            checkpoints / "100": f"{name} is not as it was written",
        }
    path.unlink()
    assert checksums.newest(checkpoints).folder == checkpoints / "20"


def test_every_bit_of_a_manifest_counts(checkpoints):
    path = checkpoints / "3" / checksums.MANIFEST
    whole = path.read_bytes()
    for index in range(len(whole)):
        flipped = bytes([whole[index] ^ (1 << index % 8)])
        path.write_bytes(whole[:index] + flipped + whole[index + 1 :])
        assert checksums.damage(checkpoints / "3")
        path.write_bytes(whole[:index])
        assert checksums.damage(checkpoints / "3")


def test_a_file_too_many_is_named(checkpoints):
    (checkpoints / "100" / "params" / "stranger").touch()
    (problem,) = checksums.newest(checkpoints).problems.values()
    assert problem == "params/stranger is not as it was written"


def test_what_was_cut_short_is_not_there(checkpoints):
    for step in ("100", "20", "3"):
        manifest = checkpoints / step / checksums.MANIFEST
        manifest.rename(manifest.with_suffix(".sha256.part"))
    folder, problems = checksums.newest(checkpoints)
    assert folder is None
    assert len(problems) == 3


def test_with_none_whole_nothing_is_read(checkpoints):
    for step in ("100", "20", "3"):
        (checkpoints / step / "params" / "array").write_bytes(b"")
    with pytest.raises(checksums.DamagedError, match="params/array is not as it was"):
        checksums.newest(checkpoints)


def test_a_run_from_before_manifests_is_read(checkpoints):
    (checkpoints / "100" / checksums.MANIFEST).unlink()
    record = checkpoints / "100" / "run" / "metadata"
    record.write_text(json.dumps({"stage": "warmup"}))
    assert checksums.newest(checkpoints) == (checkpoints / "100", {})
