"""Outputs: whole or not at all, through links, and never in place of a pipe or a device."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cmdlab.errors import InputError
from cmdlab.outputs import write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_its_folders_are_made(tmp_path):
    write_file(tmp_path / "new" / "page.html", "Größe\n")
    assert (tmp_path / "new" / "page.html").read_bytes() == b"Gr\xc3\xb6\xc3\x9fe\n"
    assert names(tmp_path / "new") == ["page.html"]


@pytest.mark.parametrize("target", ["target.html", "not-there-yet.html"])
def test_a_link_is_followed_and_stays(tmp_path, target):
    (tmp_path / "target.html").write_text("old")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "middle").symlink_to(f"../{target}")
    (tmp_path / "link.html").symlink_to("far/middle")
    write_file(tmp_path / "link.html", b"new")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "far" / "middle").is_symlink()
    assert (tmp_path / target).read_bytes() == b"new"


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_the_permissions_of_a_file_stay(tmp_path, mode):
    path = tmp_path / "page.html"
    path.write_text("old")
    path.chmod(mode)
    write_file(path, b"new")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", mode)


def test_a_pipe_is_written_into(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    received = []
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    write_file(path, b"all of it" * 20_000)  # more than a pipe holds
    reader.join()
    assert received == [b"all of it" * 20_000]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert names(tmp_path) == ["pipe"]


def test_a_device_stays_a_device():
    write_file(Path("/dev/null"), b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("out", ["pipe", "file"])
def test_standard_output_is_written_into(tmp_path, out):
    code = "import pathlib; from cmdlab.outputs import write_file; "
    code += "write_file(pathlib.Path('/dev/stdout'), 'new')"
    log = tmp_path / "log"
    log.write_text("old ")
    with log.open("ab") as file:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE if out == "pipe" else file
        )
    assert done.returncode == 0
    written = done.stdout.decode() if out == "pipe" else log.read_text().removeprefix("old ")
    assert written == "new"
    assert log.read_text().startswith("old ")
    assert names(tmp_path) == ["log"]


def folder(path):
    path.mkdir()


def below_a_file(path):
    path.parent.rmdir()
    path.parent.write_text("no folder")


def full(path):
    path.symlink_to("/dev/full")


def a_ring(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (folder, "Is a directory"),
        (below_a_file, "Not a directory|File exists"),
        (full, "No space left on device"),
        (a_ring, "Too many levels of symbolic links"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path, make, reason):
    path = tmp_path / "deep" / "page.html"
    path.parent.mkdir()
    make(path)
    before = names(tmp_path)
    with pytest.raises(InputError, match=rf"page\.html: cannot be written \(({reason})\)"):
        write_file(path, b"new")
    assert names(tmp_path) == before
    if path.parent.is_dir():
        assert names(path.parent) == ["page.html"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(InputError, match="No space left"):
        write_file(tmp_path / "page.html", b"new")
    assert (tmp_path / "page.html").read_text() == "old"
    assert names(tmp_path) == ["page.html"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_write_protected_file_is_not_replaced(tmp_path):
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "page.html").chmod(0o444)
    with pytest.raises(InputError, match="write-protected"):
        write_file(tmp_path / "page.html", b"new")
    assert (tmp_path / "page.html").read_text() == "old"
