"""How the house writes a file: whole or not at all, and in place of nothing but a file."""

import errno
import os
import secrets
import stat
from pathlib import Path

from cmdlab.errors import InputError


def write_file(path: Path, content: bytes | str) -> None:
    """Put `content` (text as UTF-8) at `path`; folders on the way are made.

    A regular file is written aside, made durable, and renamed when it is whole, so that `path`
    holds the old content or the new one whatever happens; its permissions stay. A link is followed:
    what it leads to is written, and the link stays. A pipe, a device and standard output
    (`/dev/stdout`) are written straight into.
    Raises InputError, which names the file, where the system refuses.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = _status(path)
        if there is None or (stat.S_ISREG(there.st_mode) and not is_standard_output(path)):
            _replace(Path(os.path.realpath(path)), data, there)
        else:
            with path.open("ab") as file:
                file.write(data)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); mend that or name another place"
        ) from error


def is_standard_output(path: Path) -> bool:
    """Whether the path names what this process prints to, as in `-o /dev/stdout >> log`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:  # nothing is there, or standard output was closed before this process began
        return False


def _replace(target: Path, data: bytes, there: os.stat_result | None) -> None:
    if there is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "it is write-protected")  # a rename would not ask
    aside = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with aside.open("xb") as file:
            if there is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(there.st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:  # nothing is there, or a link to nothing
        return None
