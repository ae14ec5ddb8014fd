"""A path that can't be written is refused before the work, by the name that the user gave."""

from pathlib import Path

import pytest

from mlx_loraplus import OutputError
from mlx_loraplus.files import check_writable, locked


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
