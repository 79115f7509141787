"""Studies on disk: which files belong together, what they hold, and how outputs are named and written.

`find_studies` looks at names and headers only; `StudyFiles.read` reads and checks one study; `Study.write`
writes what was synthesised. Every refusal is a CopeditError whose one sentence names the file and the remedy.
No torch.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from copedit_rt import geometry
from copedit_rt.errors import CopeditError
from copedit_rt.files import unwritable, write_atomically

Task = Literal["brain", "cardiac"]
MODALITIES = ("t1", "t1ce", "t2", "flair", "pd")  # also the order in which a study's files are taken
STACK = "sax"  # the one volume of a cardiac study
MARK = "synthetic, CoPeDiT"  # how the header's description of every output begins
_SERIES = "a series over time; its frames are used instead"

# What a modality may be called at the end of a name; the longest match counts ("t2_flair" before "flair").
_SPELLINGS = {
    "t1": r"t1[nw]?",
    "t1ce": r"t1w?[-_]?(?:ce|c|gd|post|contrast)",
    "t2": r"t2w?",
    "flair": r"(?:t2[-_])?flair|t2flair|t2f",
    "pd": r"pdw?",
}
_MODALITY = "|".join(f"(?P<{name}>{pattern})" for name, pattern in _SPELLINGS.items())
_AT_END = re.compile(rf"(?:^|(?<=[-_. ]))(?:{_MODALITY})$", re.I)
_INSIDE = re.compile(rf"(?:^|[-_. ])(?:{_MODALITY})(?=[-_. ])", re.I)
_OTHER = re.compile(
    r"(?:^|[-_. ])"
    r"(t1map|t2map|t1rho|t2star|t2s|inplanet2|swi|gre|qsm|dwi|dti|adc|bold|asl|cbf|mra|tof|stir|ct|pet)"
    r"(?:[-_. ]\d+)?$",
    re.I,
)
_LABELS = re.compile(
    r"(?:^|[-_. ])(?:gt|[dp]?seg|probseg|segmentation|(?:brain)?mask|lesions?|wmh|labels?|roi|manual)\d*$"
    r"|^(?:label|seg|mask)s?[-_. ]",
    re.I,
)
_FRAME = re.compile(r"[-_](?:frame\d+|E[DS])$", re.I)  # ACDC, UKBB: a stack at one moment of the heart's cycle
_OTHER_VIEW = re.compile(r"^(?:la(?:_\dch)?|ao|lvot)(?:_E[DS])?$", re.I)  # UKBB
_MSCMR = re.compile(r"^patient\d+_(?:C0|LGE|DE|T2)$", re.I)  # its T2 is a heart's
_BIDS = re.compile(r"^(?P<entities>sub-[^_]+(?:_[a-zA-Z0-9]+-[^_]+)*)_(?P<suffix>[a-zA-Z0-9]+)$")

# How data sets spell their modalities; outputs follow the first that agrees best with the inputs.
_STYLES = (
    {"t1": "t1", "t1ce": "t1ce", "t2": "t2", "flair": "flair", "pd": "pd"},  # BraTS to 2021
    {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "pd": "pdw"},  # BraTS from 2023
    {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR", "pd": "PD"},  # IXI
    {"t1": "T1", "t1ce": "T1GD", "t2": "T2", "flair": "FLAIR", "pd": "PD"},  # UPENN-GBM
    {"t1": "T1", "t1ce": "T1c", "t2": "T2", "flair": "FLAIR", "pd": "PD"},  # UCSF-PDGM
    {"t1": "T1w", "t1ce": "T1ce", "t2": "T2w", "flair": "FLAIR", "pd": "PDw"},
)


def modality(name: str) -> str:
    """The modality that a name stands for in any spelling, e.g. "T1Gd" -> "t1ce"; CopeditError if none."""
    match = _AT_END.fullmatch(name.strip())
    if not match:
        raise CopeditError(f"unknown modality {name!r}; known modalities are {', '.join(MODALITIES)}")
    return str(match.lastgroup)


# ---- volumes -----------------------------------------------------------------------------------------------


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
        _write_nifti(Path(path), self.data, self.header, description)

    @property
    def grid(self) -> str:
        """Shape and voxel size in words."""
        size = " x ".join(f"{s:.3g}" for s in geometry.spacing(self.affine))
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


# ---- names -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Naming:
    """How a study's files are named: head + spelling of the element, in subfolder of the output folder."""

    head: str
    spelling: Mapping[str, str]
    subfolder: Path = Path()

    def path(self, folder: Path, element: str, suffix: str = "", ending: str = ".nii.gz") -> Path:
        """Where an element's output goes below an output folder."""
        return Path(folder) / self.subfolder / f"{self.head}{self.spelling[element]}{suffix}{ending}"


@dataclass(frozen=True)
class _Name:
    """What one file's name says."""

    path: Path
    element: str
    head: str
    spelling: str
    folder: Path  # where the study's other files are looked for
    tail: str | None = None  # BIDS: entities after the contrast agent's


def _stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.I)


def without_frame(stem: str) -> str:
    """A stack's name without the moment of the heart's cycle: patient001_frame01 -> patient001, sa_ED -> sa."""
    return _FRAME.sub("", stem)


def _is_nifti(path: Path) -> bool:
    return bool(re.search(r"\.nii(\.gz)?$", path.name, re.I))


def _parse(path: Path) -> _Name | None:
    """The modality in a file's name, or in the name of its folder; None if there is none."""
    stem, parent = _stem(path), path.parent
    if bids := _BIDS.match(stem):
        match = _AT_END.fullmatch(bids["suffix"])
        if not match:
            return None
        entities = dict(part.split("-", 1) for part in bids["entities"].split("_"))
        element = "t1ce" if match.lastgroup == "t1" and "ce" in entities else str(match.lastgroup)
        head = "".join(f"{key}-{entities[key]}_" for key in ("sub", "ses") if key in entities)
        tail = f"space-{entities['space']}_" if "space" in entities else ""
        return _Name(path, element, head, bids["suffix"], parent, tail)
    by_folder = _AT_END.search(parent.name)
    if match := _AT_END.search(stem):
        # IXI: one folder a modality, side by side
        beside = by_folder is not None and by_folder.lastgroup == match.lastgroup
        folder = parent.parent if beside else parent
        return _Name(path, str(match.lastgroup), stem[: match.start()], match[0], folder)
    if by_folder and not _OTHER.search(stem) and not _INSIDE.search(stem):
        return _Name(path, str(by_folder.lastgroup), f"{stem}_", by_folder[0], parent.parent)
    return None


def _naming(names: Sequence[_Name], subfolder: Path) -> Naming:
    first = names[0]
    if first.tail is not None:  # BIDS
        tail = first.tail
        agent = next((m[1] for n in names if (m := re.search(r"_ce-([^_]+)", n.path.name))), "gadolinium")
        spelling = {"t1": "T1w", "t1ce": "T1w", "t2": "T2w", "flair": "FLAIR", "pd": "PDw"}
        spelling = {e: f"ce-{agent}_{tail}{s}" if e == "t1ce" else tail + s for e, s in spelling.items()}
        return Naming(first.head, spelling, subfolder)
    style = max(_STYLES, key=lambda style: sum(style[n.element] == n.spelling for n in names))
    return Naming(first.head, style, subfolder)


# ---- discovery ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyFiles:
    """One study that was found and not yet read; the first of its files is the reference."""

    name: str
    task: Task
    files: Mapping[str, Path]
    naming: Naming
    problem: str | None = None  # why read() will refuse it, e.g. two files for one modality

    def read(
        self,
        *,
        missing_slices: Sequence[int] | None = None,
        resample: bool = False,
        check_content: bool = True,
    ) -> Study:
        """Read and check every file.

        missing_slices: cardiac, indices from 0 along the slice axis, besides the blank ones that are found.
        resample: put files on other grids onto the first one's, instead of refusing them.
        check_content: False to look at an image that shows nothing (constant or NaN), instead of refusing it.
        """
        if self.problem:
            raise CopeditError(self.problem)
        volumes = {e: read_volume(path, keep_raw=self.task == "cardiac") for e, path in self.files.items()}
        study = Study(self.name, self.task, volumes, naming=self.naming)
        if self.task == "cardiac":
            _read_stack(study, missing_slices or (), check_content)
        elif missing_slices:
            raise CopeditError(f"{self.name} is a brain study; missing slices can be named for cardiac stacks only")
        else:
            _read_modalities(study, resample, check_content)
        study.notes += tuple(
            f"{v.path} has no orientation (qform and sform codes are 0); taken as {''.join(nib.aff2axcodes(v.affine))}"
            for v in volumes.values()
            if not (v.header["qform_code"] or v.header["sform_code"])
        )
        return study

    def outline(self) -> Study:
        """The study with zeros for voxels; CopeditError for what names, headers and file sizes give away."""
        if self.problem:
            raise CopeditError(self.problem)
        volumes = {e: read_outline(path) for e, path in self.files.items()}
        return Study(self.name, self.task, volumes, naming=self.naming)

    def outputs(self, folder: Path, elements: Sequence[str]) -> dict[str, Path]:
        """{missing element: file it would be written to}, of a model's elements; cardiac: the whole stack."""
        names = [STACK] if self.task == "cardiac" else [e for e in elements if e not in self.files]
        return {name: self.output_path(folder, name) for name in names}

    def output_path(self, folder: Path, element: str) -> Path:
        """Where an element's output goes; CopeditError if that is where an input lies."""
        return _output(self.naming, folder, element, list(self.files.values()))


class Found(list[StudyFiles]):
    """Studies, and the files that were passed over with the reason."""

    def __init__(self, studies: Sequence[StudyFiles] = (), skipped: Sequence[tuple[Path, str]] = ()) -> None:
        super().__init__(studies)
        self.skipped = list(skipped)


def find_studies(
    inputs: Sequence[Path | str] | Path | str = (),
    explicit: Mapping[str, Path | str] | None = None,
    *,
    task: Task | None = None,
) -> Found:
    """Which studies there are in folders and files, from names alone.

    inputs: files, study folders, folders of these; grouped by folder and subject. Recognised are the names of
    BraTS to 2021 (`ID_t1ce`) and from 2023 (`ID-t1c`), IXI (`IXI002-Guys-0828-T1`, also in three folders side
    by side) and BIDS; an image whose name ends in no modality is a cardiac stack, unless brain images lie
    beside it. Label maps, long-axis views, a stack over time beside its frames, hidden files and our own outputs are
    passed over (`.skipped`).
    explicit: instead of inputs, {modality: file}, or {"sax": file}: one study whose files may have any name.
    task: pass over the studies of the other task; "cardiac" also makes stacks of MSCMR's T2 images.
    Raises CopeditError where a path does not exist or no study is found.
    """
    inputs = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    if explicit:
        if inputs:
            raise CopeditError("give either input files and folders or one file per modality, not both")
        return Found([_explicit(explicit)])
    if not inputs:
        raise CopeditError("no input was given; name a study folder, a folder of studies, or NIfTI files")
    candidates: dict[Path, Path] = {}  # file -> the subfolder for its outputs
    skipped: list[tuple[Path, str]] = []
    named: set[Path] = set()
    roots = [Path(item) for item in inputs]
    several = sum(root.is_dir() for root in roots) > 1
    for root in roots:
        if root.is_dir():
            for path in _walk(root, skipped):
                candidates.setdefault(path, Path(root.resolve().name) if several else Path())
        elif not root.exists():
            raise CopeditError(f"{root} does not exist; give a NIfTI file or a folder of them")
        elif not _is_nifti(root):
            raise CopeditError(
                f"{root} is not a NIfTI file (.nii or .nii.gz); convert it, DICOM for example with dcm2niix"
            )
        else:
            candidates.setdefault(root, Path())
            named.add(root)
    images = []
    for path in candidates:
        if _LABELS.search(_stem(path)):
            skipped.append((path, "a label map or mask by its name"))
        elif path not in named and (reason := _not_observed(path)):
            skipped.append((path, reason))
        else:
            images.append(path)
    for path in named.intersection(images):
        _refuse_synthetic(path)
    studies = _group(images, roots, candidates, named, task, skipped)
    if not studies:
        where = ", ".join(map(str, roots))
        if not skipped:
            raise CopeditError(f"{where}: no images found; files must end in .nii or .nii.gz")
        few = "; ".join(f"{path.name}: {reason}" for path, reason in skipped[:3])
        few += "; ..." * (len(skipped) > 3)
        raise CopeditError(f"{where}: no images found to work on; passed over were {few}")
    return Found(studies, sorted(skipped))


def _walk(root: Path, skipped: list[tuple[Path, str]]) -> Iterator[Path]:
    try:
        paths = sorted(p for p in root.rglob("*") if _is_nifti(p))
    except OSError as error:
        raise CopeditError(f"cannot read {root}: {error.strerror or error}") from error
    for path in paths:
        parts = path.relative_to(root).parts
        if any(part.startswith(".") for part in parts) or path.is_dir():
            continue
        if not path.is_file():
            skipped.append((path, "a broken link"))
        elif "derivatives" in parts or "sourcedata" in parts:
            skipped.append((path, "not raw data (BIDS derivatives or sourcedata)"))
        else:
            yield path


def _not_observed(path: Path) -> str | None:
    if re.search(r"_4d$", _stem(path), re.I):
        return _SERIES
    if _OTHER_VIEW.search(_stem(path)):
        return "another view than the short axis by its name"
    if _is_synthetic(path):
        return "synthetic, written by CoPeDiT"
    return None


def _is_synthetic(path: Path) -> bool:
    """From the header's description; a file that cannot be read is refused later, when it is needed."""
    try:
        start = _peek(path)
    except CopeditError:
        return False
    return MARK.encode() in (start[148 : 148 + len(MARK)], start[240 : 240 + len(MARK)])


def _refuse_synthetic(path: Path) -> None:
    if _is_synthetic(path):
        raise CopeditError(f"{path} is marked as synthetic by CoPeDiT in its header; give the observed image instead")


def _group(
    images: Sequence[Path],
    roots: Sequence[Path],
    top: Mapping[Path, Path],
    named: set[Path],
    task: Task | None,
    skipped: list[tuple[Path, str]],
) -> list[StudyFiles]:
    known = ", ".join(MODALITIES)
    hearts = {path for path in images if task == "cardiac" and _MSCMR.search(_stem(path))}
    parsed = {path: None if path in hearts else _parse(path) for path in images}
    brain_folders = {n.folder for n in parsed.values() if n} | {p.parent for p, n in parsed.items() if n}
    groups: dict[tuple[Path, str, str | None], list[_Name]] = {}
    stacks = []
    for path, name in parsed.items():
        if name and task != "cardiac":
            groups.setdefault((name.folder, name.head, name.tail), []).append(name)
        elif task == "cardiac" and path in named:
            stacks.append(path)
        elif name:
            skipped.append((path, f"a brain image ({name.element}) by its name"))
        elif other := _OTHER.search(_stem(path)):
            skipped.append((path, f"unknown modality {other[1]!r}; known modalities are {known}"))
        elif (inside := _INSIDE.search(_stem(path))) and task != "cardiac":
            hint = f"rename it to end in {inside.lastgroup} or give it with --{inside.lastgroup}"
            skipped.append((path, f"its name does not end in its modality; {hint}"))
        elif task == "brain" or path.parent in brain_folders:
            skipped.append((path, f"its name ends in no known modality ({known})"))
        else:
            stacks.append(path)
    framed = {(p.parent, without_frame(_stem(p))) for p in stacks if _FRAME.search(_stem(p))}
    series = {p for p in stacks if (p.parent, _stem(p)) in framed and p not in named}
    skipped.extend((path, _SERIES) for path in series)
    stacks = [path for path in stacks if path not in series]
    studies = []
    for (folder, head, _), names in groups.items():
        names.sort(key=lambda n: MODALITIES.index(n.element))
        label = head.strip("-_. ") or folder.resolve().name
        studies.append((folder, _brain_study(label, names, _subfolder(folder, roots, top[names[0].path]))))
    for path in stacks:
        naming = Naming(_stem(path), {STACK: ""}, _subfolder(path.parent, roots, top[path]))
        studies.append((path.parent, StudyFiles(_stem(path), "cardiac", {STACK: path}, naming)))
    studies.sort(key=lambda item: (str(item[0]), item[1].name))
    labels, outputs = Counter(s.name for _, s in studies), Counter(_place(s) for _, s in studies)
    unique = []
    for folder, study in studies:
        if outputs[_place(study)] > 1:
            problem = f"{study.name}: another input would have the same output; give one at a time"
            study = replace(study, problem=study.problem or problem)
        if labels[study.name] > 1:
            study = replace(study, name=f"{folder.resolve().name}_{study.name}")
        unique.append(study)
    return unique


def _place(study: StudyFiles) -> tuple[Path, str]:
    return study.naming.subfolder, study.naming.head


def _subfolder(folder: Path, roots: Sequence[Path], top: Path) -> Path:
    """Outputs mirror the inputs' folders below the folder that was given."""
    for root in roots:
        if root.is_dir() and folder.is_relative_to(root):
            return top / folder.relative_to(root)
    return Path()


def _brain_study(label: str, names: Sequence[_Name], subfolder: Path) -> StudyFiles:
    problem = None
    files: dict[str, Path] = {}
    for name in names:
        if name.element in files:
            problem = (
                f"{label}: two files for {name.element}: {files[name.element]} and {name.path}; "
                f"remove one, or name every file with --t1 FILE, --t2 FILE and so on"
            )
        files.setdefault(name.element, name.path)
    return StudyFiles(label, "brain", files, _naming(names, subfolder), problem)


def _explicit(explicit: Mapping[str, Path | str]) -> StudyFiles:
    files: dict[str, Path] = {}
    for key, value in explicit.items():
        element, path = (STACK if key == STACK else modality(key)), Path(value)
        if not path.is_file():
            raise CopeditError(f"{path} does not exist; give the NIfTI file of {key}")
        if element in files:
            raise CopeditError(f"two files for {element}: {files[element]} and {path}; give one")
        files[element] = path
        _refuse_synthetic(path)
    if len({path.resolve() for path in files.values()}) < len(files):
        raise CopeditError(f"one file was given for several modalities: {', '.join(map(str, files.values()))}")
    first = next(iter(files.values()))
    if STACK in files:
        if len(files) > 1:
            raise CopeditError(
                f"{files[STACK]} was given as a cardiac stack beside brain modalities; give one or the other"
            )
        return StudyFiles(_stem(first), "cardiac", files, Naming(_stem(first), {STACK: ""}))
    names = [
        name
        if (name := _parse(path)) and name.element == element
        else _Name(path, element, f"{_stem(path)}_", element, path.parent)
        for element, path in files.items()
    ]
    label = names[0].head.strip("-_. ") or first.resolve().parent.name
    return StudyFiles(label, "brain", files, _naming(names, Path()))


# ---- studies -----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Study:
    """One subject's images.

    volumes: brain, {modality: volume}, outputs take the grid of the first; cardiac, {"sax": stack}.
    missing_slices: cardiac, indices along the file's slice axis (`geometry.slice_axis`).
    synthetic: names of the volumes that were synthesised (cardiac: in part).
    naming: how the files are called; None for a study that was not read. notes: what the user should know.
    """

    name: str
    task: Task
    volumes: dict[str, Volume]
    missing_slices: tuple[int, ...] = ()
    synthetic: frozenset[str] = frozenset()
    naming: Naming | None = None
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def read(
        cls,
        files: Mapping[str, Path | str] | Sequence[Path | str] | Path | str,
        *,
        missing_slices: Sequence[int] | None = None,
        resample: bool = False,
        check_content: bool = True,
    ) -> Study:
        """One study from a folder, file, files or {modality: file}; see `find_studies`, `StudyFiles.read`."""
        found = find_studies((), files) if isinstance(files, Mapping) else find_studies(files)
        if len(found) > 1:
            few = ", ".join(study.name for study in found[:3]) + ", ..." * (len(found) > 3)
            raise CopeditError(f"{files} holds {len(found)} studies ({few}); give one, or use find_studies")
        return found[0].read(missing_slices=missing_slices, resample=resample, check_content=check_content)

    @property
    def reference(self) -> Volume:
        return next(iter(self.volumes.values()))

    def with_synthetic(self, images: Mapping[str, NDArray]) -> Study:
        """A new study with these volumes [X, Y, Z] added, on the reference's grid (cardiac: replacing it)."""
        volumes = dict(self.volumes)
        for name, data in images.items():
            old = volumes.get(name)
            volumes[name] = replace(
                self.reference,
                data=np.asarray(data, np.float32),
                path=old.path if old else None,
                sha256=old.sha256 if old else None,
                raw=old.raw if old else None,
            )
        return replace(self, volumes=volumes, synthetic=self.synthetic | set(images))

    def output_path(self, folder: Path, element: str) -> Path:
        """Where an element's output goes; CopeditError if that is where an input lies."""
        inputs = [volume.path for volume in self.volumes.values() if volume.path]
        return _output(self._naming, folder, element, inputs)

    @property
    def _naming(self) -> Naming:
        if self.naming:
            return self.naming
        return Naming(f"{self.name}_", _STYLES[0]) if self.task == "brain" else Naming(self.name, {STACK: ""})

    def write(
        self,
        folder: Path,
        *,
        model: str,
        record: Mapping[str, Any] | None = None,
        std: Mapping[str, NDArray] | None = None,
    ) -> list[Path]:
        """Write what was synthesised as .nii.gz with a .json sidecar (`record`); atomic, images last.

        std: {element: [X, Y, Z]}, written as float32 beside it (`..._sd.nii.gz`). Headers are the reference's
        but for data type and description. A cardiac stack keeps its type, scaling and every number of its
        present slices. Existing files are replaced, inputs never. Returns the images' paths.
        """
        header, written = self.reference.header, []
        for element in (name for name in self.volumes if name in self.synthetic):
            path = self.output_path(folder, element)
            sidecar = {
                "synthetic": True,
                "element": element,
                "file": path.name,
                "model": model,
                **({"synthetic_slices": list(self.missing_slices)} if self.task == "cardiac" else {}),
                **(record or {}),
            }
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(path.parent, error) from error
            text = json.dumps(sidecar, indent=2, default=_plain) + "\n"
            write_atomically(self._naming.path(folder, element, ending=".json"), text.encode())
            if std and element in std:
                sd_header = header.copy()
                sd_header["cal_min"] = sd_header["cal_max"] = 0  # they are an image's display range
                spread = np.asarray(std[element], np.float32)
                sd_path = self._naming.path(folder, element, "_sd")
                _write_nifti(sd_path, spread, sd_header, f"{MARK} {model}, SD map")
            if self.task == "cardiac" and self.volumes[element].raw is not None:
                _write_nifti(path, self._raw_stack(), header, f"{MARK} {model}", scaled=True)
            else:
                _write_nifti(path, self.volumes[element].data, header, f"{MARK} {model}")
            written.append(path)
        return written

    def _raw_stack(self) -> NDArray:
        """The file's own numbers with the missing slices put in, rounded where the type is an integer."""
        volume = self.volumes[STACK]
        raw = np.array(volume.raw)
        where: list[Any] = [slice(None)] * 3
        where[geometry.slice_axis(raw.shape, volume.affine)] = list(self.missing_slices)
        slope, inter = volume.header.get_slope_inter()
        values = (volume.data[tuple(where)].astype(np.float64) - (inter or 0)) / (slope or 1)
        if raw.dtype.kind in "iu":
            limits = np.iinfo(raw.dtype)
            values = np.rint(values).clip(limits.min, limits.max)
        raw[tuple(where)] = values
        return raw


def _read_modalities(study: Study, resample: bool, check_content: bool) -> None:
    reference, (first, *others) = study.reference, study.volumes
    if check_content:
        for name, volume in study.volumes.items():
            if bad := volume.data.size - int(np.isfinite(volume.data).sum()):
                raise CopeditError(f"{volume.path}: {bad} voxels of {name} are NaN or infinite; set them to 0")
            if volume.data.min() == volume.data.max():
                raise CopeditError(
                    f"{volume.path}: every voxel of {name} is {volume.data.flat[0]:g}, so it shows nothing; "
                    f"leave it out to have it synthesised"
                )
    differing = [name for name in others if not geometry.same_grid(study.volumes[name], reference)]
    if differing and not resample:
        grids = "; ".join(f"{name} ({study.volumes[name].path}): {study.volumes[name].grid}" for name in differing)
        raise CopeditError(
            f"{study.name}: the files are on different grids, {first} ({reference.path}): {reference.grid}; "
            f"{grids}{_offset(reference, study.volumes[differing[0]])}; use --resample to bring all onto the "
            f"grid of {first}"
        )
    for name in differing:
        volume = study.volumes[name]
        data = geometry.resample_onto(volume, reference)
        if check_content and not data.any():
            raise CopeditError(
                f"{study.name}: {name} ({volume.path}) does not overlap with {first} "
                f"({reference.path}) in space; check that both are of the same patient and registered"
            )
        study.volumes[name] = replace(volume, data=data, affine=reference.affine)
        study.notes += (f"{name} was resampled from {volume.grid} onto the grid of {first}",)


def _offset(a: Volume, b: Volume) -> str:
    """For grids of one shape and voxel size: how far apart they are."""
    if a.grid != b.grid:
        return ""
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners[:, :3] *= np.array(a.data.shape) - 1
    return f", {np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max():.3g} mm apart"


def _read_stack(study: Study, missing_slices: Sequence[int], check_content: bool) -> None:
    volume = study.volumes[STACK]
    axis = geometry.slice_axis(volume.data.shape, volume.affine)
    count = volume.data.shape[axis]
    if wrong := [index for index in missing_slices if not 0 <= index < count]:
        raise CopeditError(
            f"{volume.path} has no slice {wrong[0]}; it has {count} slices, counted from 0 to {count - 1}"
        )
    blank = blank_slices(volume.data, axis)
    missing = sorted({*map(int, missing_slices), *blank})
    study.missing_slices = tuple(missing)
    if blank:
        study.notes += (f"slices {', '.join(map(str, blank))} are blank and count as missing",)
    if not check_content:
        return
    if len(missing) == count:
        why = "blank (one value, or NaN)" if len(blank) == count else "blank or named as missing"
        raise CopeditError(f"{volume.path}: all {count} slices are {why}, so nothing is observed; give another file")
    slices = np.moveaxis(volume.data, axis, 0)
    bad = [index for index in range(count) if index not in missing and not np.isfinite(slices[index]).all()]
    if bad:
        raise CopeditError(
            f"{volume.path}: slice {bad[0]} holds NaN or infinite voxels; set them to 0, or the whole "
            f"slice to NaN if it is missing"
        )


def blank_slices(data: NDArray, axis: int) -> tuple[int, ...]:
    """Indices of the slices along an axis that hold one value only, or only NaN."""
    slices = np.moveaxis(data, axis, 0).reshape(data.shape[axis], -1)
    return tuple(i for i, s in enumerate(slices) if np.isnan(s).all() or s.min() == s.max())


# ---- writing -----------------------------------------------------------------------------------------------


def _output(naming: Naming, folder: Path, element: str, inputs: Sequence[Path]) -> Path:
    path = naming.path(folder, element)
    if path.resolve() in {p.resolve() for p in inputs}:
        raise CopeditError(f"the output {path} would replace an input; choose another output folder with -o")
    return path


def _write_nifti(
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


def _plain(value: Any) -> Any:
    """What JSON does not know by itself."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)
