"""A series as a NIfTI file, by dcm2niix in a process of its own with limits: whatever the files are, it ends."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from copedit_rt.errors import CopeditError
from copedit_rt.images.dicom.series import Series
from copedit_rt.images.nifti import available_memory

SECONDS = 600  # that a series may take
_MEMORY = 1 << 30  # bytes beside six times the voxels
# Voxels as they are, neither turned nor cropped; no sidecar, as it tells of the patient; no settings of the user's.
_OPTIONS = ("-b", "n", "-z", "n", "-f", "image", "-x", "i", "-m", "y", "-l", "o", "-w", "2", "-g", "i")


def program() -> str:
    """Where dcm2niix is: the package's, or one on the path. Raises CopeditError where there is none."""
    if find_spec("dcm2niix") is not None:
        import dcm2niix

        if os.access(dcm2niix.bin, os.X_OK):
            return str(dcm2niix.bin)
    if there := shutil.which("dcm2niix"):
        return there
    raise CopeditError("DICOM files need the program dcm2niix, which is not installed; pip install 'copedit[dicom]'")


def convert(series: Series, folder: Path, called: Path) -> Path:
    """The one NIfTI file [columns, rows, slices] of a series, made in `folder`, which is new.

    called: the series in errors. Raises CopeditError where dcm2niix makes none or several, fails, or is not done in
    time, and for images larger than memory.
    """
    size = sum(header.voxel_bytes for header in series.headers)
    if 6 * size > available_memory():
        raise CopeditError(f"{called}: its images take {size / 2**30:.1f} GiB, more than memory allows; crop them")
    files, out = folder / "in", folder / "out"
    files.mkdir(parents=True)
    out.mkdir()
    for number, header in enumerate(series.headers):
        (files / f"{number:06d}.dcm").symlink_to(header.path.resolve())
    said = _run([program(), *_OPTIONS, "-o", str(out), str(files)], folder, size, called)
    made = sorted(out.glob("*.nii"))
    if len(made) == 1 and re.fullmatch(r"image(_e\d+)?(_t\d+)?", made[0].stem):  # its one echo, its one time
        return made[0]
    packed = f" (transfer syntax {_syntax(series.first.syntax)})" * series.first.compressed
    if not made:
        how = f", {reason}" if (reason := _reason(said, folder)) else ""
        raise CopeditError(f"{called}: dcm2niix makes no image of it{packed}{how}; export it again, uncompressed")
    kinds = ", ".join(path.stem.removeprefix("image") or "image" for path in made[:4])
    raise CopeditError(
        f"{called}: dcm2niix makes other volumes of it than one ({kinds}), as of a tilted gantry, uneven slices, "
        f"several echoes or times; convert it by hand and give the NIfTI files"
    )


def _run(command: list[str], folder: Path, size: int, called: Path) -> str:
    """What the program said. Its home is the folder, so that no settings are read or left."""
    surroundings = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=surroundings
    ) as running:
        _limit(running.pid, size)
        try:
            said, _ = running.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            running.kill()
            raise CopeditError(f"{called}: dcm2niix was not done after {SECONDS} s; convert it by hand") from error
    if running.returncode < 0:  # by a signal
        raise CopeditError(f"{called}: dcm2niix crashed on it; its files may be damaged: export it again")
    return said.decode("utf-8", "replace")


def _limit(process: int, size: int) -> None:
    """How much a process may take: memory, and bytes of a file."""
    try:
        import resource

        limit: Callable[..., object] = resource.prlimit
        limit(process, resource.RLIMIT_AS, (6 * size + _MEMORY,) * 2)
        limit(process, resource.RLIMIT_FSIZE, (6 * size + _MEMORY,) * 2)
    except (ImportError, AttributeError, OSError):  # not on this system, or it has ended already
        return


def _reason(said: str, folder: Path) -> str:
    """The first thing that it complained of, without paths."""
    for line in said.splitlines():
        if re.search(r"error|warning|unsupported|unable", line, re.I) and "manufacturer" not in line:
            text = re.sub(r"\S*/\S*", "", line.replace(str(folder), ""))
            return " ".join(text.split())[:160]
    return ""


def _syntax(uid: str) -> str:
    from pydicom.uid import UID

    return UID(uid).name
