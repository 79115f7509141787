"""What was synthesised as a derived MR Image series of the study that it was made from.

By PS3.3, section A.4 (MR Image IOD), C.7.6.1 (General Image), C.12.1 (SOP Common: Synthetic Data, CP-1992) and CID 7005
(contributing equipment: 109100, DCM, Synthesizing Equipment). UIDs follow from the content, so that the same image has
the same UIDs and another one has others; for this, no date or time of making is written.
"""

from __future__ import annotations

import hashlib
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import copedit_rt
from copedit_rt.errors import CopeditError
from copedit_rt.files import new_folder, unwritable
from copedit_rt.images.dicom.headers import MR
from copedit_rt.images.dicom.match import SYNTHETIC
from copedit_rt.images.dicom.series import Series
from copedit_rt.images.dicom.studies import DicomStudy
from copedit_rt.images.names import MODALITIES, STYLES
from copedit_rt.schedule import drawn
from copedit_rt.task import STACK

if TYPE_CHECKING:
    from pydicom import Dataset

LPS = np.diag([-1.0, -1.0, 1.0])  # NIfTI's axes point right, anterior, superior; DICOM's left, posterior, superior
STEPS = 65535
_SOURCES = 0x00082112  # the tag of the Source Image Sequence
_SAME = 1e-3  # mm: a place that is as near to one of the source is that one, in its words
_IMPLEMENTATION = "2.25.156741429252609168188955388097473286541"
# Of the patient, the study, the frame of reference and the clinical trial: what is true of every image of the study.
_COPIED = (
    "SpecificCharacterSet TimezoneOffsetFromUTC "
    "PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientAge PatientSize PatientWeight "
    "OtherPatientIDs EthnicGroup PatientSpeciesDescription PatientSpeciesCodeSequence PatientBreedDescription "
    "PatientBreedCodeSequence BreedRegistrationSequence AnatomicalOrientationType ResponsiblePerson "
    "ResponsiblePersonRole ResponsibleOrganization "
    "PatientIdentityRemoved DeidentificationMethod DeidentificationMethodCodeSequence "
    "StudyInstanceUID StudyDate StudyTime StudyID StudyDescription AccessionNumber IssuerOfAccessionNumberSequence "
    "ReferringPhysicianName ProcedureCodeSequence "
    "ClinicalTrialSponsorName ClinicalTrialProtocolID ClinicalTrialProtocolName ClinicalTrialSiteID "
    "ClinicalTrialSiteName ClinicalTrialSubjectID ClinicalTrialSubjectReadingID ClinicalTrialTimePointID "
    "FrameOfReferenceUID PositionReferenceIndicator PatientPosition BodyPartExamined"
).split()
_PAIRED = {  # body parts of PS3.16, annex L, of which there is a left and a right one
    *"ANKLE ARM BREAST CLAVICLE EAR ELBOW EYE FEMUR FINGER FOOT FOREARM HAND HIP HUMERUS KIDNEY KNEE LEG".split(),
    *"ORBIT SCAPULA SHOULDER THIGH THUMB TOE WRIST LUNG CALF RADIUS ULNA TIBIA FIBULA PATELLA HEEL ZYGOMA".split(),
}


@dataclass(frozen=True)
class Made:
    """What is to be written.

    data [X, Y, Z], slices along Z, on the grid of `reference`, one of the study's modalities, whose affine is that from
    voxels to RAS mm. missing: slices of a stack along this axis, which were synthesised. record: how it was made;
    model: its name.
    """

    element: str
    data: NDArray
    affine: NDArray[np.float64]
    reference: str
    model: str
    record: Mapping[str, Any]
    missing: Sequence[int] = ()
    axis: int = 2

    def synthetic(self, k: int) -> bool:
        """Whether an image along the third axis is synthetic, at least in part."""
        return self.element != STACK or self.axis != 2 or k in self.missing


def write_series(folder: Path, study: DicomStudy, made: Made) -> dict[str, Any]:
    """A folder of one file a slice; it is there as a whole or not at all, and replaces an older one.

    Returns what a sidecar holds of it: number of `made.data` = value * step + low, which the header's slope of a heart
    makes a grey value. Raises CopeditError where the grid is none of DICOM's, or the folder cannot be written.
    """
    from pydicom import config

    values, low, step = stored(made.data)
    with warnings.catch_warnings(), config.disable_value_validation():  # what the source says is repeated as it is
        warnings.simplefilter("ignore")
        template = _template(study, made, values)
        places = _places(made, study.chosen[made.reference][0])
        sources, digest = _encoded(_sources(study)), hashlib.sha256()
        if folder.is_dir() and any(not re.fullmatch(r"\d{4,}\.dcm|\..*", path.name) for path in folder.iterdir()):
            raise CopeditError(f"{folder} is there and holds other files than a series; choose another folder with -o")
        try:
            with new_folder(folder, replace=True) as part:
                for k in range(values.shape[2]):
                    content = _file(_slice(template, made, values[..., k], k, places[k]), sources)
                    (part / f"{k + 1:04d}.dcm").write_bytes(content)
                    digest.update(content)
        except OSError as error:
            raise unwritable(folder, error) from error
    scale = {"low": low, "step": step}
    return {"folder": folder.name, "series": str(template.SeriesInstanceUID), "sha256": digest.hexdigest(), **scale}


def stored(data: NDArray) -> tuple[NDArray, float, float]:
    """16-bit numbers [X, Y, Z] for grey values, as an MR image has no rescale: (numbers, low, step).

    Whole numbers that fit are kept, low 0 and step 1; others are spread over all of 16 bits from 0, or the lowest.
    """
    data = np.asarray(data)
    lowest, highest = float(data.min()), float(data.max())
    if data.dtype.kind in "iu" and lowest >= -32768 and highest <= (65535 if lowest >= 0 else 32767):
        return data.astype(np.uint16 if lowest >= 0 else np.int16), 0.0, 1.0
    low = min(lowest, 0.0)
    step = (highest - low) / STEPS or 1.0
    return np.rint((data.astype(np.float64) - low) / step).astype(np.uint16), low, step


def _template(study: DicomStudy, made: Made, values: NDArray) -> Dataset:
    """What all slices share."""
    import pydicom
    from pydicom.datadict import dictionary_VR
    from pydicom.valuerep import CUSTOMIZABLE_CHARSET_VR

    reference = study.chosen[made.reference][0]
    source = pydicom.dcmread(reference.first.path, stop_before_pixels=True, force=True)
    image = pydicom.Dataset()
    for keyword in (keyword for keyword in _COPIED if keyword in source):
        raw, kind = source.get_item(keyword), dictionary_VR(keyword)
        if kind in CUSTOMIZABLE_CHARSET_VR:  # bytes, as text need not be of the character set that it is said to be of
            image[keyword] = pydicom.DataElement(keyword, kind, raw.value)
        else:
            image[keyword] = source[keyword]
    for keyword in "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID".split():
        _default(image, keyword)
    for keyword in "AccessionNumber ReferringPhysicianName PatientPosition PositionReferenceIndicator".split():
        _default(image, keyword)
    _default(image, "FrameOfReferenceUID", _uid(study, "frame of reference"))
    _default(image, "BodyPartExamined", "HEART" if made.element == STACK else "BRAIN")
    if reference.first.body_part in _PAIRED:
        sides = [source.get(keyword) for keyword in ("Laterality", "ImageLaterality")]
        image.Laterality = next((side for side in sides if side in ("R", "L")), "")  # an image's may be both, B
    _series(image, study, made, values)
    _equipment(image)
    _pixels(image, values)
    _lossy(image, study)
    return image


def _default(image: Dataset, keyword: str, value: str = "") -> None:
    if not image.get(keyword):
        setattr(image, keyword, value)


def _series(image: Dataset, study: DicomStudy, made: Made, values: NDArray) -> None:
    called = "Stack" if made.element == STACK else STYLES[0][made.element]
    how = drawn(made.record.get("sampler", {}))
    inputs = ", ".join(study.files())
    if made.element == STACK:
        along = f" along axis {made.axis} of the NIfTI image" * (made.axis != 2)  # not the slices of this series
        what = f"Slices {', '.join(map(str, made.missing))} (from 0{along}) of the stack synthesised from the others"
    else:
        what = f"{called} synthesised from {inputs}"
    image.SOPClassUID, image.Modality, image.ImageType = MR, "MR", ["DERIVED", "SECONDARY", "OTHER"]
    image.DerivationDescription = _ascii(f"{what} by CoPeDiT {copedit_rt.__version__}, {made.model}, {how}", 1024)
    content = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
    grid, number = made.affine.tobytes().hex(), str(_next_number(study) + [*MODALITIES, STACK].index(made.element))
    image.SeriesInstanceUID = _uid(study, made.element, content, grid, image.DerivationDescription, number)
    image.SeriesNumber = number
    image.SeriesDescription = _ascii(f"{called} synthetic, CoPeDiT {made.model}", 64)
    image.ImageComments = "Synthetic: computed, not measured. Research only; not for diagnosis."
    image.BurnedInAnnotation = "NO"
    image.ScanningSequence, image.SequenceVariant = "RM", "NONE"
    for keyword in "ScanOptions MRAcquisitionType RepetitionTime EchoTime EchoTrainLength AcquisitionNumber".split():
        setattr(image, keyword, None)


def _ascii(text: str, most: int) -> str:
    """What any character set of a source can hold, of so many letters."""
    return text.encode("ascii", "replace").decode()[:most]


def _next_number(study: DicomStudy) -> int:
    """A series number behind those that the scanner made."""
    series = [one for one, why in (*study.chosen.values(), *study.left_out) if why != SYNTHETIC]
    numbers = [int(one.first.number) for one in series if one.first.number.isdecimal()]
    return min(max([0, *numbers]), 2**30) + 1


def _equipment(image: Dataset) -> None:
    from pydicom import Dataset, Sequence

    purpose, item = Dataset(), Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "109100", "DCM"
    purpose.CodeMeaning = "Synthesizing Equipment"
    item.PurposeOfReferenceCodeSequence = Sequence([purpose])
    for equipment in (image, item):
        equipment.Manufacturer, equipment.ManufacturerModelName = "CoPeDiT", "CoPeDiT"
        equipment.SoftwareVersions = copedit_rt.__version__
    item.ContributionDescription = "Images synthesised by a neural network"
    image.ContributingEquipmentSequence = Sequence([item])


def _pixels(image: Dataset, values: NDArray) -> None:
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Columns, image.Rows = values.shape[:2]
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.PixelRepresentation = int(values.dtype.kind == "i")
    seen = values[values > values.min()]
    low, high = np.percentile(seen, [1, 99]) if seen.size else (0, 1)
    image.WindowCenter, image.WindowWidth = f"{(low + high) / 2:.1f}", f"{max(high - low, 1):.1f}"


def _lossy(image: Dataset, study: DicomStudy) -> None:
    """Once lossy, always lossy: of the first source that was."""
    import pydicom

    tags = ["LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"]
    for element in study.files():
        read = pydicom.dcmread(study.parts(element)[0], stop_before_pixels=True, specific_tags=tags, force=True)
        if read.get("LossyImageCompression") == "01":
            for keyword in tags:
                if keyword in read:
                    image[keyword] = read[keyword]
            return


def _sources(study: DicomStudy) -> Dataset:
    """All images that it was made from, as a part of a data set."""
    from pydicom import Dataset, Sequence

    items = []
    for header in (header for element in study.files() for header in study.chosen[element][0].headers):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.sop_class, header.instance
        items.append(item)
    part = Dataset()
    part.SourceImageSequence = Sequence(items)
    return part


def _uid(study: DicomStudy, *what: str) -> str:
    """A UID that follows from the study's series and this."""
    sources = [header.instance for element in study.files() for header in study.chosen[element][0].headers]
    digest = hashlib.sha256("\0".join([*sources, *what]).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=4).int}"


def _places(made: Made, reference: Series) -> list[dict[str, list[float]]]:
    """Position and directions of every slice. Raises CopeditError where the axes are not at right angles.

    A NIfTI image's rows run upwards and a DICOM image's downwards, so that the second axis is turned round. Where the
    source has a slice at the same place, its own numbers are repeated: float32 affines have about seven digits.
    """
    columns = LPS @ made.affine[:3, :3]
    size = np.linalg.norm(columns, axis=0)
    row, column = columns[:, 0] / size[0], -columns[:, 1] / size[1]
    axes = columns / size
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3:
        raise CopeditError(f"{made.element}: its axes are not at right angles, which DICOM cannot hold; use --no-dicom")
    places, there = [], np.array([header.position or (np.inf,) * 3 for header in reference.headers])
    for k in range(made.data.shape[2]):
        position = LPS @ (made.affine @ [0, made.data.shape[1] - 1, k, 1])[:3]
        here = {"position": position, "orientation": np.concatenate([row, column]), "spacing": size[[1, 0]]}
        header = reference.headers[int(np.argmin(np.abs(there - position).max(axis=1)))]
        theirs = {name: np.array(getattr(header, name) or np.inf) for name in here}
        if all(t.shape == here[n].shape and np.abs(t - here[n]).max() < _SAME for n, t in theirs.items()):
            here = theirs
        apart = float(f"{size[2]:.6g}")
        depth = {"thickness": [reference.first.thickness or apart], "apart": [apart]}
        places.append({name: [float(x) for x in value] for name, value in (here | depth).items()})
    return places


def _slice(template: Dataset, made: Made, values: NDArray, k: int, place: Mapping[str, list[float]]) -> Dataset:
    """One image but for its sources. values [X, Y]."""
    from pydicom import Dataset
    from pydicom.valuerep import DSfloat

    image = Dataset()
    image.update(template)
    image.SyntheticData = "YES" if made.synthetic(k) else "NO"
    image.SOPInstanceUID = f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'{template.SeriesInstanceUID}.{k}').int}"
    image.InstanceNumber = str(k + 1)

    def numbers(name: str) -> list[Any]:
        return [DSfloat(value, auto_format=True) for value in place[name]]

    image.ImagePositionPatient, image.ImageOrientationPatient = numbers("position"), numbers("orientation")
    image.PixelSpacing = numbers("spacing")
    image.SliceThickness, image.SpacingBetweenSlices = numbers("thickness")[0], numbers("apart")[0]
    image.PixelData = np.ascontiguousarray(values.T[::-1]).astype(values.dtype.newbyteorder("<")).tobytes()
    image["PixelData"].VR = "OW"
    return image


def _file(image: Dataset, sources: bytes) -> bytes:
    """A file's content. sources: the encoded sequence, hundreds of items that are the same in every file."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import UID, ExplicitVRLittleEndian

    head, meta = DicomBytesIO(), FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    meta.ImplementationClassUID, meta.ImplementationVersionName = UID(_IMPLEMENTATION), "COPEDIT"
    write_file_meta_info(head, meta)
    text = image.get("SpecificCharacterSet", "iso8859")
    before, after = _encoded(image[:_SOURCES], text), _encoded(image[_SOURCES + 1 :], text)
    return bytes(128) + b"DICM" + head.getvalue() + before + sources + after


def _encoded(part: Dataset, text: Any = "iso8859") -> bytes:
    """A part of a data set in explicit little-endian; text: its character set."""
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    stream = DicomBytesIO()
    stream.is_implicit_VR, stream.is_little_endian = False, True
    write_dataset(stream, part, text)
    return stream.getvalue()
