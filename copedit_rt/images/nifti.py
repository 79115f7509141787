"""One image and its NIfTI file: reading with every check, writing, and bringing one image onto the grid of another."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically
from copedit_rt.images.grids import Orientation, apart, slabs, spacing
from copedit_rt.images.intensity import Backdrop

if TYPE_CHECKING:  # otherwise imported where a header is made, read or judged
    import nibabel as nib
    from nibabel.spatialimages import SpatialImage

deflate: Any
try:
    from isal import isal_zlib

    deflate, _LEVEL = isal_zlib, 2
except ImportError:
    deflate, _LEVEL = zlib, 1
# Levels by CPU time, on 29 MB of synthesised brain: isal 2 packs them in 21 ms to 4.05 MB (3: 110 ms, 4.06 MB), zlib 1
# in 164 ms to 4.17 MB (4: 268 ms, 4.00 MB, which take twice as long to read).

MARK = "synthetic, CoPeDiT"  # how the header's description of every output begins
NEAR = 0.1  # voxels: grids that differ by less count as equal
WORKING = 28  # bytes a voxel that filling in a study takes at most beside the images that were read
VOXEL_MM, EXTENT_MM = (0.05, 50.0), (20.0, 1000.0)  # what voxels measure, and images along their longest side
_UNITS = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's codes of metres, millimetres, micrometres, in mm
_NO_FILE = "an image in memory"
_GZIP = b"\x1f\x8b"
_SILENT = logging.Logger("copedit")
_SILENT.addHandler(logging.NullHandler())


@dataclass(eq=False)
class Volume:
    """One image as its file has it.

    data float32 [X, Y, Z] in the file's voxel order; affine float64 4x4, voxel -> RAS mm; header: the file's,
    never changed; raw: the numbers on disk before scaling, kept where an output has to repeat them (cardiac). stamp:
    the file's size in bytes and its time of change in ns, when it was read.
    """

    data: NDArray[np.float32]
    affine: NDArray[np.float64]
    header: nib.Nifti1Header
    path: Path | None = None
    sha256: str | None = None
    raw: NDArray | None = None
    stamp: tuple[int, int] | None = None

    @classmethod
    def from_array(cls, data: NDArray, affine: NDArray) -> Volume:
        """A volume that has no file, with a header made for it.

        Raises CopeditError for an array that is no volume, and for an affine that gives its voxels no place in space.
        """
        import nibabel as nib

        data, affine = np.asarray(data, np.float32), np.asarray(affine, np.float64)
        check_affine(_NO_FILE, affine)
        header = nib.Nifti1Header()
        header.set_data_shape(data.shape)
        header.set_data_dtype(np.float32)
        header.set_qform(affine, 1)
        header.set_sform(affine, 1)
        header.set_xyzt_units("mm")
        shape, _ = _volume_shape(_NO_FILE, header)
        return cls(data.reshape(shape), affine, header)

    @classmethod
    def from_image(cls, image: SpatialImage, what: str) -> Volume:
        """A volume of an image that is in memory already, after the checks that its file would go through.

        what: its name in errors, where it has no file. Numbers before scaling are kept, as an output may repeat them.
        Raises CopeditError as `read_volume` does, and for an image that is marked as synthetic.
        """
        import nibabel as nib
        from nibabel.arrayproxy import ArrayProxy

        file = Path(name) if (name := image.get_filename()) else None
        path = file or Path(what)
        if nib.is_proxy(image.dataobj) and type(image.dataobj) is not ArrayProxy:  # as of MINC, scaled in its own way
            image = nib.Nifti1Image(_whole(path, image.dataobj), image.affine)
        if image.affine is not None:
            check_affine(path, image.affine)
        header = _header_of(image)
        shape, _ = _volume_shape(path, header)
        affine = np.array(header.get_best_affine() if image.affine is None else image.affine, np.float64)
        affine[:3] *= _UNITS.get(int(header["xyzt_units"]) & 7, 1.0)
        _check_extent(path, shape, affine)
        if header["descrip"].item().startswith(MARK.encode()):
            raise _synthetic(path)
        raw = _whole(path, image.dataobj).reshape(shape)
        return cls(_scaled(raw, header), affine, header, file, raw=raw)

    @classmethod
    def placed(cls, array: NDArray, affine: NDArray[np.float64], what: str) -> Volume:
        """A volume of an array and its affine, checked as `from_image` does, and the affine too."""
        import nibabel as nib

        check_affine(what, affine)
        _check_type(what, array.dtype)
        if array.dtype.type is np.float16:  # no NIfTI file has it
            array = array.astype(np.float32)
        return cls.from_image(nib.Nifti1Image(array, affine, dtype=array.dtype), what)

    @property
    def called(self) -> Path | str:
        """Its file; of a volume without one, that it has none."""
        return self.path or _NO_FILE

    def save(self, path: Path, description: str | None = None) -> None:
        """Write data as float32 .nii or .nii.gz with this header, atomically."""
        write_nifti(Path(path), self.data, self.header, description)

    @property
    def grid(self) -> str:
        """Shape and voxel size in words."""
        size = " x ".join(f"{s:.3g}" for s in spacing(self.affine))
        return f"{' x '.join(map(str, self.data.shape))} voxels of {size} mm"


@dataclass(frozen=True)
class Promise:
    """What a file's header says of its image, all of it checked."""

    path: Path
    header: nib.Nifti1Header
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]  # in mm
    offset: int  # where the voxels begin
    size: str  # the dimensions as the header has them

    @property
    def voxels(self) -> int:
        return int(np.prod([int(n) for n in self.shape], dtype=object))

    @property
    def end(self) -> int:
        """Bytes of content up to the last voxel."""
        return self.offset + self.voxels * self.header.get_data_dtype().itemsize


def read_volume(path: Path, *, keep_raw: bool = False) -> Volume:
    """Read one 3-D NIfTI file, gzipped or not, whatever its name ends with.

    Checks what the file is, not what the image shows: voxels may be NaN or all the same.
    """
    return read_volumes({"": path}, keep_raw=keep_raw)[""]


def read_volumes(paths: Mapping[str, Path], *, keep_raw: bool = False) -> dict[str, Volume]:
    """Read the files of one study; before the first voxel of any, what reading and filling in take is checked."""
    promises = {name: _read_promise(Path(path)) for name, path in paths.items()}
    _check_memory(list(promises.values()))
    return {name: _read(promise, keep_raw) for name, promise in promises.items()}


def _read(promise: Promise, keep_raw: bool) -> Volume:
    header, shape = promise.header, promise.shape
    state = promise.path.stat()
    content, digest = _read_content(promise.path, promise.end)
    raw = np.frombuffer(content, header.get_data_dtype(), promise.voxels, promise.offset).reshape(shape, order="F")
    stamp = state.st_size, state.st_mtime_ns
    return Volume(
        _scaled(raw, header), promise.affine, header, promise.path, digest, raw if keep_raw else None, stamp=stamp
    )


def _whole(path: Path, stored: Any) -> NDArray:
    """What an image of nibabel's holds, before a NIfTI header's scale is applied."""
    from nibabel.arrayproxy import ArrayProxy

    try:
        return np.asarray(stored.get_unscaled() if type(stored) is ArrayProxy else stored)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise CopeditError(f"{path} is truncated or damaged; copy or download it again") from error


def _scaled(raw: NDArray, header: nib.Nifti1Header) -> NDArray[np.float32]:
    """The grey values [X, Y, Z] of a file's numbers."""
    slope, inter = header.get_slope_inter()
    data = np.empty(raw.shape, np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(raw.shape[2]):  # slice by slice, as float64 takes twice the memory
            if slope in (None, 1) and inter in (None, 0):
                data[..., k] = raw[..., k]
            else:
                data[..., k] = raw[..., k].astype(np.float64) * slope + inter
    return data


def _header_of(image: SpatialImage) -> nib.Nifti1Header:
    """The header under which a file holds an image of nibabel's, of whatever format; never the image's own."""
    import nibabel as nib
    from nibabel.spatialimages import HeaderDataError

    data: Any = image.dataobj
    given: Any = image.header
    kind = nib.Nifti2Header if isinstance(given, nib.Nifti2Header) else nib.Nifti1Header
    # Made anew, as that of a pair of files has another kind.
    header = kind(given.binaryblock, given.endianness, False, given.extensions) if isinstance(given, kind) else kind()
    header.set_data_shape(image.shape)
    with contextlib.suppress(HeaderDataError):  # a type that no NIfTI file has is refused by its name
        header.set_data_dtype(data.dtype)
    header.set_slope_inter(*((data.slope, data.inter) if nib.is_proxy(data) else (1, 0)))
    if image.affine is not None and not (
        isinstance(given, kind) and np.array_equal(header.get_best_affine(), image.affine)
    ):
        header.set_xyzt_units("mm")
        header.set_sform(image.affine, 2)
        with contextlib.suppress(HeaderDataError, ValueError, np.linalg.LinAlgError):
            header.set_qform(image.affine, 2)
    return header


def read_outline(path: Path) -> Volume:
    """A volume whose voxels are zeros that take no memory, after every check that its header and size allow.

    A gzip file ends with the size of its content; where that is not the promised one, all of it is read to find out.
    """
    promise = _read_promise(Path(path))
    _check_memory([promise])
    with open(promise.path, "rb") as file:
        zipped = file.read(2) == _GZIP
        file.seek(-4, os.SEEK_END)
        size = int.from_bytes(file.read(), "little") if zipped else file.tell()
    if size != (promise.end % 2**32 if zipped else promise.end):
        _read_content(promise.path, promise.end)
    return Volume(np.broadcast_to(np.float32(0), promise.shape), promise.affine, promise.header, promise.path)


def _read_promise(path: Path) -> Promise:
    """What a file holds, from its header, after every check that needs no voxel."""
    from nibabel.spatialimages import HeaderDataError

    header = _read_header(path)
    shape, size = _volume_shape(path, header)
    try:
        affine = np.array(header.get_best_affine(), np.float64)
        header.get_slope_inter()
        offset = max(int(header.get_data_offset()), int(header.single_vox_offset))
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise CopeditError(f"{path}: its header is damaged ({error}); export or convert the image again") from error
    affine[:3] *= _UNITS.get(int(header["xyzt_units"]) & 7, 1.0)
    check_affine(path, affine)
    promise = Promise(path, header, shape, affine, offset, size)
    _check_size(promise)
    return promise


def _read_header(path: Path) -> nib.Nifti1Header:
    import nibabel as nib
    from nibabel.spatialimages import HeaderDataError

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
        with _open(path) as file:
            header = kind.from_fileobj(file, check=False)
    except (HeaderDataError, ValueError, EOFError, zlib.error, OSError, OverflowError, MemoryError) as error:
        raise CopeditError(f"{path}: its header is damaged ({error}); copy or export the image again") from error
    voxel = header["pixdim"][1:4].copy()
    _repair(header)
    header["pixdim"][1:4] = np.where(voxel == 0, 0, header["pixdim"][1:4])  # nibabel would say 1 mm: not ours to guess
    return header


def _repair(header: nib.Nifti1Header) -> None:
    """What nibabel mends in silence when it reads a file: codes it does not know, the sign of the third axis."""
    header.check_fix(_SILENT, error_level=100)


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
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file")  # a pipe would block for ever
    if path.is_symlink() and not path.exists():
        raise OSError(errno.ENOENT, "it is a broken link")
    with open(path, "rb") as file:
        zipped = file.read(2) == _GZIP
        file.seek(0)
        if zipped:
            with gzip.GzipFile(fileobj=file) as content:
                yield content  # type: ignore[misc]
        else:
            yield file


def _volume_shape(path: Path | str, header: nib.Nifti1Header) -> tuple[tuple[int, int, int], str]:
    """(X, Y, Z) and the dimensions in words, after all checks of what the header promises of them."""
    from nibabel.spatialimages import HeaderDataError

    try:
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError, ValueError) as error:
        raise CopeditError(f"{path}: its header is damaged ({error}); copy or export the image again") from error
    while len(shape) > 3 and shape[-1] in (0, 1):  # some programs write 0 where there is no fourth dimension
        shape = shape[:-1]
    size = " x ".join(map(str, shape)) or "none"
    if any(n <= 0 for n in shape):
        raise CopeditError(f"{path} holds no voxels (its dimensions are {size}); export the image again")
    if len(shape) > 3:
        raise CopeditError(
            f"{path} holds {int(np.prod(shape[3:]))} volumes ({size}), one is needed; split it and give one of them"
        )
    if len(shape) < 3 or 1 in shape:
        raise CopeditError(f"{path} is a 2-D image ({size}); a 3-D volume is needed, so give the whole series")
    _check_type(path, dtype)
    return (shape[0], shape[1], shape[2]), size


def _check_type(path: Path | str, dtype: np.dtype) -> None:
    if dtype.kind not in "iuf":
        raise CopeditError(f"{path} holds {dtype} voxels; convert it to integers or floating-point grey values")


def _check_size(promise: Promise) -> None:
    """Whether the file can hold what its header promises, and voxels and image are as large as a body's."""
    on_disk = promise.path.stat().st_size
    with open(promise.path, "rb") as file:
        most = on_disk * (1032 if file.read(2) == _GZIP else 1)  # deflate's limit
    if max(promise.end - promise.offset, promise.offset) > most:
        needed = _needed([promise])
        if needed > (available := available_memory()):
            raise _too_large(promise, needed, available)
        raise CopeditError(
            f"{promise.path} is truncated or its header is damaged: it promises {promise.size} voxels ({promise.end} "
            f"bytes), which {on_disk} bytes cannot hold; copy or download it again"
        )
    _check_extent(promise.path, promise.shape, promise.affine)


def _check_extent(path: Path, shape: tuple[int, ...], affine: NDArray) -> None:
    """Whether voxels and image are as large as a body's."""
    size = spacing(affine)
    extent = size * shape
    longest = extent.max()
    if not (VOXEL_MM[0] <= size.min() and size.max() <= VOXEL_MM[1] and EXTENT_MM[0] <= longest <= EXTENT_MM[1]):
        words = " x ".join(f"{s:.3g}" for s in size), " x ".join(f"{e:.4g}" for e in extent)
        raise CopeditError(
            f"{path}: voxels of {words[0]} mm and an extent of {words[1]} mm are not those of a scan "
            f"({VOXEL_MM[0]:g} to {VOXEL_MM[1]:g} mm, {EXTENT_MM[0]:g} to {EXTENT_MM[1]:g} mm); correct the voxel "
            f"sizes, or the unit in the header's xyzt_units"
        )


def _needed(promises: Sequence[Promise]) -> int:
    """Bytes at the peak: the images as float32, one file (cardiac: kept), and what filling in takes a voxel."""
    images = sum(4 * p.voxels for p in promises)
    return images + max(p.end + p.path.stat().st_size + WORKING * p.voxels for p in promises)


def _check_memory(promises: Sequence[Promise]) -> None:
    needed, available = _needed(promises), available_memory()
    if needed > available:
        raise _too_large(max(promises, key=lambda p: p.voxels), needed, available)


def _too_large(promise: Promise, needed: int, available: int) -> CopeditError:
    return CopeditError(
        f"{promise.path}: its header promises {promise.size} voxels, which take {needed / 2**30:.1f} GiB to read and "
        f"fill in, more than the {available / 2**30:.1f} GiB of memory available; check the header, or crop or "
        f"downsample the image"
    )


def check_affine(path: Path | str, affine: NDArray) -> None:
    """CopeditError where an affine gives voxels no place in space."""
    if affine.shape != (4, 4):
        raise CopeditError(f"{path}: its affine has the shape {affine.shape}; give a 4 x 4 matrix, voxels to RAS mm")
    columns = affine[:3, :3]
    if np.isfinite(affine).all() and (size := np.linalg.norm(columns, axis=0)).all():
        if abs(np.linalg.det(columns / size)) > 1e-3:
            if np.allclose(affine[3], (0, 0, 0, 1)):
                return
            raise CopeditError(f"{path}: the last row of its affine is not 0, 0, 0, 1; transpose the affine")
    raise CopeditError(
        f"{path}: its affine is singular or not finite, so the voxels have no place in space; correct sform, "
        f"qform and voxel sizes, or convert the image again"
    )


def _read_content(path: Path, size: int) -> tuple[bytes, str]:
    """The first `size` bytes of the content, and the sha256 of the file; a gzip checksum is verified."""
    try:
        stored = path.read_bytes()
        digest = hashlib.sha256(stored).hexdigest()
        content = _inflate(path, stored, size) if stored[:2] == _GZIP else stored
    except (EOFError, zlib.error, deflate.error) as error:
        raise CopeditError(f"{path} is a truncated or damaged gzip file; copy or download it again") from error
    except OSError as error:
        raise CopeditError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) < size:
        raise CopeditError(
            f"{path} is truncated: {size} bytes are promised, {len(content)} are there; copy or download it again"
        )
    return content, digest


def _inflate(path: Path, stored: bytes, size: int) -> bytes:
    """The first `size` bytes of gzip members one after another (bgzip, pigz); what follows the last is no matter.

    Raises CopeditError where the last holds far more than that: a header may be small before a content without end.
    """
    pieces: list[bytes] = []
    spare = max(size, 1 << 20)
    while size > 0 and stored[:2] == _GZIP:
        member = deflate.decompressobj(31)
        pieces.append(member.decompress(stored, size))
        size -= len(pieces[-1])
        while not member.eof:  # on to the checksum
            more = len(member.decompress(member.unconsumed_tail, 1 << 20))
            spare -= more
            if spare < 0:
                raise CopeditError(
                    f"{path} holds far more than the voxels that its header promises; export or convert it again"
                )
            if not (more or member.eof):
                raise EOFError
        stored = member.unused_data
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


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
    """Whether two volumes sample the same points of the world up to a tenth of a voxel, whatever their voxel order."""
    return grid_distance(a, b) <= NEAR * min(spacing(a.affine).min(), spacing(b.affine).min())


def grid_distance(a: Volume, b: Volume) -> float:
    """How far apart the corners of two grids are at most, in mm; infinite for grids of another shape."""
    one, two = Orientation.to_ras(a.affine), Orientation.to_ras(b.affine)
    shape = one.apply(a.data).shape
    if two.apply(b.data).shape != shape:
        return float("inf")
    return apart(one.affine(a.affine, a.data.shape), two.affine(b.affine, b.data.shape), shape)


def transforms_apart(volume: Volume) -> float:
    """How far qform and sform put a voxel apart at most, in voxels; 0 where the header does not have both."""
    from nibabel.spatialimages import HeaderDataError

    header = volume.header
    if not (header["qform_code"] and header["sform_code"]):
        return 0.0
    try:
        qform = header.get_qform()
    except (HeaderDataError, ValueError):
        return 0.0
    if not np.isfinite(qform).all():
        return 0.0
    return apart(qform, header.get_sform(), volume.data.shape) / spacing(header.get_sform()).min()


def resample_onto(volume: Volume, reference: Volume) -> NDArray[np.float32]:
    """Linear interpolation of a volume at the reference's voxels.

    Its border voxels reach half a voxel beyond their centres. Farther out there is its background: 0, or the value of
    its corners where it was standardised.
    """
    if find_spec("scipy") is None:
        raise CopeditError("--resample needs the package scipy, which is not installed; pip install scipy")
    import nibabel as nib
    from nibabel.processing import resample_from_to

    moving, shape = nib.Nifti1Image(volume.data, volume.affine), reference.data.shape
    data = np.asarray(resample_from_to(moving, (shape, reference.affine), order=1, mode="nearest").dataobj)
    with np.errstate(over="ignore", invalid="ignore"):
        nothing = Backdrop.of(volume.data, *np.percentile(volume.data, (0.5, 99.5))).fill
    to_voxels = np.linalg.inv(volume.affine) @ reference.affine
    for part in slabs(shape):
        grid = np.ogrid[: shape[0], : shape[1], slice(*part.indices(shape[2]))]
        for (*steps, start), count in zip(to_voxels[:3], volume.data.shape, strict=True):
            where = sum(step * along for step, along in zip(steps, grid, strict=True)) + start
            data[..., part][abs(where - (count - 1) / 2) > count / 2 + 1e-3] = nothing
    return data


def is_synthetic(path: Path) -> bool:
    """From the header's description; a file that cannot be read is refused later, when it is needed."""
    try:
        start = _peek(path)
    except CopeditError:
        return False
    return MARK.encode() in (start[148 : 148 + len(MARK)], start[240 : 240 + len(MARK)])


def refuse_synthetic(path: Path) -> None:
    if is_synthetic(path):
        raise _synthetic(path)


def _synthetic(path: Path) -> CopeditError:
    return CopeditError(f"{path} is marked as synthetic by CoPeDiT in its header; give the observed image instead")


def write_nifti(
    path: Path, data: NDArray, header: nib.Nifti1Header, description: str | None, *, scaled: bool = False
) -> str:
    """The array under this header, but for type and description; scaled: the header's slope applies to it.

    Returns the file's sha256. Written slice by slice, so that it takes little memory; atomic.
    """
    header = _header_for(data, header, description, scaled)
    stream = io.BytesIO()
    header.write_to(stream)
    stream.write(bytes(int(header.get_data_offset()) - stream.tell()))
    pieces = _pieces(stream.getvalue(), data, header.get_data_dtype())
    return write_atomically(path, _zipped(pieces) if path.name.lower().endswith(".gz") else pieces)


def as_image(data: NDArray, header: nib.Nifti1Header, description: str, *, scaled: bool = False) -> nib.Nifti1Image:
    """What `write_nifti` would write, as an image in memory. With the header's affine; scaled data as grey values."""
    import nibabel as nib

    header = _header_for(data, header, description, scaled)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    if scaled and header.get_slope_inter() not in ((None, None), (1, 0)):
        data = _scaled(data, header)
        header = _header_for(data, header, None, scaled=False)
    return kind(np.array(data), header.get_best_affine(), header)  # whoever changes it changes no study


def _header_for(data: NDArray, header: nib.Nifti1Header, description: str | None, scaled: bool) -> nib.Nifti1Header:
    """A header of a file that holds the array."""
    header = header.copy()
    header.set_data_shape(data.shape)
    header.set_data_dtype(data.dtype)
    if not scaled:
        header.set_slope_inter(1, 0)
    header["vox_offset"] = 0  # nibabel then puts the data right after the header and its extensions
    header["magic"] = header.single_magic
    _repair(header)  # so that every reader sees what we saw
    if description is not None:
        header["descrip"] = description.encode("ascii", "replace")[:79]
    return header


def _pieces(head: bytes, data: NDArray, dtype: np.dtype) -> Iterator[bytes]:
    yield head
    for k in range(data.shape[-1]):
        yield data[..., k].astype(dtype, copy=False).tobytes(order="F")


def _zipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """As one gzip member without a time: the same image gives the same file."""
    packer = deflate.compressobj(_LEVEL, wbits=31)
    yield from map(packer.compress, pieces)
    yield packer.flush()
