"""Writing files so that, whatever happens, the old or the new content is there and never half of it.

Temporary names are random and made exclusively, so that nothing planted there is followed. A file of such a name is
locked while its process lives: one that can be locked by another is a leftover, and goes, with the folder that it
stands for. File systems of networks lock files between machines, folders at most within one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from copedit_rt.errors import CopeditError, Fault

try:
    import fcntl
except ImportError:  # Windows: leftovers stay
    fcntl = None  # type: ignore[assignment]

_PART = re.compile(r"\.[0-9a-f]{16}\.part$")
SUFFIX = re.compile(r"\.[a-z]\w*$", re.I)  # of a file; the end of a UID is none
MOST_JSON = 64 << 20  # bytes; the largest that is written here, the index of a data set, takes some 200 a study
_SWEPT: set[Path] = set()
_OPEN: set[Path] = set()  # folders that this process is filling


def write_atomically(path: Path, content: bytes | Iterable[bytes]) -> str:
    """Write under a temporary name in the same folder, made if need be, then rename; the content's sha256.

    content: in one piece, or in pieces that are made while they are written. Raises CopeditError where that fails.
    """
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        with _claimed(path) as (part, handle), open(handle, "wb", closefd=False) as file:
            for piece in (content,) if isinstance(content, bytes) else content:
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(handle)
            os.replace(part, path)
    except OSError as error:
        raise unwritable(path, error) from error
    return digest.hexdigest()


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Fill the folder that this gives, beside `folder`; it gets that name at the end, so that all is there or nothing.

    replace: in the place of one that is there, which goes with all that it holds. Raises CopeditError for a folder that
    is not empty (but for `replace`) or cannot be written.
    """
    folder = folder.absolute()
    if folder in _OPEN:  # part of one that is being filled: whole or not at all already
        yield folder
        return
    try:
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not replace)):
            raise CopeditError(f"{folder} is there and not empty; choose another folder with -o, or delete it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(folder.parent)
        with _claimed_folder(folder) as part:
            _OPEN.add(part)
            try:
                yield part
            finally:
                _OPEN.discard(part)
            if replace and folder.exists():
                with _claimed_folder(folder) as old:
                    os.replace(folder, old)
                    try:
                        os.replace(part, folder)
                    except OSError:
                        os.replace(old, folder)
                        raise
            else:
                os.replace(part, folder)
    except OSError as error:
        raise unwritable(folder, error) from error


@contextmanager
def _claimed(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside `path` whose name nobody can foresee, locked; gone at the end unless it was renamed."""
    while True:
        part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        _lock(handle, wait=True)  # for one who takes it for a leftover between the two
        if os.path.lexists(part):
            break
        os.close(handle)
    try:
        yield part, handle
    finally:
        _remove_claim(part)
        os.close(handle)


@contextmanager
def _claimed_folder(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """A new folder likewise, beside the file that stands for it."""
    with _claimed(path) as (part, _):
        folder = _folder_of(part)
        folder.mkdir(mode)
        try:
            yield folder
        finally:
            remove(folder)


def _folder_of(part: Path) -> Path:
    return part.with_suffix(".parts")


def _remove_claim(part: Path) -> None:
    if not _folder_of(part).exists():  # of files that NFS still holds it stays, for the next sweep
        remove(part)


def _lock(handle: int, wait: bool = False) -> bool:
    """Whether nobody else holds it; where nothing can be locked, nothing is a leftover."""
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return bool(fcntl)
    except OSError:
        return False


def remove(path: Path) -> None:
    """A file or folder goes if it is there and can."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder below `parent` that only this user can read, gone at the end; what dead processes left there goes, too.

    Raises CopeditError where it cannot be made.
    """
    try:
        _sweep_once(parent)
        with _claimed_folder(parent / "copedit", 0o700) as folder:
            yield folder
    except OSError as error:
        raise unwritable(parent, error) from error


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it, each with the names of its files, in order. Links to folders are followed; a folder
    that several lead to is taken once. What is hidden is passed over, and what macOS puts into zips and Linux on disks.

    CopeditError for a folder that cannot be read: what lies there would count as missing.
    """
    seen = set()
    for top, folders, names in os.walk(root, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX", "lost+found")))
        yield Path(top), sorted(name for name in names if not name.startswith("."))


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, in order, but for what is hidden. Raises CopeditError as `walk` does."""
    try:
        with os.scandir(folder) as there:
            return sorted(folder / entry.name for entry in there if not entry.name.startswith("."))
    except OSError as error:
        _unreadable(error)


def refuse_broken(path: Path) -> None:
    """CopeditError for a link, unless it has the suffix of a file, that leads nowhere, or where nobody may look: what
    lies there would count as missing."""
    if SUFFIX.search(path.name):
        return
    try:
        path.stat()
    except OSError as error:
        _unreadable(error)


def _unreadable(error: OSError) -> NoReturn:
    reason = f"cannot read {error.filename}: {error.strerror}"
    raise CopeditError(f"{reason}; what lies there is not missing: make it readable, or move it away") from error


def sweep(folder: Path) -> None:
    """Remove what processes that are dead left below a folder: at the start of a job that writes there."""
    for top, _, files in os.walk(folder):
        _sweep(Path(top), files)


def _sweep_once(folder: Path) -> None:
    if folder not in _SWEPT:
        if len(_SWEPT) >= 10_000:  # a server writes into ever new ones
            _SWEPT.clear()
        _SWEPT.add(folder)
        _sweep(folder, os.listdir(folder))


def _sweep(folder: Path, names: Iterable[str]) -> None:
    for part in (folder / name for name in names if name.startswith(".") and _PART.search(name)):
        with suppress(OSError):
            handle = os.open(part, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))  # NFS locks only what may be written
            try:
                if _lock(handle):
                    remove(_folder_of(part))
                    _remove_claim(part)
            finally:
                os.close(handle)


def digest_of(folder: Path) -> str:
    """The sha256 of a folder's files one after another, in the order of their names; not of those that systems hide in
    it. Raises OSError."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_file(path: Path) -> bool:
    """Whether there is such a file; not where there cannot be one, as its name is too long."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises OSError, or ValueError for whatever is not JSON: of too deep a nesting, too."""
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"it is larger than {MOST_JSON >> 20} MiB")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def check_writable(folder: Path) -> None:
    """CopeditError if files could not be written below a folder; leaves no trace."""
    ancestor = folder.absolute()
    if re.search(r"\.nii(\.gz)?$", folder.name, re.I):
        raise CopeditError(f"{folder} has the name of an image; -o takes a folder, whose files are named as the inputs")
    try:
        while not ancestor.exists() and ancestor != ancestor.parent:
            ancestor = ancestor.parent
        if not ancestor.is_dir():
            raise NotADirectoryError(20, "not a folder")
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise CopeditError(f"cannot write to {folder} ({ancestor}: {reason}); choose another folder with -o") from error


def unwritable(path: Path, error: OSError) -> CopeditError:
    """The sentence for a path that cannot be written."""
    return Fault(
        f"cannot write {path}: {error.strerror or error}; choose another output folder with -o, or free space there"
    )
