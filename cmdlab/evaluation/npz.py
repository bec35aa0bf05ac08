"""Arrays in an npz file: written whole or not at all, read as what nobody vouches for."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cmdlab.errors import InputError
from cmdlab.outputs import write_file


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays, compressed. Raises InputError where the system refuses."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_file(path, content.getvalue())


def read_npz(
    path: Path, keys: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The named arrays of an npz file that nobody vouches for; nothing is unpickled.

    keys: arrays that must be there; optional: those that need not.
    A pipe (`evaluate <(cat mine.npz)`) is read into memory, since npz has its directory at its end.
    Raises InputError, which names the file and the entry.
    """
    try:
        with path.open("rb") as raw:
            start = raw.read(4)
            if start not in (b"PK\3\4", b"PK\5\6"):
                raise InputError(f"{path}: not an npz file; write it with numpy.savez")
            whole: BinaryIO = raw if raw.seekable() else io.BytesIO(start + raw.read())
            whole.seek(0)
            with np.load(whole, allow_pickle=False) as file:
                arrays = {}
                for key in (*keys, *(key for key in optional if key in file)):
                    if key not in file:
                        raise InputError(f"{path}: {key} is missing; it needs {', '.join(keys)}")
                    arrays[key] = _read_entry(path, file, key)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; mend the path") from error
    except Exception as error:  # damaged archives make zipfile raise nearly anything
        raise InputError(f"{path}: cannot be read ({_reason(error)}); write it again") from error
    return arrays


def _read_entry(path: Path, file: Any, key: str) -> np.ndarray:
    try:
        array = file[key]
        if isinstance(array, np.ndarray) and array.dtype.kind == "U":
            array.tolist()  # raises where a number is no character
    except Exception as error:  # damaged, encrypted, pickled, or larger than memory
        raise InputError(
            f"{path}: {key} cannot be read ({_reason(error)}); save it as a plain array with "
            "numpy.savez, without pickle"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: {key} is not an array; write it with numpy.savez")
    return array


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
