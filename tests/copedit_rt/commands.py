"""The command line and studies for it, some of which it refuses."""

import struct
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from copedit_rt import cli
from copedit_rt.images.nifti import Volume

AFFINE = np.diag([-2.0, 2.0, 5.0, 1.0])
AFFINE[:3, 3] = [24, -24, -25]
GRID = (24, 22, 10)
SHORT_AXIS = np.diag([3.0, 3.0, 8.0, 1.0])


def image(seed: int = 0, grid: tuple[int, ...] = GRID) -> np.ndarray:
    """An ellipsoid of noise on a background of 0."""
    data = np.random.default_rng(seed).uniform(100, 900, grid)
    inside = sum(((np.arange(n) - n / 2) / (0.45 * n)).reshape([-1 if a == b else 1 for b in range(3)]) ** 2
                 for a, n in enumerate(grid)) < 1  # fmt: skip
    return np.where(inside, data, 0)


def slices(width: int, count: int) -> np.ndarray:
    """A stack without blank slices."""
    return np.random.default_rng(0).uniform(100, 900, (width, width, count))


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume.from_array(data, affine).save(path)
    return path


def patch(path: Path, offset: int, form: str, *values: float) -> Path:
    """Overwrite part of an uncompressed file's header."""
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(content)
    return path


def study(folder: Path, name: str = "case", elements: tuple[str, ...] = ("t1", "t2", "flair")) -> Path:
    for seed, element in enumerate(elements):
        save(folder / f"{name}_{element}.nii.gz", image(seed))
    return folder


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)


def refused(result, *words: str) -> str:
    """The one sentence of a refusal, after it was checked to be that."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("passed over")]
    assert len(lines) == 1 and lines[0].startswith("copedit: "), result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def files(folder: Path) -> set[str]:
    """All that a command wrote, but for what a cohort leaves for --summary."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name for name in found if not name.startswith("copedit_summary")}


def truncated(folder: Path) -> None:
    path = study(folder) / "case_t2.nii.gz"
    path.write_bytes(path.read_bytes()[:1000])


def filled(value: float, where: slice | int = 3):
    def build(folder: Path) -> None:
        data = image(5)
        data[where] = value
        save(study(folder) / "case_t2.nii.gz", data)

    return build


def twice(folder: Path) -> None:
    save(study(folder) / "case_t2w.nii.gz", image(7))


def other_grid(folder: Path) -> None:
    save(study(folder) / "case_t2.nii.gz", image(1, (24, 22, 12)))
