"""Writing files so that, whatever happens, the old or the new content is there and never half of it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from copedit_rt.errors import CopeditError


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, made if need be, then rename; CopeditError where that fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill the folder that this gives, beside `folder`; it gets that name at the end, so that all is there or nothing.

    Raises CopeditError for a folder that is not empty or cannot be written.
    """
    folder = folder.absolute()
    part = folder.with_name(f".{folder.name}.part")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CopeditError(f"{folder} is there and not empty; choose another folder with -o, or delete it")
        shutil.rmtree(part, ignore_errors=True)  # what a killed process left
        try:
            yield part
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise unwritable(folder, error) from error


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
    return CopeditError(
        f"cannot write {path}: {error.strerror or error}; choose another output folder with -o, or free space there"
    )
