"""Whole files and folders or none, and one run in a folder."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_loraplus
from mlx_loraplus import OutputError
from mlx_loraplus.data.sources import SUFFIXES
from mlx_loraplus.files import (
    cached_folder,
    check_apart,
    check_contents,
    check_free,
    check_links,
    check_unlocked,
    locked,
    read_bounded,
    remove_folder,
    remove_leftovers,
    replacing_folder,
    temporary_name,
    write_atomically,
    write_error,
)
from mlx_loraplus.files.folder_kinds import DATA_SUFFIXES
from mlx_loraplus.runs.history import HISTORY
from mlx_loraplus.sweep.sweep_folder import TRIALS
from tests.conftest import cpu_limit


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "deep" / "folder"
    for content in (b"old", b"new"):
        with replacing_folder(path) as folder:
            write_atomically(folder / "file", content)
            assert not path.exists() or (path / "file").read_bytes() == b"old"
        assert (path / "file").read_bytes() == content
    with contextlib.suppress(KeyboardInterrupt), replacing_folder(path) as folder:
        write_atomically(folder / "file", b"half")
        raise KeyboardInterrupt
    assert (path / "file").read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path):
    (tmp_path / "large" / "disk").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "large" / "disk")
    with replacing_folder(tmp_path / "link") as folder:
        write_atomically(folder / "file", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "large" / "disk" / "file").read_bytes() == b"new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["large", "link"]


def test_a_place_that_can_not_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="can't write"),
        replacing_folder(tmp_path / "file" / "folder"),
    ):
        pass
    with pytest.raises(OutputError, match="can't be written"), locked(tmp_path / "file"):
        pass


@pytest.mark.parametrize("kill", [True, False])
def test_a_lock_holds_until_its_process_ends_however_it_ends(tmp_path: Path, kill: bool):
    code = f"""
import sys, time
from pathlib import Path
from mlx_loraplus.files import locked
with locked(Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    told = rf"another run \(process {holder.pid}\) is using .*: wait until it ends"
    with pytest.raises(OutputError, match=told), locked(tmp_path):
        pass
    with pytest.raises(OutputError, match=told):
        check_unlocked(tmp_path)
    if kill:
        os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    check_unlocked(tmp_path)
    with locked(tmp_path) as before:
        assert before == (str(holder.pid) if kill else None)
        with pytest.raises(OutputError, match=rf"process {os.getpid()}"), locked(tmp_path):
            pass
    with locked(tmp_path) as before:
        assert before is None


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path):
    token, kept = "0123456789abcdef", {".lock", ".hidden", "kept", ".12", ".2026-notes"}
    for name in (f".123-{token}-file", f".removed-123-{token}-folder", *kept):
        (tmp_path / name).mkdir() if "folder" in name else (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "nowhere")
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("path", [".", "..", "../here", "out", "out/run"])
def test_what_is_read_is_not_removed_with_the_folder_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
):
    (tmp_path / "here" / "out" / "run" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match=r"is or contains .*: give another folder"):
        check_free(Path(path), ["gemma-3", "out/run/adapter"], overwrite=True)


def test_an_empty_folder_and_one_inside_what_is_read_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "fused").mkdir(parents=True)
    (tmp_path / "org").mkdir()
    check_free(tmp_path / "run" / "fused", ["run"], overwrite=False)
    check_free(tmp_path / "org", ["org/model"], overwrite=False)  # a hub id


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/", "the root of the file system"),
        ("~", "your home folder"),
        ("~/..", "your home folder, or contains it"),
        ("/usr", "a folder of the system"),
        ("/etc/../usr", "a folder of the system"),
        (str(Path(mlx_loraplus.__file__).parent / "data"), "inside the folder of mlx_loraplus"),
        (".", r"the current folder, which holds other files \(letter\)"),
    ],
)
def test_a_folder_that_belongs_to_other_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, what: str
):
    monkeypatch.setenv("HOME", str(tmp_path / "people" / "me"))
    (tmp_path / "people" / "me").mkdir(parents=True)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    check_contents(Path(), (), "--adapter-path")  # an empty folder is free
    (work / "letter").touch()
    with pytest.raises(OutputError, match=what) as raised:
        check_contents(Path(path).expanduser(), (), "--adapter-path")
    assert str(raised.value).endswith("such as runs/first")

    # What the message advises is accepted, and so is a run in the current folder
    check_contents(Path("runs/first"), (), "--adapter-path")
    (work / HISTORY).touch()
    check_contents(Path(), (), "--adapter-path")


@pytest.mark.parametrize("name", ["x.gguf", "out/model.safetensors", "adapter.v2.GGUF"])
def test_a_new_folder_is_not_named_like_a_file_of_weights(tmp_path: Path, name: str):
    path = tmp_path / name
    with pytest.raises(OutputError, match=f"{path} is the name of a file") as raised:
        check_free(path, [], overwrite=True)

    # What the message advises is accepted, and so is a folder that exists
    advised = Path(str(raised.value).rpartition("such as ")[2])
    check_free(advised, [], overwrite=False)
    path.mkdir(parents=True)
    check_free(path, [], overwrite=False)
    check_contents(tmp_path / "run-0.1.2", (), "--adapter-path")


def test_a_cached_folder_is_made_while_others_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLX_LORAPLUS_CACHE", str(tmp_path))
    (tmp_path / "section").mkdir()
    (tmp_path / "section" / ".12-gone").symlink_to(
        "nowhere"
    )  # as one that is renamed between two looks at it

    def build(path: Path) -> None:
        write_atomically(path / "file", b"mine")
        cached_folder("section", "key", lambda other: write_atomically(other / "file", b"first"))

    folder = cached_folder("section", "key", build)
    assert (folder / "file").read_bytes() == b"first"  # another process may be reading it
    assert {path.name for path in folder.parent.iterdir()} == {"key", ".12-gone"}


def test_a_new_folder_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "folder").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing_folder(tmp_path / "folder") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("by another library")
    places = [
        tmp_path / "folder" / "deep" / "file",
        tmp_path / "folder" / "deep",
        tmp_path / "folder",
    ]
    assert {(place.stat().st_ino, False) for place in places} | {
        (tmp_path.stat().st_ino, True)
    } == set(synced)


def test_what_should_be_small_is_not_read_where_it_is_not(tmp_path: Path):
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="allowed are"), cpu_limit():
        read_bounded(tmp_path / "big")
    with pytest.raises(OSError, match="not an ordinary file"), cpu_limit():
        read_bounded(Path("/dev/zero"))


@pytest.mark.parametrize("what", ["link", "hard link", "pipe", "text", "folder"])
def test_a_lock_that_is_not_ours_is_refused_and_left(tmp_path: Path, what: str):
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    theirs.write_text("precious")
    run.mkdir()
    lock = run / ".lock"
    {
        "link": lambda: lock.symlink_to(theirs),
        "hard link": lambda: lock.hardlink_to(theirs),
        "pipe": lambda: os.mkfifo(lock),
        "text": lambda: lock.write_text("precious"),
        "folder": lock.mkdir,
    }[what]()
    with pytest.raises(OutputError, match="not the lock of a run"), locked(run):
        pass
    with pytest.raises(OutputError, match="not the lock of a run"):
        check_unlocked(run)
    assert theirs.read_text() == "precious"


def test_a_link_is_replaced_and_permissions_stay(tmp_path: Path):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    write_atomically(tmp_path / "link", b"mine")
    assert (tmp_path / "theirs").read_text() == "precious"
    (tmp_path / "link").chmod(0o640)
    write_atomically(tmp_path / "link", b"again")
    assert (tmp_path / "link").stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not an ordinary file"):
        read_bounded(tmp_path / "pipe")


def test_a_persons_files_stay_when_a_folder_is_replaced(tmp_path: Path):
    path, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (path / "backup").mkdir(parents=True)
    (path / "empty").mkdir()
    elsewhere.mkdir()
    for name in ("weights", "old", "notes", "backup/weights"):
        (path / name).write_text(name)
    (path / "link").symlink_to(elsewhere)
    (path / "broken").symlink_to(tmp_path / "nowhere")

    with replacing_folder(path, is_ours={"weights", "old"}.__contains__) as folder:
        (folder / "weights").write_text("new")

    assert sorted(place.name for place in path.iterdir()) == [
        "backup",
        "broken",
        "empty",
        "link",
        "notes",
        "weights",
    ]
    assert (path / "weights").read_text() == "new"
    assert (path / "backup" / "weights").read_text() == "backup/weights", (
        "only what lies where ours does is replaced"
    )
    assert (path / "link").resolve() == elsewhere
    assert sorted(place.name for place in tmp_path.iterdir()) == ["elsewhere", "out"]

    remove_folder(path, {"weights"}.__contains__)
    assert (path / "notes").exists()
    assert not (path / "weights").exists()
    remove_folder(path)
    assert not path.exists()


def test_an_old_folder_is_back_where_the_new_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, rename = tmp_path / "out", Path.rename
    path.mkdir()
    (path / "notes").write_text("mine")

    def refuse(self: Path, target: Path) -> Path:
        if target == path and self.name.endswith("-out") and not self.name.startswith(".replaced-"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(OutputError, match="No space left"),
        replacing_folder(path, is_ours=lambda _: False),
    ):
        pass
    assert (path / "notes").read_text() == "mine"
    assert [place.name for place in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (HISTORY, "a run"),
        (TRIALS, "a sweep"),
        ("adapters.safetensors", "an adapter"),
        ("model.safetensors", "a model"),
        ("model-00001-of-00002.safetensors", "a model"),
        ("Train.csv", "data"),
        ("train-00000-of-00004.parquet", "data"),
    ],
)
def test_a_folder_is_known_by_its_files(tmp_path: Path, name: str, kind: str):
    kinds = ("a run", "a sweep", "an adapter", "a model", "data")
    (tmp_path / "notes.txt").write_text("")
    check_contents(tmp_path, kinds, "--save-path")
    check_contents(tmp_path / "missing", kinds, "--save-path")
    (tmp_path / name).write_text("")
    with pytest.raises(OutputError, match=rf"holds {kind} \({name}\): give another --save-path"):
        check_contents(tmp_path, kinds, "--save-path")


def test_every_format_of_data_is_known():
    assert set(SUFFIXES) == set(DATA_SUFFIXES)


def test_a_folder_that_is_read_is_not_written(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path)
    check_apart(tmp_path, ["gemma-3", str(tmp_path / "missing")], "--adapter-path")
    with pytest.raises(OutputError, match="is also read by this run"):
        check_apart(tmp_path, [str(tmp_path / "link")], "--adapter-path")


def test_the_reason_is_given_why_a_path_can_not_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file is a file, not a folder; choose another place"):
        write_atomically(tmp_path / "file" / "a" / "b", b"")
    with pytest.raises(OutputError, match=r"Is a directory; choose another place"):
        write_atomically(tmp_path, b"")
    full = write_error(tmp_path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert str(full).endswith("No space left on device; free some space, or choose another place")


@pytest.mark.parametrize("target", ["nowhere", "link"], ids=["dangling", "circle"])
@pytest.mark.parametrize("inside", ["", "deep/er"])
def test_a_link_that_leads_nowhere_is_told(tmp_path: Path, target: str, inside: str):
    (tmp_path / "link").symlink_to(target)
    path = tmp_path / "link" / inside
    told = rf"link is a link that leads nowhere \(to '{target}'\): correct or remove the link"
    with pytest.raises(OutputError, match=told):
        check_links(path, "save_path")
    with pytest.raises(OutputError, match=told):
        check_free(path, [], overwrite=True)
    with pytest.raises(OutputError, match=told), replacing_folder(path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


def test_names_of_temporary_files_cannot_be_guessed(tmp_path: Path):
    names = {temporary_name(tmp_path / "file") for _ in range(9)}
    assert len(names) == 9
    for name in names:
        assert re.fullmatch(rf"\.{os.getpid()}-[0-9a-f]{{16}}-file", name)
    assert len(temporary_name(tmp_path / ("x" * 250))) < 200
