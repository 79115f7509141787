"""One image and its NIfTI file: reading with every check, writing, and bringing one image onto the grid of another."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically
from copedit_rt.images.grids import GRID_TOLERANCE, Orientation, spacing

MARK = "synthetic, CoPeDiT"  # how the header's description of every output begins


@dataclass(eq=False)
class Volume:
    """One image as its file has it.

    data float32 [X, Y, Z] in the file's voxel order; affine float64 4x4, voxel -> RAS mm; header: the file's,
    never changed; raw: the numbers on disk before scaling, kept where an output has to repeat them (cardiac).
    """

    data: NDArray[np.float32]
    affine: NDArray[np.float64]
    header: nib.Nifti1Header
    path: Path | None = None
    sha256: str | None = None
    raw: NDArray | None = None

    @classmethod
    def from_array(cls, data: NDArray, affine: NDArray) -> Volume:
        """A volume that has no file, with a header made for it."""
        header = nib.Nifti1Header()
        header.set_data_shape(data.shape)
        header.set_data_dtype(np.float32)
        header.set_qform(affine, 1)
        header.set_sform(affine, 1)
        header.set_xyzt_units("mm")
        return cls(np.asarray(data, np.float32), np.asarray(affine, np.float64), header)

    def save(self, path: Path, description: str | None = None) -> None:
        """Write data as float32 .nii or .nii.gz with this header, atomically."""
        write_nifti(Path(path), self.data, self.header, description)

    @property
    def grid(self) -> str:
        """Shape and voxel size in words."""
        size = " x ".join(f"{s:.3g}" for s in spacing(self.affine))
        return f"{' x '.join(map(str, self.data.shape))} voxels of {size} mm"


def read_volume(path: Path, *, keep_raw: bool = False) -> Volume:
    """Read one 3-D NIfTI file, gzipped or not, whatever its name ends with.

    Checks what the file is, not what the image shows: voxels may be NaN or all the same.
    """
    path = Path(path)
    header, shape, affine, offset = _read_promise(path)
    slope, inter = header.get_slope_inter()
    dtype, count = header.get_data_dtype(), int(np.prod(shape))
    content, digest = _read_content(path, offset + count * dtype.itemsize)
    raw = np.frombuffer(content, dtype, count, offset).reshape(shape, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        if slope in (None, 1) and inter in (None, 0):
            data = raw.astype(np.float32)
        else:
            data = (raw.astype(np.float64) * slope + inter).astype(np.float32)
    return Volume(data, affine, header, path, digest, raw if keep_raw else None)


def read_outline(path: Path) -> Volume:
    """A volume whose voxels are zeros that take no memory, after every check that its header and size allow.

    A gzip file ends with the size of its content; where that is not the promised one, all of it is read to find out.
    """
    path = Path(path)
    header, shape, affine, offset = _read_promise(path)
    promised = offset + int(np.prod(shape)) * header.get_data_dtype().itemsize
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(-4, os.SEEK_END)
        size = int.from_bytes(file.read(), "little") if zipped else file.tell()
    if size != (promised % 2**32 if zipped else promised):
        _read_content(path, promised)
    return Volume(np.broadcast_to(np.float32(0), shape), affine, header, path)


def _read_promise(path: Path) -> tuple[nib.Nifti1Header, tuple[int, ...], NDArray[np.float64], int]:
    """Header, shape, affine and where the voxels begin, all checked."""
    header = _read_header(path)
    shape = _volume_shape(path, header)
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
        header.get_slope_inter()
        offset = max(int(header.get_data_offset()), int(header.single_vox_offset))
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise CopeditError(f"{path}: its header is damaged ({error}); export or convert the image again") from error
    _check_affine(path, affine)
    return header, shape, affine, offset


def _read_header(path: Path) -> nib.Nifti1Header:
    start = _peek(path)
    if not start:
        raise CopeditError(f"{path} is an empty file; copy or download it again")
    size = int.from_bytes(start[:4], "little")
    if size not in (348, 540):
        size = int.from_bytes(start[:4], "big")
    kind = {348: nib.Nifti1Header, 540: nib.Nifti2Header}.get(size)
    if kind and len(start) < kind.single_vox_offset:
        raise CopeditError(f"{path} is truncated: it ends within its header; copy or download it again")
    magic = start[344:348] if size == 348 else start[4:8]
    if magic[:3] in (b"ni1", b"ni2"):
        raise CopeditError(f"{path} is the header of a .hdr/.img pair; convert the pair to one .nii.gz file")
    if kind is None or magic[:3] not in (b"n+1", b"n+2"):
        raise CopeditError(f"{path} is not a NIfTI file; convert it to .nii.gz, DICOM for example with dcm2niix")
    try:
        # check=False: nibabel would repair zero voxel sizes, and that is for the user to see
        with _open(path) as file:
            return kind.from_fileobj(file, check=False)
    except (HeaderDataError, ValueError, EOFError, zlib.error, OSError) as error:
        raise CopeditError(f"{path}: its header is damaged ({error}); copy or export the image again") from error


def _peek(path: Path, count: int = 544) -> bytes:
    """The first bytes of the image's content, fewer if the file is shorter."""
    try:
        with _open(path) as file:
            return file.read(count)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CopeditError(f"{path} is a truncated or damaged gzip file; copy or download it again") from error
    except OSError as error:
        raise CopeditError(f"cannot read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file's content; by its first bytes, as names lie about compression."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if zipped:
            with gzip.GzipFile(fileobj=file) as content:
                yield content  # type: ignore[misc]
        else:
            yield file


def _volume_shape(path: Path, header: nib.Nifti1Header) -> tuple[int, ...]:
    """(X, Y, Z) after all checks of what the header promises, none of which reads a voxel."""
    try:
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError, ValueError) as error:
        raise CopeditError(f"{path}: its header is damaged ({error}); copy or export the image again") from error
    size = " x ".join(map(str, shape)) or "none"
    if any(n <= 0 for n in shape):
        raise CopeditError(f"{path} holds no voxels (its dimensions are {size}); export the image again")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise CopeditError(
            f"{path} holds {int(np.prod(shape[3:]))} volumes ({size}), one is needed; split it and give one of them"
        )
    if len(shape) < 3 or 1 in shape:
        raise CopeditError(f"{path} is a 2-D image ({size}); a 3-D volume is needed, so give the whole series")
    if dtype.kind not in "iuf":
        raise CopeditError(f"{path} holds {dtype} voxels; convert it to integers or floating-point grey values")
    count = int(np.prod([float(n) for n in shape]))
    promised = count * dtype.itemsize
    needed = promised + 12 * count  # the numbers on disk and three float32 copies
    available = available_memory()
    if needed > available:
        raise CopeditError(
            f"{path}: its header promises {size} voxels, which take {needed / 2**30:.1f} GiB to read, "
            f"more than the {available / 2**30:.1f} GiB of memory available; check the header, or crop or "
            f"downsample the image"
        )
    on_disk = path.stat().st_size
    with open(path, "rb") as file:
        most = on_disk * (1032 if file.read(2) == b"\x1f\x8b" else 1)  # deflate's limit
    if promised > most:
        raise CopeditError(
            f"{path} is truncated or its header is damaged: it promises {size} voxels ({promised} bytes), "
            f"which {on_disk} bytes cannot hold; copy or download it again"
        )
    return shape


def _check_affine(path: Path, affine: NDArray) -> None:
    columns = affine[:3, :3]
    if np.isfinite(affine).all() and (size := np.linalg.norm(columns, axis=0)).all():
        if abs(np.linalg.det(columns / size)) > 1e-3:
            return
    raise CopeditError(
        f"{path}: its affine is singular or not finite, so the voxels have no place in space; correct sform, "
        f"qform and voxel sizes, or convert the image again"
    )


def _read_content(path: Path, size: int) -> tuple[bytes, str]:
    """The first `size` bytes of the content, and the sha256 of the file; a gzip checksum is verified."""
    try:
        stored = path.read_bytes()
        digest = hashlib.sha256(stored).hexdigest()
        if stored[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(stored)) as file:
                content = file.read(size)
                while file.read(1 << 20):
                    pass
        else:
            content = stored
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CopeditError(f"{path} is a truncated or damaged gzip file; copy or download it again") from error
    except OSError as error:
        raise CopeditError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) < size:
        raise CopeditError(
            f"{path} is truncated: {size} bytes are promised, {len(content)} are there; copy or download it again"
        )
    return content, digest


def available_memory() -> int:
    """Bytes of memory that can be had now, the container's limit included; a huge number where unknown."""
    found = [1 << 62]
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        found.append(int(text.split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        usage = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(usage.get("active_file", 0)) + int(usage.get("inactive_file", 0))  # given up when needed
        used = int((group / "memory.current").read_text()) - cached
        found.append(int((group / "memory.max").read_text()) - used)
    if len(found) == 1:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found)


def same_grid(a: Volume, b: Volume) -> bool:
    """Whether two volumes sample the same points of the world, in whatever voxel order each is stored."""
    one, two = Orientation.to_ras(a.affine), Orientation.to_ras(b.affine)
    if one.apply(a.data).shape != two.apply(b.data).shape:
        return False
    ends = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners = []
    for volume, orientation in ((a, one), (b, two)):
        affine = orientation.affine(volume.affine, volume.data.shape)
        voxels = ends * (np.array(orientation.apply(volume.data).shape) - 1)
        corners.append(voxels @ affine[:3, :3].T + affine[:3, 3])
    return bool(np.abs(corners[0] - corners[1]).max() <= GRID_TOLERANCE)


def resample_onto(volume: Volume, reference: Volume) -> NDArray[np.float32]:
    """Linear interpolation of a volume at the reference's voxels; 0 where the volume does not reach."""
    from scipy import ndimage

    matrix = np.linalg.inv(volume.affine) @ reference.affine
    return ndimage.affine_transform(
        volume.data, matrix[:3, :3], matrix[:3, 3], reference.data.shape, np.float32, order=1, cval=0.0
    )


def is_synthetic(path: Path) -> bool:
    """From the header's description; a file that cannot be read is refused later, when it is needed."""
    try:
        start = _peek(path)
    except CopeditError:
        return False
    return MARK.encode() in (start[148 : 148 + len(MARK)], start[240 : 240 + len(MARK)])


def refuse_synthetic(path: Path) -> None:
    if is_synthetic(path):
        raise CopeditError(f"{path} is marked as synthetic by CoPeDiT in its header; give the observed image instead")


def write_nifti(
    path: Path, data: NDArray, header: nib.Nifti1Header, description: str | None, *, scaled: bool = False
) -> None:
    """The array under this header, but for type and description; scaled: the header's slope applies to it."""
    header = header.copy()
    header.set_data_shape(data.shape)
    header.set_data_dtype(data.dtype)
    if not scaled:
        header.set_slope_inter(1, 0)
    header["vox_offset"] = 0  # nibabel then puts the data right after the header and its extensions
    header["magic"] = header.single_magic
    if description is not None:
        header["descrip"] = description.encode("ascii", "replace")[:79]
    stream = io.BytesIO()
    header.write_to(stream)
    stream.write(bytes(int(header.get_data_offset()) - stream.tell()))
    stream.write(data.astype(header.get_data_dtype(), copy=False).tobytes(order="F"))
    content = stream.getvalue()
    # mtime 0: the same image gives the same file
    zipped = path.name.lower().endswith(".gz")
    write_atomically(path, gzip.compress(content, 4, mtime=0) if zipped else content)
