"""DICOM studies for tests, written with pydicom from phantoms: several series, upright and oblique, with localizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = "2.25.1234567"
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))
CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))


def tilted(axes: tuple[Any, Any] = AXIAL, x: float = 8.0, z: float = 5.0) -> tuple[Any, Any]:
    """Directions turned by angles in degrees about x, then z."""
    a, b = np.radians([x, z])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    row, column = (tuple(float(v) for v in about_z @ about_x @ np.array(axis)) for axis in axes)
    return row, column


def phantom(points: np.ndarray, seed: int) -> np.ndarray:
    """Grey values 0 to some 900 at points [..., 3] in mm: nested ellipsoids, of another contrast for each seed."""
    levels = np.random.default_rng(seed).uniform(150, 850, 4)
    value = np.zeros(points.shape[:-1])
    for scale, level in zip((1.0, 0.85, 0.5, 0.25), levels, strict=True):
        inside = (((points - (3, -4, 2)) / (np.array([24, 28, 22]) * scale)) ** 2).sum(-1) < 1
        value[inside] = level
    return value + np.where(value > 0, 20 * np.sin(points @ (0.7, 0.5, 0.9)), 0)


@dataclass
class Made:
    """What a series is made with. tags: further attributes, or others than by default; None takes one away."""

    description: str
    number: int
    axes: tuple[Any, Any] = AXIAL
    shape: tuple[int, int, int] = (36, 40, 12)  # columns, rows, slices
    size: tuple[float, float, float] = (1.5, 1.5, 4.0)  # mm between columns, rows, slices
    seed: int = 0
    tags: Mapping[str, Any] = field(default_factory=dict)
    study: str = "1"
    patient: str = "P1"
    shift: float = 0.0  # mm along the rows from one slice to the next, as of a tilted gantry


def images(made: Made) -> list[Any]:
    """The series' data sets in the order of their slices."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    row, column = map(np.array, made.axes)
    normal = np.cross(row, column)
    sizes, counts = np.array(made.size), np.array(made.shape)
    centre = np.array([2.0, -3.0, 5.0])
    corner = centre - ((counts - 1) / 2 * sizes) @ np.array([row, column, normal])
    sets = []
    for k in range(made.shape[2]):
        position = corner + k * sizes[2] * normal + k * made.shift * row
        i, j = np.meshgrid(np.arange(counts[0]), np.arange(counts[1]))
        points = position + i[..., None] * sizes[0] * row + j[..., None] * sizes[1] * column
        one = pydicom.Dataset()
        one.SpecificCharacterSet = "ISO_IR 100"
        one.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND"]
        one.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        one.SOPInstanceUID = f"{ROOT}.{made.study}.{made.number}.{k + 1}"
        one.StudyDate, one.StudyTime, one.AccessionNumber = "20200102", "101112", "A1"
        one.Modality, one.Manufacturer, one.ReferringPhysicianName = "MR", "Made up", "Doe^Jane"
        one.SeriesDescription, one.ProtocolName = made.description, made.description
        one.PatientName, one.PatientID = f"Roe^{made.patient}", made.patient
        one.PatientBirthDate, one.PatientSex = "19700101", "F"
        one.ScanningSequence, one.SequenceVariant, one.ScanOptions, one.MRAcquisitionType = "SE", "SK", "", "2D"
        one.SliceThickness, one.SpacingBetweenSlices = made.size[2], made.size[2]
        one.RepetitionTime, one.EchoTime, one.EchoTrainLength = 500, 10, 1
        one.MagneticFieldStrength, one.PatientPosition, one.BodyPartExamined = 3, "HFS", "HEAD"
        one.StudyInstanceUID = f"{ROOT}.{made.study}"
        one.SeriesInstanceUID = f"{ROOT}.{made.study}.{made.number}"
        one.StudyID, one.SeriesNumber, one.InstanceNumber = "1", made.number, k + 1
        one.ImagePositionPatient = [f"{v:.10g}" for v in position]
        one.ImageOrientationPatient = [f"{v:.12g}" for v in (*row, *column)]
        one.FrameOfReferenceUID, one.PositionReferenceIndicator = f"{ROOT}.{made.study}.0", ""
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.Columns, one.Rows = made.shape[:2]
        one.PixelSpacing = [made.size[1], made.size[0]]
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 12, 11, 0
        one.PixelData = phantom(points, made.seed).astype("<u2").tobytes()
        one["PixelData"].VR = "OW"
        for keyword, value in made.tags.items():
            if value is None:
                delattr(one, keyword)
            else:
                setattr(one, keyword, value)
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
        sets.append(one)
    return sets


def save(sets: list[Any], folder: Path) -> Path:
    """As scanners export: a folder a series, files without a suffix, not in the order of their slices."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, one in enumerate(reversed(sets)):
        one.save_as(folder / f"IM{n:05d}", enforce_file_format=True)
    return folder


def localizer() -> list[Any]:
    """Three planes in one series."""
    sets = []
    for n, axes in enumerate((AXIAL, SAGITTAL, CORONAL)):
        one = images(Made("localizer", 1, axes, (32, 32, 1)))[0]
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"{ROOT}.1.1.{n + 1}"
        sets.append(one)
    return sets


# A study as of a hospital: the T1 sagittal and isotropic, the others axial, oblique and thick. No T1 after contrast.
T1 = Made("t1_mprage_sag_p2_iso", 2, tilted(SAGITTAL, 3, -4), (40, 36, 34), (1.6, 1.6, 1.5), 1)
T2 = Made("t2_tse_tra_320_p2", 3, tilted(), seed=2, tags={"RepetitionTime": 5000, "EchoTime": 100})
FLUID = {"RepetitionTime": 9000, "EchoTime": 90, "InversionTime": 2500}
FLAIR = Made("t2_tirm_tra_dark-fluid", 4, tilted(), seed=3, tags=FLUID)
DIFFUSION = Made("ep2d_diff_3scan_trace_p2", 5, shape=(16, 16, 6), seed=4)
_MAP = {"ImageType": ["DERIVED", "PRIMARY", "ADC"]}
ADC = Made("ep2d_diff_3scan_trace_p2_ADC", 6, shape=(16, 16, 6), seed=4, tags=_MAP)


def study(folder: Path, *series: Made, **changed: Any) -> Path:
    """T1, T2 and FLAIR, with localizer, diffusion and ADC beside them; or these series alone. changed: of each."""
    if not series:
        save(localizer(), folder / "0001")
    for made in series or (T1, T2, FLAIR, DIFFUSION, ADC):
        one = copy.copy(made)
        for name, value in changed.items():
            setattr(one, name, value)
        save(images(one), folder / f"{one.number:04d}")
    return folder


def multi_frame(made: Made) -> Any:
    """The series as one Enhanced MR image, as newer scanners write it."""
    import pydicom
    from pydicom import Dataset

    sets = images(made)
    one = pydicom.Dataset(sets[0])
    one.file_meta = sets[0].file_meta
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    plane, measures, shared = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = one.ImageOrientationPatient
    measures.PixelSpacing, measures.SliceThickness = one.PixelSpacing, one.SliceThickness
    measures.SpacingBetweenSlices = one.SliceThickness
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [plane], [measures]
    one.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k, other in enumerate(sets):
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = other.ImagePositionPatient
        content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", k + 1, [1, k + 1]
        frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
        frames.append(frame)
    one.PerFrameFunctionalGroupsSequence, one.NumberOfFrames = frames, len(sets)
    for keyword in "ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness".split():
        delattr(one, keyword)
    del one.SpacingBetweenSlices
    one.PixelData = b"".join(other.PixelData for other in sets)
    return one
