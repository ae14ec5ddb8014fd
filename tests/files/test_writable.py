"""A path that can't be written is refused before the work, by the name that the user gave."""

import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_loraplus import OutputError
from mlx_loraplus.files import check_free, check_writable, locked
from mlx_loraplus.files.page_path import check_save_path

NOBODY = 65534


@contextmanager
def as_nobody() -> Generator[None]:
    """Act as a user without privileges, if this is root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def open_place() -> Generator[Path]:
    """A folder that every user can enter; pytest's own are the user's alone."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    for folder in place.iterdir():
        folder.chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.parametrize("inside", ["x", "x/y", "page.html"])
def test_a_folder_that_can_not_be_entered_is_told(open_place: Path, inside: str):
    folder = open_place / "private"
    folder.mkdir()
    folder.chmod(0o700 if os.geteuid() == 0 else 0)
    path, told = folder / inside, r"can't be written \(in \S+/private: Permission denied\)"
    with as_nobody():
        with pytest.raises(OutputError, match=f"save_path .*{told}: choose another place"):
            check_writable(path, "save_path")
        with pytest.raises(OutputError, match=told):
            check_free(path, [], overwrite=True)
        with pytest.raises(OutputError, match=r"adapter_path .*Permission denied"), locked(path):
            pass
        with pytest.raises(OutputError, match=told):
            check_save_path(path.with_suffix(".html"), overwrite=True, suffixes=(".html",))


@pytest.mark.parametrize("inside", ["", "inner"])
def test_a_name_that_no_file_can_have_is_told(tmp_path: Path, inside: str):
    path = tmp_path / ("x" * 300) / inside
    with pytest.raises(OutputError, match=r"can't be written \(.*name too long\)"):
        check_writable(path, "save_path")
    assert not [*tmp_path.iterdir()]


def test_a_folder_is_replaced_only_if_the_one_around_it_can_be_written(open_place: Path):
    around = open_place / "around"
    out = around / "out"
    out.mkdir(parents=True)
    out.chmod(0o777)
    around.chmod(0o555)
    with as_nobody():
        check_writable(out, "save_path")
        told = r"--save-path \S+/around/out can't be written \(in \S+/around: Permission denied\)"
        with pytest.raises(OutputError, match=told):
            check_free(out, [], overwrite=True)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_a_drive_that_sets_no_times_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "utime", refuse)
    check_writable(tmp_path / "new", "save_path")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("file", r"save_path \S+/file is a file: give a folder$"),
        ("file/a/b", r"save_path \S+/file/a/b: \S+/file is a file: give a folder$"),
        ("/dev/null/x", "save_path /dev/null/x: /dev/null is a file: give a folder$"),
        ("/dev/fd/x", r"save_path /dev/fd/x can't be written \(in /dev/fd: .*\): choose another"),
        ("link/x", r"save_path \S+/link/x: \S+/link is a link that leads nowhere"),
    ],
)
def test_a_path_that_can_not_be_written_is_told_as_it_was_given(
    tmp_path: Path, path: str, told: str
):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OutputError, match=told) as error:
        check_writable(tmp_path / path, "save_path")
    assert ".lock" not in str(error.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("path", ["new/er", "", "folder"])
def test_nothing_is_left_where_a_path_can_be_written(tmp_path: Path, path: str):
    (tmp_path / "folder").mkdir()
    before = tmp_path.stat().st_mtime_ns
    check_writable(tmp_path / path, "save_path")
    assert tmp_path.stat().st_mtime_ns == before
    check_writable(tmp_path / path / "page.html", "save_path", is_file=True)
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_the_lock_of_a_folder_that_can_not_be_written_is_not_named():
    with (
        pytest.raises(OutputError, match=r"^adapter_path /dev/fd/x can't be written") as error,
        locked(Path("/dev/fd/x")),
    ):
        pass
    assert ".lock" not in str(error.value)
