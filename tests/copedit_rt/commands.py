"""The command line and studies for it, some of which it refuses."""

import gzip
from pathlib import Path

import nibabel as nib
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
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def truncated(folder: Path) -> None:
    path = study(folder) / "case_t2.nii.gz"
    path.write_bytes(path.read_bytes()[:1000])


def not_nifti(folder: Path) -> None:
    (study(folder) / "case_t2.nii.gz").write_bytes(gzip.compress(b"no image at all" * 100))


def empty(folder: Path) -> None:
    (study(folder) / "case_t2.nii.gz").write_bytes(b"")


def shaped(*shape: int):
    def build(folder: Path) -> None:
        nib.save(nib.Nifti1Image(np.ones(shape, np.float32), AFFINE), study(folder) / "case_t2.nii.gz")

    return build


def filled(value: float, where: slice | int = 3):
    def build(folder: Path) -> None:
        data = image(5)
        data[where] = value
        save(study(folder) / "case_t2.nii.gz", data)

    return build


def zero_affine(folder: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape(GRID)
    header.set_data_dtype(np.float32)
    header["sform_code"] = 1
    content = header.binaryblock + bytes(4) + image().astype(np.float32).tobytes(order="F")
    (study(folder) / "case_t2.nii.gz").write_bytes(gzip.compress(content))


def huge(folder: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header["dim"][:4] = 3, 30000, 30000, 30000
    header["pixdim"][1:4] = 1
    header["sform_code"] = 1
    header["srow_x"], header["srow_y"], header["srow_z"] = [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]
    (study(folder) / "case_t2.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(4)))


def twice(folder: Path) -> None:
    save(study(folder) / "case_t2w.nii.gz", image(7))


def unknown_names(folder: Path) -> None:
    study(folder, elements=("swi", "adc"))


def other_grid(folder: Path) -> None:
    save(study(folder) / "case_t2.nii.gz", image(1, (24, 22, 12)))


def complete(folder: Path) -> None:
    study(folder, elements=("t1", "t1ce", "t2", "flair"))


def nothing(folder: Path) -> None:
    folder.mkdir()


def pd(folder: Path) -> None:
    study(folder, elements=("t1", "pd"))


BAD = {
    "truncated gzip": (truncated, "case_t2.nii.gz", "gzip"),
    "not NIfTI": (not_nifti, "case_t2.nii.gz", "NIfTI"),
    "empty": (empty, "case_t2.nii.gz", "empty"),
    "2-D": (shaped(24, 22), "case_t2.nii.gz", "2-D"),
    "4-D": (shaped(24, 22, 10, 3), "case_t2.nii.gz", "3 volumes"),
    "all zero": (filled(0, slice(None)), "case_t2.nii.gz", "every voxel"),
    "NaN": (filled(np.nan), "case_t2.nii.gz", "NaN"),
    "infinite": (filled(np.inf), "case_t2.nii.gz", "infinite"),
    "zero affine": (zero_affine, "case_t2.nii.gz", "affine"),
    "too large": (huge, "case_t2.nii.gz", "memory"),
    "two files for one modality": (twice, "two files for t2"),
    "unknown modality names": (unknown_names, "swi"),
    "different grids": (other_grid, "--resample", "24 x 22 x 12", "24 x 22 x 10"),
    "nothing missing": (complete, "case", "missing"),
    "everything missing": (nothing, "no images found"),
    "a modality that the model does not know": (pd, "pd", "tiny-brain"),
}
