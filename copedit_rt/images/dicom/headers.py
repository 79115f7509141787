"""What the headers of DICOM files say: read with pydicom, kept as plain values. No voxel is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from copedit_rt.errors import CopeditError
from copedit_rt.files import walk

MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # its header could be a bomb, and dcm2niix does not read it
_DIRECTORY = b"1.2.840.10008.1.3.10"  # of a disk: DICOMDIR, in capitals or not, with a version behind it or not
_SUFFIXES = (".dcm", ".ima")
_TAGS = (
    "SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID SyntheticData Modality SeriesDescription PatientID "
    "BodyPartExamined ContrastBolusAgent ScanningSequence RepetitionTime EchoTime InversionTime "
    "ProtocolName SequenceName DiffusionBValue StudyInstanceUID SeriesInstanceUID SeriesNumber "
    "ImagePositionPatient ImageOrientationPatient FrameOfReferenceUID NumberOfFrames Rows Columns PixelSpacing "
    "SliceThickness BitsAllocated SamplesPerPixel"
).split()


@dataclass(frozen=True)
class Header:
    """One file's. Times in ms, lengths in mm; None or empty where the file does not say.

    patient: what tells patients apart, never shown. position, orientation: of the image in LPS mm. size: bytes of the
    file. syntax: UID of the transfer syntax.
    """

    path: Path
    size: int
    syntax: str
    sop_class: str
    instance: str
    series: str
    study: str
    patient: str
    kind: str
    number: str
    description: str
    protocol: str
    sequence: str
    image_type: tuple[str, ...]
    scanning: tuple[str, ...]
    body_part: str
    contrast: bool
    synthetic: bool
    b_value: float | None
    echo_time: float | None
    repetition_time: float | None
    inversion_time: float | None
    frame_of_reference: str
    frames: int
    rows: int
    columns: int
    bytes_a_voxel: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness: float | None = None

    @property
    def is_mr(self) -> bool:
        return self.sop_class in (MR, ENHANCED_MR)

    @property
    def compressed(self) -> bool:
        return self.syntax not in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "")

    @property
    def voxel_bytes(self) -> int:
        """Of all voxels, uncompressed."""
        return self.rows * self.columns * self.frames * self.bytes_a_voxel


def need_extra(where: Path) -> None:
    """CopeditError where what reads DICOM is not installed."""
    if find_spec("pydicom") is None:
        raise CopeditError(f"{where} holds DICOM files, which need the extra: pip install 'copedit[dicom]'")


def dicom_files(folder: Path) -> Iterator[Path]:
    """The files below a folder, in order, that are DICOM files or cannot be read (`is_dicom`)."""
    for top, names in walk(folder):
        yield from (path for name in names if is_dicom(path := top / name))


def is_dicom(path: Path) -> bool:
    """Whether a file says so in its first bytes, or has the usual suffix; also of what cannot be read, as it may be
    one, such as a broken link."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block for ever
            return False
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return True
    if start[128:132] == b"DICM":
        return _DIRECTORY not in start
    return bool(start) and path.suffix.lower() in _SUFFIXES


def read_headers(paths: list[Path]) -> tuple[list[Header], list[tuple[Path, str]]]:
    """The headers of files, and those that cannot be read with the reason. Nothing of them is told or logged."""
    import pydicom

    headers, damaged = [], []
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")  # they would tell values
        for path in paths:
            try:
                headers.append(_read(path))
            except CopeditError as error:
                damaged.append((path, str(error)))
            except OSError as error:
                damaged.append((path, f"a file that cannot be read ({error.strerror or error})"))
            except Exception:  # whatever a parser makes of bytes that somebody else wrote
                damaged.append((path, "a damaged DICOM file"))
    return headers, damaged


def _read(path: Path) -> Header:
    import pydicom

    with open(path, "rb") as file:
        if _DEFLATED in file.read(2048):
            raise CopeditError("a deflated DICOM file (convert it, for example with dcmconv +te)")
    read = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=True)
    text, number, numbers = partial(_text, read), partial(_number, read), partial(_numbers, read)
    header = Header(
        path,
        path.stat().st_size,
        str(getattr(read.file_meta, "TransferSyntaxUID", "")),
        text("SOPClassUID"),
        text("SOPInstanceUID"),
        text("SeriesInstanceUID"),
        text("StudyInstanceUID"),
        patient=text("PatientID"),
        kind=text("Modality"),
        number=text("SeriesNumber"),
        description=text("SeriesDescription"),
        protocol=text("ProtocolName"),
        sequence=text("SequenceName"),
        image_type=tuple(text("ImageType").upper().split("\\")),
        scanning=tuple(text("ScanningSequence").upper().split("\\")),
        body_part=text("BodyPartExamined").upper(),
        contrast=text("ContrastBolusAgent").upper() not in ("", "NONE", "NO", "N"),
        synthetic=text("SyntheticData") == "YES",
        b_value=number("DiffusionBValue"),
        echo_time=number("EchoTime"),
        repetition_time=number("RepetitionTime"),
        inversion_time=number("InversionTime"),
        frame_of_reference=text("FrameOfReferenceUID"),
        frames=int(number("NumberOfFrames") or 1),
        rows=int(number("Rows") or 0),
        columns=int(number("Columns") or 0),
        bytes_a_voxel=int(number("BitsAllocated") or 16) // 8 * int(number("SamplesPerPixel") or 1),
        position=numbers("ImagePositionPatient", 3),
        orientation=numbers("ImageOrientationPatient", 6),
        spacing=numbers("PixelSpacing", 2),
        thickness=number("SliceThickness"),
    )
    _check(header)
    return header


def _check(header: Header) -> None:
    if not (header.sop_class and header.instance and header.series and header.study):
        raise CopeditError("a damaged DICOM file, or none: it does not say what it is and of which series and study")
    if header.is_mr and not (header.rows > 0 and header.columns > 0 and header.frames > 0):
        raise CopeditError("a damaged DICOM file: it has no rows and columns")
    if header.is_mr and not header.compressed and header.size < header.voxel_bytes:
        raise CopeditError("a truncated DICOM file")


def _text(read: Any, keyword: str) -> str:
    value = read.get(keyword)
    parts = value if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue" else [value]
    joined = "\\".join("" if part is None else str(part) for part in parts)
    return " ".join("".join(c if c.isprintable() else " " for c in joined).split())


def _numbers(read: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """So many finite numbers; None for anything else."""
    try:
        values = tuple(float(part) for part in _text(read, keyword).split("\\"))
    except ValueError:
        return None
    return values if len(values) == count and all(abs(value) < 1e9 for value in values) else None


def _number(read: Any, keyword: str) -> float | None:
    values = _numbers(read, keyword, 1)
    return values[0] if values else None
