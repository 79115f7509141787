"""Writing files so that, whatever happens, the old or the new content is there and never half of it."""

from __future__ import annotations

import os
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


def unwritable(path: Path, error: OSError) -> CopeditError:
    """The sentence for a path that cannot be written."""
    return CopeditError(
        f"cannot write {path}: {error.strerror or error}; choose another output folder with -o, or free space there"
    )
