"""Data sets in their published layouts: what is found, whose it is, what is skipped and why, and training on them."""

import dataclasses
import gzip
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from copedit_rt import checkpoint, cli
from copedit_rt.config import ModelConfig, Preprocessing
from copedit_rt.errors import CopeditError
from copedit_rt.images import grids, nifti
from copedit_rt.images.nifti import Volume, read_volume
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.synthesizer import Synthesizer
from copedit_rt.trained import TrainedOn
from copedit_training.data import layouts, prepared
from copedit_training.stages import trainer
from tests.training.data.test_anatomy import made_up
from tests.training.stages.tiny import TINY

BRAIN = dataclasses.replace(
    TINY,
    name="brain",
    elements=("t1", "t1ce", "t2", "flair"),
    denoiser=dataclasses.replace(TINY.denoiser, patch=(1, 1, 1)),
    preprocessing=Preprocessing(field_of_view=(16.0, 16.0, 16.0)),
)
IXI = dataclasses.replace(BRAIN, name="ixi", elements=("t1", "t2", "pd"))
HEART = dataclasses.replace(
    BRAIN,
    name="heart",
    task="cardiac",
    elements=("slab0", "slab1", "slab2", "slab3"),
    image=(16, 16, 4),
    preprocessing=Preprocessing(field_of_view=(16.0, 16.0, None)),
)
COMMON = ("steps=2", "batch_size=2", "dtype=float32", "crop=8")
TOKENIZER = (*COMMON, "quantise_from=0", "pretext_every=1", "prompt_steps=0", "readout_steps=20")
DENOISER = (*COMMON, "image_weight=0", "compile=false", "optimizer=adam")


def save(path: Path, seed: int = 0, spacing: tuple = (1, 1, 2), shape: tuple = (12, 14, 11), data=None) -> Path:
    image = np.random.default_rng(seed).uniform(1, 200, shape) if data is None else data
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume.from_array(image, np.diag([*spacing, 1.0])).save(path)
    return path


def fill(root: Path, files: list[str], **options) -> Path:
    for number, file in enumerate(files):
        save(root / file, number, **options)
    return root


def brats(root: Path, count: int) -> Path:
    names = [f"BraTS2021_{i:05d}" for i in range(count)]
    return fill(root, [f"{name}/{name}_{m}.nii.gz" for name in names for m in ("flair", "seg", "t1", "t1ce", "t2")])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def kinds(items) -> dict[str, str]:
    return {item.study: item.kind for item in items}


# ---- what is found -----------------------------------------------------------------------------------------

UPENN, UCSF = ("UPENN-GBM-00001_11", "UPENN-GBM-00001_21"), ("UCSF-PDGM-0409", "UCSF-PDGM-0409_FU001d")  # two visits

# layout: model, files, {complete study: subject}, incomplete studies
PUBLISHED = {
    "BraTS": (
        BRAIN,
        [
            *[f"BraTS2021_00000/BraTS2021_00000_{m}.nii.gz" for m in ("flair", "seg", "t1", "t1ce", "t2")],
            *[f"BraTS20_Training_001/BraTS20_Training_001_{m}.nii" for m in ("flair", "seg", "t1", "t1ce", "t2")],
            *[f"BraTS2021_00002/BraTS2021_00002_{m}.nii.gz" for m in ("t1", "t1ce", "t2")],
        ],
        {"BraTS2021_00000": "BraTS/BraTS2021_00000", "BraTS20_Training_001": "BraTS/BraTS20_Training_001"},
        ["BraTS2021_00002"],
    ),
    "M&Ms-2": (
        HEART,
        [f"001/001_{view}_{phase}{gt}.nii.gz" for view in ("LA", "SA") for phase in ("ED", "ES") for gt in ("", "_gt")]
        + [f"001/001_{view}_CINE.nii.gz" for view in ("LA", "SA")],
        {"001_SA_ED": "M&Ms-2/001", "001_SA_ES": "M&Ms-2/001"},
        [],
    ),
    "UPENN-GBM": (
        BRAIN,
        [f"{n}/{n}_{m}.nii.gz" for n in UPENN for m in ("T1", "T1GD", "T2", "FLAIR")],
        dict.fromkeys(UPENN, "UPENN-GBM/UPENN-GBM-00001"),
        [],
    ),
    "UCSF-PDGM": (
        BRAIN,
        [f"{n}_nifti/{n}_{m}.nii.gz" for n in UCSF for m in ("T1", "T1c", "T2", "FLAIR")],
        dict.fromkeys(UCSF, "UCSF-PDGM/UCSF-PDGM-0409"),
        [],
    ),
    "BraTS, newer names": (
        BRAIN,
        [
            *[
                f"BraTS-GLI-00005-{v}/BraTS-GLI-00005-{v}-{m}.nii.gz"
                for v in ("000", "001")
                for m in "t1n t1c t2w t2f".split()
            ],
            "BraTS-GLI-00006-000/BraTS-GLI-00006-000-t1n.nii.gz",
            "BraTS-GLI-00005-000/BraTS-GLI-00005-000-seg.nii.gz",
        ],
        {"BraTS-GLI-00005-000": "BraTS/BraTS-GLI-00005", "BraTS-GLI-00005-001": "BraTS/BraTS-GLI-00005"},
        ["BraTS-GLI-00006-000"],
    ),
    "IXI": (
        IXI,
        [
            *[f"IXI-{m}/IXI002-Guys-0828-{m}.nii.gz" for m in ("T1", "T2", "PD", "MRA")],
            *[f"IXI-{m}/IXI012-HH-1211-{m}.nii.gz" for m in ("T1", "T2", "PD")],
            *[f"IXI-{m}/IXI580-IOP-1157-{m}.nii.gz" for m in ("T2", "PD")],
            "IXI-DTI/IXI002-Guys-0828-DTI-00.nii.gz",
        ],
        {"IXI002-Guys-0828": "IXI/IXI002", "IXI012-HH-1211": "IXI/IXI012"},
        ["IXI580-IOP-1157"],
    ),
    "BIDS": (
        IXI,
        [
            *[f"sub-01/ses-{s}/anat/sub-01_ses-{s}_{m}.nii.gz" for s in "ab" for m in ("T1w", "T2w", "PDw", "FLAIR")],
            *[f"other/sub-01/anat/sub-01_{m}.nii.gz" for m in ("T1w", "T2w", "PDw")],
            "sub-02/anat/sub-02_T1w.nii.gz",
            "sub-01/ses-a/dwi/sub-01_ses-a_dwi.nii.gz",
            "derivatives/sub-02/anat/sub-02_T2w.nii.gz",
        ],
        {"sub-01_ses-a": "sub-01", "sub-01_ses-b": "sub-01", "other/sub-01": "other/sub-01"},
        ["sub-02"],
    ),
    "ACDC": (
        HEART,
        [
            f"training/patient001/patient001_{n}.nii.gz"
            for n in ("frame01", "frame01_gt", "frame12", "frame12_gt", "4d")
        ],
        {"patient001_frame01": "ACDC/patient001", "patient001_frame12": "ACDC/patient001"},
        [],
    ),
    "MSCMR": (
        HEART,
        [f"c0t2lge/patient1_{m}{e}.nii.gz" for m in ("C0", "LGE", "T2") for e in ("", "_manual")],
        {f"patient1_{m}": "MSCMR/patient1" for m in ("C0", "LGE", "T2")},
        [],
    ),
    "UKBB": (
        HEART,
        [
            *[
                f"1000012/{n}.nii.gz"
                for n in ("sa", "sa_ED", "sa_ES", "label_sa_ED", "seg_sa_ES", "la_2ch", "la_4ch_ED", "ao")
            ],
            *[f"1000012_20209_3_0/{n}.nii.gz" for n in ("sa", "sa_ED")],
        ],
        {n: "UKBB/1000012" for n in ("1000012/sa_ED", "1000012/sa_ES", "1000012_20209_3_0/sa_ED")},
        [],
    ),
    "MESA": (
        HEART,
        ["MES0001401/MES0001401_ED.nii.gz", "MES0001401/MES0001401_ES.nii.gz", "MES0001502/sa_ED.nii.gz"],
        {
            "MES0001401_ED": "MESA/MES0001401",
            "MES0001401_ES": "MESA/MES0001401",
            "MES0001502/sa_ED": "MESA/MES0001502",
        },
        [],
    ),
    "Sunnybrook": (
        HEART,
        [f"SC-{n}_{e}{m}.nii.gz" for n in ("HF-I-09", "N-7") for e in ("ED", "ES") for m in ("", "_lv")],
        {f"SC-{n}_{e}": f"Sunnybrook/SC-{n}" for n in ("HF-I-09", "N-7") for e in ("ED", "ES")},
        [],
    ),
    "other brains": (
        IXI,
        ["a/s1/t1.nii.gz", "a/s1/t2.nii.gz", "a/s1/pd.nii.gz", "b/T1/7.nii.gz", "b/T2/7.nii.gz", "b/PD/7.nii.gz"],
        {"a/s1": "a/s1", "b/7": "b/7"},
        [],
    ),
    "other hearts": (
        HEART,
        ["x/001.nii.gz", "x/002_ED.nii.gz"],
        {"x/001": "x/001", "x/002_ED": "x/002"},
        [],
    ),
}


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_layouts(tmp_path, monkeypatch, layout):
    config, files, complete, incomplete = PUBLISHED[layout]
    root = fill(tmp_path / "in", files)
    (root / "Info.cfg").write_text("ED: 1\nES: 12\n")
    with monkeypatch.context() as patch:  # finding reads no voxels
        patch.setattr("copedit_rt.images.nifti._read_content", None)
        found = layouts.find(root, config)
    assert {entry.files.name: entry.subject for entry in found.studies} == complete
    assert kinds(found.skipped) == dict.fromkeys(incomplete, "incomplete")
    name = layout.split(",")[0]
    assert {entry.layout for entry in found.studies} == {"other" if name.startswith("other") else name}
    used = {path for entry in found.studies for path in entry.files.files.values()}
    masks = ("gt", "seg", "label", "manual", "_lv")
    assert not any(word in path.name for path in used for word in (*masks, "4d", "la_", "ao"))
    report = layouts.check(found, config)
    assert report["studies"] == len(complete)
    assert sum(report["subjects"].values()) == len(set(complete.values()))


def test_four_hearts_data_sets_side_by_side(tmp_path):
    for layout in ("ACDC", "MSCMR", "UKBB", "MESA"):
        fill(tmp_path / layout.lower(), PUBLISHED[layout][1])
    report = layouts.check(layouts.find(tmp_path, HEART), HEART)
    assert report["layouts"] == {"ACDC": 2, "MSCMR": 3, "UKBB": 3, "MESA": 3}
    assert report["images"] == {"sax": 11} and sum(report["subjects"].values()) == 5
    reasons = {reason: {Path(p).name for p in paths} for reason, paths in report["passed_over"].items()}
    assert {"patient001_4d.nii.gz", "sa.nii.gz"} in reasons.values()
    assert {"la_2ch.nii.gz", "la_4ch_ED.nii.gz", "ao.nii.gz"} in reasons.values()


# ---- what is wrong -----------------------------------------------------------------------------------------


def broken(root: Path) -> Path:
    """Eight brains, one of each kind of trouble but for two of them."""
    brats(root, 7)
    path = {i: root / f"BraTS2021_{i:05d}" / f"BraTS2021_{i:05d}_t2.nii.gz" for i in range(8)}
    path[1].unlink()
    truncate(path[2])
    nib.save(nib.Nifti1Image(np.ones((12, 14, 9, 2)), np.eye(4)), path[3])
    shutil.copytree(path[0].parent, root / "again" / "BraTS2021_00000")
    save(root / "BraTS2021_00004" / "BraTS2021_00004_T2.nii.gz")
    content = bytearray(path[5].read_bytes())
    content[-8] ^= 1  # the checksum
    path[5].write_bytes(content)
    save(root / "BraTS2021_00006" / "BraTS2021_00006_swi.nii.gz")
    shutil.copytree(path[0].parent, root / "BraTS2021_00007")
    for file in (root / "BraTS2021_00007").iterdir():
        file.rename(file.with_name(file.name.replace("00000", "00007")))
    return root


def test_every_trouble_is_named(tmp_path):
    found = layouts.find(broken(tmp_path), BRAIN)
    report = layouts.check(found, BRAIN)
    reasons = {item["study"]: (item["kind"], item["reason"]) for item in report["skipped"]}
    expected = {
        "BraTS2021_00001": ("incomplete", "t2 missing; t1, t1ce, flair found"),
        "BraTS2021_00002": ("damaged", "BraTS2021_00002_t2.nii.gz is a truncated or damaged gzip file"),
        "BraTS2021_00003": ("damaged", "holds 2 volumes"),
        "BraTS2021_00004": ("duplicate", "two files for t2"),
        "BraTS2021_00000": ("duplicate", "again"),
    }
    assert reasons.keys() == expected.keys()
    for study, (kind, words) in expected.items():
        assert reasons[study][0] == kind and words in reasons[study][1]
        assert "--t2" not in reasons[study][1], "an option of another command"
    assert report["studies"] == 4 and report["images"] == {"t1": 9, "t1ce": 9, "t2": 8, "flair": 9}
    assert any("unknown modality 'swi'" in reason for reason in report["passed_over"])
    deep = layouts.check(found, BRAIN, deep=True)
    more = {item["study"]: item["kind"] for item in deep["skipped"] if item not in report["skipped"]}
    assert more == {"BraTS2021_00005": "damaged", "BraTS2021_00007": "duplicate"}
    assert deep["studies"] == 2


def test_only_voxels_show_that_an_image_is_blank(tmp_path):
    stack = np.random.default_rng(0).uniform(1, 9, (12, 24, 9))
    save(tmp_path / "whole.nii.gz", data=stack)
    stack[..., 4] = 0
    save(tmp_path / "gap.nii.gz", data=stack)
    save(tmp_path / "constant.nii.gz", data=np.ones((12, 24, 9)))
    found = layouts.find(tmp_path, HEART)
    assert layouts.check(found, HEART)["studies"] == 3
    told = []
    report = layouts.check(found, HEART, deep=True, progress=lambda *step: told.append(step))
    assert told == [(done, 6) for done in range(1, 7)], "headers, then voxels"
    assert report["studies"] == 1
    assert {item["study"]: item["kind"] for item in report["skipped"]} == {"gap": "incomplete", "constant": "damaged"}
    assert "blank slices 4" in next(item["reason"] for item in report["skipped"] if item["study"] == "gap")


def test_the_size_at_the_end_of_a_gzip_file_is_a_hint_not_a_verdict(tmp_path):
    """Padding and several members are legal; then the content is read."""
    files = {m: save(tmp_path / f"A_{m}.nii.gz") for m in ("t1", "t2", "pd")}
    content = gzip.decompress(files["t1"].read_bytes())
    files["t1"].write_bytes(gzip.compress(content + bytes(100)))
    files["t2"].write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    assert layouts.check(layouts.find(tmp_path, IXI), IXI)["studies"] == 1


def test_the_command(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["train", "check-data", *map(str, arguments)])

    root = broken(tmp_path / "in")
    result = run("--data", root, "--preset", "brain-brats", "-o", tmp_path / "report.json")
    assert result.exit_code == 0
    assert "complete studies   BraTS 6" in result.stdout and "can be used        4 studies; subjects: " in result.stdout
    assert "truncated" in result.stdout and "passed over" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    train, test = (report["subjects"][side] for side in ("train", "test"))
    assert test and f"subjects: {train} to train on, {test} held out" in result.stdout
    assert report == json.loads(run("--data", root, "--preset", "brain-brats", "--json").stdout)
    nothing = run("--data", root, "--preset", "brain-ixi", "--json")
    assert nothing.exit_code == 1 and json.loads(nothing.stdout)["studies"] == 0
    assert run("--data", root, "--preset", "cardiac").exit_code == 1
    assert "is not a folder" in run("--data", tmp_path / "nowhere", "--preset", "cardiac").stderr


def test_of_a_remedy_what_the_command_can_do_stays():
    told = "A_x.nii.gz: it may be a T1; rename it to end in t1 or give it by --file t1=FILE; or with --task cardiac"
    assert layouts._without_options(told) == "A_x.nii.gz: it may be a T1; rename it to end in t1"


def test_remedies_are_of_the_command(tmp_path):
    (tmp_path / "maps").mkdir()
    maps, hearts, flat = made_up(tmp_path / "maps"), tmp_path / "hearts", tmp_path / "flat"
    shutil.copytree(maps / "synthseg", flat)
    for i in range(4):
        for name in (f"patient{i:03d}_frame01", f"patient{i:03d}_frame01_lv"):
            save(hearts / f"{name}.nii.gz", data=np.ones((4, 4, 4)))
    for folder, words in (
        (maps, f"one.nii.gz looks like a label map: give --data labels:{maps}"),
        (maps / "synthseg", f"give --data labels:{maps}"),
        (flat, f"one.nii.gz looks like a label map: move these into {flat}/synthseg and give --data labels:{flat}"),
        (hearts, "patient000_frame01.nii.gz: a heart by its name; patient000_frame01_lv.nii.gz: a label map or mask"),
    ):
        with pytest.raises(CopeditError) as refused:
            layouts.find(folder, BRAIN)
        assert words in str(refused.value) and "--file" not in str(refused.value)
        assert "--task" not in str(refused.value) and (folder != hearts) == ("labels:" in str(refused.value))


# ---- the two sides -----------------------------------------------------------------------------------------


def test_sides_are_disjoint_stable_and_about_80_to_20(tmp_path):
    subjects = [f"BraTS/BraTS2021_{i:05d}" for i in range(1251)]
    sides = layouts.split(subjects)
    assert sorted(sides["train"] + sides["test"]) == subjects and not set(sides["train"]) & set(sides["test"])
    assert 0.17 < len(sides["test"]) / len(subjects) < 0.23
    assert layouts.split(reversed(subjects)) == sides
    fewer = layouts.split(subjects[::2])
    assert set(fewer["test"]) == set(sides["test"]) & set(subjects[::2]), "others coming or going move nobody"
    counts = Counter(len(layouts.split([f"{i}{k}" for k in range(3)])["test"]) for i in range(200))
    assert set(counts) <= {1, 2} and layouts.split(["alone"])["train"] == ["alone"]


def test_the_file_decides_for_whom_it_names(tmp_path):
    path = tmp_path / "run" / "split.json"
    subjects = [f"s{i}" for i in range(40)]
    sides = layouts.split(subjects[:30], path)
    assert json.loads(path.read_text()) == sides
    moved = {"train": sides["test"], "test": sides["train"]}
    path.write_text(json.dumps(moved))
    after = layouts.split(subjects[10:], path)
    for name in ("train", "test"):
        assert set(moved[name]) & set(subjects[10:]) <= set(after[name]) <= set(json.loads(path.read_text())[name])
    assert set(json.loads(path.read_text())["train"]) >= set(moved["train"]), "who is away is remembered"
    path.write_text(json.dumps({"train": ["s1", "s2"], "test": ["s2"]}))
    with pytest.raises(CopeditError, match="s2 is on both sides"):
        layouts.split(subjects, path)
    path.write_text('{"train": [')
    with pytest.raises(CopeditError, match="is not a split"):
        layouts.split(subjects, path)


# ---- images ------------------------------------------------------------------------------------------------


def test_images_are_the_runtimes_and_frames_of_a_patient_stay_together(tmp_path):
    frames = [(i, f) for i in range(1, 13) for f in (1, 9)]
    root = fill(tmp_path / "in", [f"patient{i:03d}/patient{i:03d}_frame{f:02d}.nii.gz" for i, f in frames])
    found = layouts.find(root, HEART)
    images = prepared.folder_images(HEART, found, tmp_path / "run", say=lambda text: None)
    index = json.loads((tmp_path / "run" / "images.json").read_text())
    sides = json.loads((tmp_path / "run" / "split.json").read_text())
    assert images.dtype == np.float16 and images.shape == (len(index["studies"]), 4, 1, 16, 16, 4)
    assert len(images) == 2 * len(sides["train"]) and len(sides["train"] + sides["test"]) == 12
    assert Counter(row["subject"] for row in index["studies"]) == dict.fromkeys(sides["train"], 2)
    for row in (0, len(images) - 1):
        entry = next(e for e in found.studies if e.files.name == index["studies"][row]["study"])
        expected = prepare(Study.read(entry.files), HEART, allow_complete=True).images
        np.testing.assert_array_equal(images[row], expected.astype(np.float16))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("images.json", b'{"about": {"fol', "images.json: does not list images"),
        ("images.json", b"", "images.json: does not list images"),
        ("images.json", b"[1, 2]", "images.json: does not list images"),
        ("images.json", b"[" * 100_000, "images.json: does not list images"),
        ("images.json", b'{"studies": [{}], "about": 1}', "images.json: does not list images"),
        ("images.npy", b"half", "images.npy: not what a run keeps there"),
        ("images.npy", None, "images.npy: not the images that images.json lists"),
        ("split.json", b'{"train": [', "split.json is not a split"),
        ("split.json", b'[{"train": 1}]', "split.json is not a split"),
    ],
)
def test_what_a_run_keeps_halved_or_foreign(tmp_path, name, content, words):
    frames = [(i, f) for i in range(1, 5) for f in (1, 9)]
    root = fill(tmp_path / "in", [f"patient{i:03d}/patient{i:03d}_frame{f:02d}.nii.gz" for i, f in frames])
    prepared.folder_images(HEART, layouts.find(root, HEART), tmp_path / "run", say=lambda text: None)
    if content is None:
        np.save(tmp_path / "run" / name, np.zeros((2, 3), np.float16))
    else:
        (tmp_path / "run" / name).write_bytes(content)
    if name == "split.json":  # read again where images have to be prepared again
        (tmp_path / "run" / "images.json").unlink()
    with pytest.raises(CopeditError, match=words):
        prepared.folder_images(HEART, layouts.find(root, HEART), tmp_path / "run", say=lambda text: None)
    if name == "images.json":
        for read in (prepared.study_names, prepared.heart_centres):
            with pytest.raises(CopeditError, match=words):
                read(tmp_path / "run")


def test_a_quick_run_prepares_few_studies(tmp_path):
    frames = [(i, f) for i in range(1, 9) for f in (1, 9)]
    root = fill(tmp_path / "in", [f"patient{i:03d}/patient{i:03d}_frame{f:02d}.nii.gz" for i, f in frames])
    found = layouts.find(root, HEART)
    assert len(prepared.folder_images(HEART, found, tmp_path / "run", say=lambda text: None, most=3)) == 3
    assert len(prepared.folder_images(HEART, found, tmp_path / "run", say=lambda text: None)) > 3


def test_files_on_different_grids_are_resampled_as_the_runtime_does(tmp_path):
    for number in (2, 12):
        for m, spacing in (("T1", (1, 1, 2)), ("T2", (1, 1.2, 2)), ("PD", (1, 1.2, 2))):
            save(tmp_path / f"IXI-{m}" / f"IXI{number:03d}-HH-1211-{m}.nii.gz", number, spacing)
    found = layouts.find(tmp_path, IXI)
    assert layouts.check(found, IXI)["resampled"] == 2
    images = layouts.load(IXI, found.studies[0])
    t1, t2 = (read_volume(tmp_path / f"IXI-{m}" / f"IXI002-HH-1211-{m}.nii.gz") for m in ("T1", "T2"))
    moved = nifti.resample_onto(t2, t1)
    low, high = np.percentile(moved, (0.5, 99.5))
    frame = grids.Frame.of(t1.data.shape, t1.affine, grids.Orientation.to_ras(t1.affine), (16, 16, 8), (16, 16, 16))
    expected = frame.to_model(np.clip((moved - low) / (high - low), 0, 1).astype(np.float32) * (moved > 0))
    np.testing.assert_allclose(images[1, 0], expected, atol=1e-3)


def test_the_cache_is_used_again_and_damage_is_told_once(tmp_path):
    root, said = broken(tmp_path / "in"), []
    (tmp_path / "run").mkdir()
    names = [f"BraTS/BraTS2021_{i:05d}" for i in range(8)]
    (tmp_path / "run" / "split.json").write_text(json.dumps({"train": names, "test": []}))
    first = prepared.folder_images(BRAIN, layouts.find(root, BRAIN), tmp_path / "run", say=said.append)
    assert len(first) == 2
    assert sum("00002" in text for text in said) == sum("00005" in text for text in said) == 1
    assert any("1 incomplete studies are left out" in text for text in said)
    index = json.loads((tmp_path / "run" / "images.json").read_text())
    assert {item["study"]: item["kind"] for item in index["skipped"]} == {
        "BraTS2021_00000": "duplicate",
        "BraTS2021_00001": "incomplete",
        "BraTS2021_00002": "damaged",
        "BraTS2021_00003": "damaged",
        "BraTS2021_00004": "duplicate",
        "BraTS2021_00005": "damaged",
        "BraTS2021_00007": "duplicate",
    }
    said.clear()
    before = first.copy()
    brats(root, 12)
    again = prepared.folder_images(BRAIN, layouts.find(root, BRAIN), tmp_path / "run", say=said.append)
    assert not said and np.array_equal(before, again), "a resumed run sees what it saw"
    other = dataclasses.replace(BRAIN, preprocessing=Preprocessing(field_of_view=(14.0, 14.0, 16.0)))
    assert len(prepared.folder_images(other, layouts.find(root, other), tmp_path / "run", say=said.append)) >= 7


def test_who_is_watched_is_noted_and_leaves_half_of_the_held_out_subjects(tmp_path):
    found = layouts.find(brats(tmp_path / "in", 24), BRAIN)
    test = layouts.split(found.subjects, tmp_path / "split.json")["test"]
    assert len(test) > 3
    for most, count in ((1, 1), (16, len(test) // 2)):
        images = prepared.watched_images(BRAIN, found, tmp_path, most)
        assert prepared.watched(tmp_path) == set(test[:count])
        expected = [layouts.load(BRAIN, e) for e in found.studies if e.subject in test[:count]]
        assert np.array_equal(images, np.stack(expected))
    (tmp_path / "watched.json").write_text("{")
    with pytest.raises(CopeditError, match=r"watched\.json: does not list subjects"):
        prepared.watched(tmp_path)


def test_the_heart_lies_where_its_mask_does(tmp_path):
    mask = np.zeros((12, 14, 11), np.float32)
    mask[7:10, 3:6, 2:5] = 1
    save(tmp_path / "SC-N-1_ED_lv.nii.gz", data=mask)
    fill(tmp_path, ["SC-N-1_ED.nii.gz", "SC-N-2_ED.nii.gz"], shape=(12, 14, 11))
    first, second = layouts.find(tmp_path, HEART).studies
    # 12 x 14 voxels about the middle of 16 x 16
    assert layouts.heart_centre(HEART, first) == pytest.approx((8 + 2, 4 + 1))
    assert layouts.heart_centre(HEART, second) is None


@pytest.mark.parametrize(("damage", "words"), [("cropped", "on another grid than .*; resample"), ("damaged", "gzip")])
def test_a_heart_whose_mask_is_of_no_use_is_left_out(tmp_path, damage, words):
    root = fill(tmp_path / "in", [f"SC-N-{i}_ED.nii.gz" for i in range(1, 4)])
    mask = save(root / "SC-N-1_ED_lv.nii.gz", shape=(12, 14, 12 if damage == "cropped" else 11))
    if damage == "damaged":
        mask.write_bytes(mask.read_bytes()[:100])
    found = layouts.find(root, HEART)
    for deep in (False, True):
        (left_out,) = layouts.check(found, HEART, deep=deep)["skipped"]
        assert (left_out["study"], left_out["kind"]) == ("SC-N-1_ED", "damaged")
        assert re.search(rf"SC-N-1_ED_lv\.nii\.gz .*{words}", left_out["reason"])
    (tmp_path / "run").mkdir()
    sides = {"train": found.subjects, "test": []}
    (tmp_path / "run" / "split.json").write_text(json.dumps(sides))
    assert len(prepared.folder_images(HEART, found, tmp_path / "run", say=lambda text: None)) == 2


def test_too_much_damage_is_an_error_that_names_it_and_leaves_nothing(tmp_path):
    root = brats(tmp_path / "in", 10)
    for i in range(10):
        truncate(root / f"BraTS2021_{i:05d}" / f"BraTS2021_{i:05d}_flair.nii.gz")
    with pytest.raises(CopeditError, match=r"4 of the first \d+ studies are damaged \(BraTS2021_0000\d, .*check-data"):
        prepared.folder_images(BRAIN, layouts.find(root, BRAIN), tmp_path / "run", say=lambda text: None)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["split.json"]
    with pytest.raises(CopeditError, match="no complete study to train on"):
        prepared.folder_images(IXI, layouts.find(root, IXI), tmp_path / "other", say=lambda text: None)


def test_a_full_disk_is_said_before_it_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(CopeditError, match=r"only 0\.0 GiB are free"):
        prepared.folder_images(BRAIN, layouts.find(brats(tmp_path, 2), BRAIN), tmp_path / "run", say=lambda text: None)


@pytest.mark.parametrize("config", [BRAIN, HEART], ids=lambda c: c.task)
def test_both_stages_train_on_a_folder(tmp_path, config, capsys):
    if config is BRAIN:
        root = brats(tmp_path / "in", 4)
        truncate(root / "BraTS2021_00001" / "BraTS2021_00001_t1.nii.gz")
    else:
        root = fill(tmp_path / "in", [f"patient{i:03d}/patient{i:03d}_frame01.nii.gz" for i in range(1, 5)])
    preset = "demo-cardiac" if config is HEART else "demo-brain"
    options = {"preset": preset, "data": str(root), "config": config}
    vae = trainer.run("tokenizer", output=tmp_path / "a", overrides=TOKENIZER, **options)
    overrides = (*DENOISER, f"tokenizer={vae}")
    model = trainer.run("denoiser", output=tmp_path / "b", overrides=overrides, **options)
    assert (model / "denoiser.safetensors").exists()
    assert (tmp_path / "a" / "split.json").read_bytes() == (tmp_path / "b" / "split.json").read_bytes()
    for run in ("a", "b"):
        assert len((tmp_path / run / "log.jsonl").read_text().splitlines()) == 2
    assert (capsys.readouterr().err.count("is a truncated") == 2) == (config is BRAIN), "once a run"
    assert trainer.run("tokenizer", output=tmp_path / "a", overrides=TOKENIZER, resume=True, **options) == vae
    with pytest.raises(CopeditError, match="other settings"):
        trainer.run("tokenizer", "demo-brain", tmp_path / "a", str(tmp_path), TOKENIZER, True, config)


def test_a_model_of_its_prior_alone(tmp_path):
    root = fill(tmp_path / "in", [f"SC-N-{i}_ED.nii.gz" for i in range(1, 5)])
    with_prior = dataclasses.replace(HEART, denoiser=dataclasses.replace(HEART.denoiser, prior=True))
    vae = tmp_path / "a"
    checkpoint.save(vae, HEART, tokenizer=CoPeVAE(HEART.tokenizer, len(HEART.elements)))
    TrainedOn("simulated phantoms").save(vae)
    model = trainer.fit_prior_alone("heart-3mm", tmp_path / "b", str(root), str(vae), config=with_prior)
    study = Study.read(root / "SC-N-1_ED.nii.gz", missing_slices=[2, 3, 4])
    trained = TrainedOn.load(model)
    assert (trained.words, trained.perception) == ("3 studies of a data set (Sunnybrook)", "simulated phantoms")
    filled = checkpoint.load_prior(model, with_prior).fill_study(prepare(study, with_prior))
    expected = prepare(study, with_prior).restore(filled.images, stack=filled.stack)["sax"]
    for steps, off in ((None, 0), (1, 0.01)):
        made = Synthesizer.load(model, "cpu").synthesize(study, steps=steps).study.reference.data
        np.testing.assert_allclose(made, expected, atol=off)
    with pytest.raises(CopeditError, match="demo-brain: its models have no prior"):
        trainer.fit_prior_alone("demo-brain", tmp_path / "c", str(root), str(vae))
    with pytest.raises(CopeditError, match="tokenizer is not the one of preset heart-3mm"):
        trainer.fit_prior_alone("heart-3mm", tmp_path / "c", str(root), str(vae))


def test_real_studies_can_be_trained_on(real_data):
    brain = dataclasses.replace(ModelConfig.preset("demo-brain"), image=(48, 48, 16))
    report = layouts.check(layouts.find(real_data, brain), brain, deep=True)
    assert report["studies"] and not [item for item in report["skipped"] if item["kind"] == "damaged"]
    heart = dataclasses.replace(ModelConfig.preset("demo-cardiac"), image=(48, 48, 4))
    report = layouts.check(layouts.find(real_data, heart), heart, deep=True)
    assert report["studies"] and not [item for item in report["skipped"] if item["kind"] == "damaged"]
