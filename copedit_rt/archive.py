"""Zips of studies, unpacked where nothing in them can do harm: sizes are counted, and no name leads elsewhere."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from copedit_rt.errors import CopeditError
from copedit_rt.files import scratch_folder, unwritable

MOST_MEMBERS = 100_000
_LITTER = re.compile(r"(?:^|/)(?:__MACOSX/|\._|\.DS_Store$)")  # what macOS puts beside the files
_SMALL, _RATIO = 1 << 30, 100  # what any zip may hold, and how much more than its own size a larger one may


class TooLarge(CopeditError):
    """More than there is room for."""


class Damaged(CopeditError):
    """A zip that cannot be read."""


@dataclass
class Room:
    """How many bytes may still be written. said: the error where there are more."""

    left: int
    said: str

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise TooLarge(self.said)


class Unpacked:
    """A zip in a folder that only this user can read; the folder goes with this object, or with the process.

    parent: where that folder is made, by default the system's folder for temporary files. Raises CopeditError for a
    zip that is damaged or holds more than half of the free space there, or a hundred times its own size (1 GiB is
    always allowed).
    """

    def __init__(self, path: Path, parent: Path | None = None) -> None:
        parent, stack = parent or Path(tempfile.gettempdir()), ExitStack()
        scratch = stack.enter_context(scratch_folder(parent))
        self.close = weakref.finalize(self, stack.close)
        self.folder = scratch / safe_name(path.name[: -len(".zip")])
        self.folder.mkdir()
        most = min(max(_SMALL, _RATIO * path.stat().st_size), shutil.disk_usage(parent).free // 2)
        said = f"{path} holds more than {most / 2**30:.1f} GiB, unpacked; unpack it yourself if that is right"
        room = Room(most, said)
        try:
            with open(path, "rb") as content:
                unpack(content, self.folder, room, MOST_MEMBERS)
        except CopeditError as error:
            self.close()
            raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from error


def is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def unpack(content: BinaryIO, home: Path, room: Room, most_members: int) -> None:
    """Put the members of a zip below `home`; sizes are counted, not believed, and no name leads out of the folder.

    Raises TooLarge, Damaged, and CopeditError for names that are none.
    """
    try:
        with zipfile.ZipFile(content) as packed:
            members = [m for m in packed.infolist() if not (m.is_dir() or _LITTER.search(m.filename))]
            if len(members) > most_members:
                raise TooLarge(f"the zip has {len(members)} members, more than {most_members}; give one study")
            for member in members:
                parts = [
                    safe_name(part) for part in PurePosixPath(member.filename.replace("\\", "/")).parts if part != "/"
                ]
                with packed.open(member) as source:
                    path = home.joinpath(*parts)
                    if path.exists() or any(p.is_file() for p in path.parents if home in p.parents):
                        raise CopeditError(f"two members of the zip are called {'/'.join(parts)}; rename one")
                    write(path, iter(lambda source=source: source.read(1 << 20), b""), room)  # type: ignore[misc]
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise unwritable(home, error) from error  # type: ignore[arg-type]
        said = "the zip is damaged, encrypted or packed in a way that is not understood; pack it again"
        raise Damaged(said) from error


def write(path: Path, pieces: Iterator[bytes], room: Room) -> None:
    """A new file, as far as there is room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        for piece in pieces:
            room.take(len(piece))
            file.write(piece)


def safe_name(name: str) -> str:
    """A name that is one on every system, and none that is hidden or leads elsewhere."""
    clean = re.sub(r"[^\w.+= -]", "_", name).strip(". ")
    if len(clean.encode()) > 200:
        raise CopeditError(f"the name {clean[:40]}... is too long; rename the file")
    return clean or "_"
