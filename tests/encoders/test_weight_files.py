"""Files of weights: what is read, and what is refused before anything of it runs."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cmdlab.encoders.weight_files import read_weights, weights_sha256
from cmdlab.errors import InputError

TENSORS = {
    "layer.weight": torch.arange(6.0).reshape(2, 3),
    "layer.bias": torch.ones(2, dtype=torch.float16),
    "steps": torch.tensor(7),
}


def write(path: Path) -> Path:
    """TENSORS in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path)
    return path


def write_folder(folder: Path, weights: str = "model.safetensors") -> Path:
    write(folder / weights)
    config = "open_clip_config.json" if weights.startswith("open_clip") else "config.json"
    (folder / config).write_text('{"hidden_size": 3}')
    return folder


def write_shards(folder: Path, shards: dict[str, str]) -> Path:
    """A folder with an index that sends each tensor to a file, without the files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def assert_same(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth", "a.bin"])
def test_a_file_of_tensors(name, tmp_path):
    weights = read_weights(write(tmp_path / name))
    assert_same(weights.tensors)
    assert weights.config is weights.preprocessing is None


def test_torch_s_format_of_before_2020(tmp_path):
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(read_weights(tmp_path / "old.pt").tensors)


def test_a_checkpoint_of_distributed_training(tmp_path):
    state = {f"module.{name}": tensor for name, tensor in TENSORS.items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    assert_same(read_weights(tmp_path / "epoch_3.pt").tensors)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
    ],
)
def test_a_folder_says_its_sizes(name, tmp_path):
    folder = write_folder(tmp_path, name)
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true}')
    weights = read_weights(folder)
    assert_same(weights.tensors)
    assert weights.config == {"hidden_size": 3}
    assert weights.preprocessing == {"do_normalize": True}


def test_safetensors_are_preferred_to_pickles(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_same(read_weights(folder).tensors)


def test_shards_are_joined(tmp_path):
    folder = write_shards(tmp_path, {"layer.weight": "1.safetensors", "steps": "2.safetensors"})
    save_file({k: v for k, v in TENSORS.items() if "layer" in k}, folder / "1.safetensors")
    save_file({"steps": TENSORS["steps"]}, folder / "2.safetensors")
    assert_same(read_weights(folder).tensors)


def test_the_hub_s_cache_of_links_is_read(tmp_path):
    blobs = write_folder(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    assert_same(read_weights(snapshot).tensors)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/out.safetensors", "a/b.safetensors", "..", "", "a\\b", "a\0"]
)
def test_an_index_does_not_lead_out_of_its_folder(name, tmp_path):
    write(tmp_path / "out.safetensors")
    folder = write_shards(tmp_path / "folder", {"steps": name})
    with pytest.raises(InputError, match=r"index\.json: names"):
        read_weights(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_shards(tmp_path, {"steps": "lost.safetensors"})
    with pytest.raises(InputError, match=r"lost\.safetensors: is no file"):
        read_weights(folder)


class _Trap:
    """An object that makes a file where it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.sprung),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["weights.pt", "folder/pytorch_model.bin"])
def test_no_pickled_object_is_made(name, zipped, tmp_path):
    path, sprung = tmp_path / name, tmp_path / "sprung"
    path.parent.mkdir(exist_ok=True)
    (path.parent / "config.json").write_text("{}")
    content = {**TENSORS, "trap": _Trap(sprung)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="pickled objects") as caught:
        read_weights(path if path.suffix == ".pt" else path.parent)
    assert str(path) in str(caught.value)
    assert not sprung.exists()


def test_a_plain_pickle_is_refused(tmp_path):
    path, sprung = tmp_path / "weights.pt", tmp_path / "sprung"
    path.write_bytes(pickle.dumps(_Trap(sprung)))
    with pytest.raises(InputError):
        read_weights(path)
    assert not sprung.exists()


@settings(max_examples=20, deadline=None)
@given(kept=st.floats(0, 0.999), suffix=st.sampled_from([".safetensors", ".pt"]))
def test_a_truncated_file_is_refused(kept, suffix, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("cut") / f"weights{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match="damaged"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "content", [b"", b"RIFF....WAVE", b"PK\x03\x04", b'{"a": 1}', b"\x80\x02}."]
)
def test_a_foreign_file_is_refused(content, suffix, tmp_path):
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"foreign{suffix}"):
        read_weights(path)


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {}, {"a": 1}, torch.ones(1), {1: torch.ones(1)}]
)
def test_what_holds_no_state_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match="no tensors by name"):
        read_weights(tmp_path / "other.pt")


def test_a_torchscript_archive_is_refused_with_the_way_to_convert_it(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    with pytest.raises(InputError, match=r"torch\.jit\.load"):
        read_weights(tmp_path / "program.pt")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.pt: is no file"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(InputError, match="holds no weights"):
        read_weights(tmp_path)
    write(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"no config\.json"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config\.json: holds no object"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: is no JSON"):
        read_weights(tmp_path)


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    path = write(tmp_path / "weights.pt")
    assert weights_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=r"none\.pt: cannot be read"):
        weights_sha256(tmp_path / "none.pt")


def test_the_hash_of_a_folder_covers_all_that_is_read_and_nothing_else(tmp_path):
    folder = write_folder(tmp_path / "folder")
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true}')
    seen = [weights_sha256(folder)]
    (folder / "README.md").write_text("nothing that counts")
    assert weights_sha256(folder) == seen[0]
    for file in ("config.json", "preprocessor_config.json", "model.safetensors"):
        content = bytearray((folder / file).read_bytes())
        content[-1] ^= 1
        (folder / file).write_bytes(content)
        later = (folder / file).stat().st_mtime_ns + 1_000_000_000
        os.utime(folder / file, ns=(later, later))  # the clock of a file system may be coarse
        seen.append(weights_sha256(folder))
    assert len(set(seen)) == 4
