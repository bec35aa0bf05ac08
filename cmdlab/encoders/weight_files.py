"""Weights as people have them: a safetensors file, a torch file, or a folder of the hub.

Nobody vouches for them: no pickled object is made, and no name in them leads out of the folder.
"""

import hashlib
import json
import pickle
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmdlab.errors import InputError

IN_A_FOLDER = (  # the first that is there is read: safetensors before what was pickled
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
PREPROCESSING = "preprocessor_config.json"


@dataclass(frozen=True)
class Weights:
    """Tensors on the CPU by their names, and what a folder says beside them.

    `config` holds `config.json` (`open_clip_config.json` beside open_clip's file), with the sizes;
    `preprocessing` holds `preprocessor_config.json`. Both are None for a single file.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    preprocessing: dict[str, Any] | None = None


def read_weights(path: Path) -> Weights:
    """Read a file of tensors, or a folder as `save_pretrained` of transformers or open_clip writes.

    Tensors are mapped from the file where its format allows that, so the file must stay as it is
    while they are used. Raises InputError for anything missing, damaged or foreign, and for a file
    with pickled objects beside its tensors.
    """
    if not path.is_dir():
        return Weights(_read_tensors(path))
    files = _files_of(path)
    tensors: dict[str, Tensor] = {}
    for part in files.parts:
        tensors |= _read_tensors(part)
    return Weights(
        tensors,
        _read_json(files.config),
        _read_json(files.preprocessing) if files.preprocessing else None,
    )


def weights_sha256(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and hashes of all that `read_weights` reads.

    A file is hashed again only where its size or its time has changed.
    """
    if not path.is_dir():
        return _sha256_of(path)
    files = _files_of(path)
    read = [files.config, *files.parts]
    if files.preprocessing:
        read.append(files.preprocessing)
    lines = [f"{_sha256_of(file)}  {file.name}\n" for file in read]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class _Files:
    config: Path
    preprocessing: Path | None
    parts: list[Path]


def _files_of(folder: Path) -> _Files:
    found = next((folder / name for name in IN_A_FOLDER if (folder / name).is_file()), None)
    if found is None:
        raise InputError(
            f"{folder}: holds no weights; give a file, or a folder with one of "
            f"{', '.join(IN_A_FOLDER)}"
        )
    config = folder / (
        "open_clip_config.json" if found.name.startswith("open_clip") else "config.json"
    )
    if not config.is_file():
        raise InputError(
            f"{folder}: holds {found.name} but no {config.name}, which says its sizes; add it"
        )
    preprocessing = folder / PREPROCESSING
    parts = _parts_of(found) if found.suffix == ".json" else [found]
    return _Files(config, preprocessing if preprocessing.is_file() else None, parts)


def _parts_of(index: Path) -> list[Path]:
    """The files that an index of shards names, all in its folder. A link is followed: in the
    hub's own cache every file of a folder is one."""
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{index}: has no 'weight_map' of names to files; fetch it again")
    parts = []
    for name in sorted({str(name) for name in shards.values()}):
        if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\"):
            raise InputError(
                f"{index}: names {name!r}, which is no file of its folder; fetch it again"
            )
        parts.append(index.parent / name)
    return parts


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: is no file; give a file or a folder of weights, or fetch it")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            zipped = zipfile.is_zipfile(path)
            if zipped and _is_torchscript(path):
                raise InputError(
                    f"{path}: is a TorchScript archive, which is a program; if you trust it, turn "
                    "it into weights by torch.save(torch.jit.load(FILE, 'cpu').state_dict(), NEW)"
                )
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except pickle.UnpicklingError as error:  # torch's own message says how to run the objects
        raise InputError(
            f"{path}: is damaged, or holds pickled objects beside tensors, which are never loaded; "
            "fetch it again, or give safetensors"
        ) from error
    except Exception as error:  # whatever a damaged file makes the readers raise
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{path}: is damaged or no file of weights ({reason}); fetch it again"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # beside an optimiser's, in a checkpoint of training
    if not _is_state_dict(content):
        raise InputError(f"{path}: holds no tensors by name; give a file of a model's state")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON that can be read; fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no object; fetch it again")
    return content


def _sha256_of(path: Path) -> str:
    try:
        status = path.stat()
        return _hashed(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); fetch it again") from error


@lru_cache(maxsize=256)
def _hashed(path: Path, _size: int, _time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
