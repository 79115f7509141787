"""Writing: whole or not at all, never where somebody else points, and nothing of the dead stays."""

import errno
import fcntl
import hashlib
import os
import secrets
import signal
import stat
import subprocess
import sys

import pytest

from copedit_rt import files
from copedit_rt.errors import CopeditError
from copedit_rt.files import new_folder, sweep, write_atomically

WRITER = """
import sys, time
from pathlib import Path
from copedit_rt.files import new_folder, write_atomically
def slowly():
    yield b"half"
    print("half", flush=True)
    time.sleep(60)
if sys.argv[2] == "file":
    write_atomically(Path(sys.argv[1]), slowly())
else:
    with new_folder(Path(sys.argv[1])) as part:
        list(slowly() if (part / "x").write_text("half") else ())
"""


def start(path, kind):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), kind], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_content_and_its_hash(tmp_path):
    path = tmp_path / "new" / ("x" * 240)  # a long name must not make the temporary one too long
    for content, pieces in ((b"one", b"one"), (b"two three", iter([b"two ", b"three"]))):
        assert write_atomically(path, pieces) == hashlib.sha256(content).hexdigest()
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_has_been_swept_is_not_remembered_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SWEPT", {tmp_path / str(i) for i in range(10_000)})
    write_atomically(tmp_path / "x", b"")
    assert files._SWEPT == {tmp_path}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_at_a_temporary_name_is_not_followed(tmp_path, monkeypatch, kind):
    victim = tmp_path / "victim"
    victim.mkdir() if kind == "folder" else victim.write_text("untouched")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0" * 16)
    names = [f".out.{'0' * 16}.part", f".out.{os.getpid()}.part", ".out.part"]
    for name in [name + "s" * (kind == "folder") for name in names]:
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(CopeditError, match="cannot write"):
        if kind == "file":
            write_atomically(tmp_path / "out", b"content")
        else:
            with new_folder(tmp_path / "out") as part:
                (part / "x").write_text("")
    monkeypatch.undo()
    write_atomically(tmp_path / "out", b"content")
    assert (victim.read_text() == "untouched") if kind == "file" else not list(victim.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path, kind):
    dead, living = (start(tmp_path / "a" / name, kind) for name in ("dead", "living"))
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert {p.name.split(".")[1] for p in (tmp_path / "a").iterdir()} == {"dead", "living"}
        (tmp_path / "a" / ".mine.part").write_text("not ours")
        sweep(tmp_path)
        left = [p for p in (tmp_path / "a").iterdir() if "mine" not in p.name]
        assert {p.name.split(".")[1] for p in left} == {"living"} and len(left) == (1 if kind == "file" else 2)
    finally:
        living.kill()
        living.wait()
    files._SWEPT.clear()
    write_atomically(tmp_path / "a" / "out", b"")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [".mine.part", "out"]


def test_locks_are_those_that_networks_share(tmp_path, monkeypatch):
    """As flock(2) has them over NFS: of regular files alone, exclusive where they are open for writing."""
    real, refused = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        writable = fcntl.fcntl(handle, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR)
        if not (stat.S_ISREG(os.fstat(handle).st_mode) and writable):
            refused.append(handle)
            raise OSError(errno.EBADF, "not open for writing")
        real(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    dead = tmp_path / f".dead.{'0' * 16}.part"
    dead.write_text("half")
    dead.with_suffix(".parts").mkdir()
    with new_folder(tmp_path / "x") as part:
        sweep(tmp_path)
        (part / "file").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and not refused


def test_a_failed_write_leaves_the_old_content(tmp_path):
    def breaks():
        yield b"half"
        raise OSError(28, "No space left on device")

    path = tmp_path / "out"
    write_atomically(path, b"old")
    with pytest.raises(CopeditError, match="No space left"):
        write_atomically(path, breaks())
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x") as part:
        (part / "file").write_text("")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "x") as part:
        with new_folder(part) as same:  # a job within a job
            (same / "file").write_text("")
        sweep(tmp_path)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["file"]
    with pytest.raises(CopeditError, match="not empty"), new_folder(tmp_path / "x"):
        pass


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("")
    real, renamed = os.replace, []

    def replace(source, target):
        renamed.append(target)
        if len(renamed) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(CopeditError, match="Input/output error"), new_folder(tmp_path / "x", replace=True) as part:
        (part / "new").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and [p.name for p in (tmp_path / "x").iterdir()] == ["old"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    def fill(name: str) -> None:
        with new_folder(tmp_path / "x", replace=True) as part:
            (part / name).write_text(name)

    for name in ("old", "new"):
        fill(name)
        assert [p.name for p in (tmp_path / "x").iterdir()] == [name] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x", replace=True) as part:
        (part / "half").write_text("")
        raise ZeroDivisionError
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1
