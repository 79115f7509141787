"""NIfTI files as they come: read as nibabel reads them, and written so that nibabel reads what we wrote."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import nibabel as nib
import nibabel.testing
import numpy as np
import pytest
from commands import patch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images import nifti
from copedit_rt.images.nifti import Volume, read_outline, read_volume
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study, complete_sidecar

GRID = np.diag([4, 4, 5, 1.0])
DIM, UNITS, PIXDIM, SLOPE, CODES, SROWS = 40, 123, 76, 112, 252, 280  # offsets in a NIfTI-1 header


def image(shape=(8, 9, 6), seed=0):
    return np.random.default_rng(seed).uniform(1, 200, shape).astype(np.float32)


def save(path, data=None, affine=GRID):
    nifti = nib.Nifti1Image(image() if data is None else data, affine)
    nifti.set_qform(affine, 1)
    nifti.set_sform(affine, 1)
    nib.save(nifti, path)
    return path


def write(study, folder, **options):
    return study.with_synthetic({"t2": image(study.reference.data.shape, 1)}).write(folder, model="m", **options)


# ---- units and sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1), ("meter", 1e-3), ("micron", 1e3), ("unknown", 1)])
def test_units_are_honoured(tmp_path, unit, scale):
    affine = GRID.copy()
    affine[:3] *= scale
    path = save(tmp_path / "A_t1.nii", affine=affine)
    patch(path, UNITS, "B", {"unknown": 0, "meter": 1, "mm": 2, "micron": 3}[unit])
    study = Study.read(path)
    np.testing.assert_allclose(study.volumes["t1"].affine, GRID, rtol=1e-5)
    (out,) = write(study, tmp_path / "o")
    assert nib.load(out).header.get_xyzt_units()[0] == unit
    np.testing.assert_allclose(nib.load(out).affine, nib.load(path).affine)
    np.testing.assert_allclose(read_volume(out).affine, GRID, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "shape"),
    [(0.04, (600, 9, 6)), (51, (8, 9, 6)), (1e-6, (8, 9, 6)), (3e37, (8, 9, 6)), (1, (8, 9, 6)), (40, (30, 9, 6))],
)
def test_sizes_that_no_scan_has(tmp_path, size, shape):
    path = patch(save(tmp_path / "A_t1.nii", image(shape)), CODES, "<2h", 0, 1)
    patch(path, SROWS, "<12f", size, 0, 0, 0, 0, size, 0, 0, 0, 0, size, 0)
    with pytest.raises(CopeditError, match=r"A_t1.nii: voxels of .* are not those of a scan .*xyzt_units"):
        Study.read(path)


# ---- reading as nibabel does -------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [bytes(700), b"\x1f\x8b", b"trailing words"])
def test_bytes_after_the_gzip_stream(tmp_path, tail):
    path = save(tmp_path / "A_t1.nii.gz")
    path.write_bytes(path.read_bytes() + tail)
    np.testing.assert_array_equal(read_volume(path).data, image())


@pytest.mark.parametrize("read", [read_volume, read_outline])
def test_a_content_without_end_behind_a_small_header(tmp_path, read):
    """Refused after as much again as the header promises, or 1 MiB; a little more than promised is no matter."""
    content = save(tmp_path / "A_t1.nii").read_bytes()
    path = tmp_path / "A_t1.nii.gz"
    path.write_bytes(gzip.compress(content + bytes(1 << 19)))
    np.testing.assert_array_equal(read_volume(path).data, image())
    path.write_bytes(gzip.compress(content) + gzip.compress(bytes(1 << 24)))
    np.testing.assert_array_equal(read_volume(path).data, image())  # what follows the last member is never inflated
    path.write_bytes(gzip.compress(content + bytes(1 << 24)))
    with pytest.raises(CopeditError, match=r"A_t1.nii.gz holds far more than the voxels that its header promises"):
        read(path)


def test_several_gzip_members(tmp_path):
    content = save(tmp_path / "A_t1.nii").read_bytes()
    parts = [content[i : i + 300] for i in range(0, len(content), 300)]
    (tmp_path / "A_t1.nii.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    np.testing.assert_array_equal(read_volume(tmp_path / "A_t1.nii.gz").data, image())


def test_no_fourth_dimension(tmp_path):
    path = patch(save(tmp_path / "A_t1.nii"), DIM, "<5h", 4, 8, 9, 6, 0)
    np.testing.assert_array_equal(read_volume(path).data, image())
    (out,) = write(Study.read(path), tmp_path / "o")
    assert nib.load(out).shape == (8, 9, 6)


@pytest.mark.parametrize("codes", [(1, 0), (-3, 77), (1, 200), (9, 1)])
@pytest.mark.parametrize("qfac", [0, 3, -1])
def test_signs_and_codes(tmp_path, qfac, codes):
    path = patch(save(tmp_path / "A_t1.nii"), PIXDIM, "<f", qfac)
    patch(path, CODES, "<2h", *codes)
    study = Study.read(path)
    np.testing.assert_allclose(study.volumes["t1"].affine, nib.load(path).affine)
    (out,) = write(study, tmp_path / "o")
    np.testing.assert_allclose(nib.load(out).affine, nib.load(path).affine)
    assert {int(nib.load(out).header[f"{x}form_code"]) for x in "qs"} <= {0, 1}


@pytest.mark.parametrize("line_ends", [(0, 0, 0, 0), (10, 10, 26, 10)])
def test_nifti2_line_ends_are_set_right(tmp_path, line_ends):
    nib.save(nib.Nifti2Image(image(), GRID), tmp_path / "A_t1.nii")
    patch(tmp_path / "A_t1.nii", 8, "4b", *line_ends)
    (out,) = write(Study.read(tmp_path), tmp_path / "o")
    assert nib.load(out).header["eol_check"].tolist() == [13, 10, 26, 10]


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_a_pair_of_files_gives_single_ones(tmp_path, kind):
    pair = kind(image(), GRID)
    pair.set_sform(GRID, 3)
    nib.save(pair, tmp_path / "a.img")
    study = Study.of({"t1": Volume.from_image(nib.load(tmp_path / "a.img"), "t1")})
    (out,) = write(study, tmp_path / "o")
    made = nib.load(out)
    assert made.header["sform_code"] == 3 and made.header["sizeof_hdr"] == pair.header["sizeof_hdr"]
    np.testing.assert_array_equal(made.affine, GRID)
    np.testing.assert_array_equal(made.get_fdata(), image(seed=1))


@pytest.mark.parametrize("name", ["minc1_1_scale.mnc", "scaled+tlrc.HEAD"])
def test_images_of_any_format_mean_their_grey_values(name):
    loaded = nib.load(Path(nibabel.testing.data_path) / name)
    grey = loaded.get_fdata()
    grey = grey.reshape(grey.shape[:3])
    assert np.array_equal(Volume.from_image(loaded, "t1").data, grey.astype(np.float32)) and grey.any()


@pytest.mark.parametrize(("off", "said"), [(0.3, False), (10, True)])
def test_qform_and_sform_that_disagree(tmp_path, off, said):
    moved = GRID.copy()
    moved[0, 3] += off
    nifti = nib.Nifti1Image(image(), GRID)
    nifti.set_qform(moved, 1)
    nifti.set_sform(GRID, 1)
    nib.save(nifti, tmp_path / "A_t1.nii.gz")
    study = Study.read(tmp_path)
    assert [note for note in study.notes if "2.5 voxels apart; the sform is used" in note] == list(study.notes)
    assert bool(study.notes) == said
    np.testing.assert_array_equal(study.volumes["t1"].affine, GRID)


def test_a_background_of_nan_is_set_to_zero(tmp_path):
    data = np.full((8, 9, 6), np.nan, np.float32)
    data[2:6, 2:7, 1:5] = image((4, 5, 4))
    save(tmp_path / "A_t1.nii.gz", data)
    study = Study.read(tmp_path)
    np.testing.assert_array_equal(study.volumes["t1"].data, np.nan_to_num(data))
    assert "background of t1 is NaN and was set to 0" in study.notes[0]
    data[4, 4, 3] = np.nan  # inside the brain
    save(tmp_path / "A_t1.nii.gz", data)
    with pytest.raises(CopeditError, match="voxels of t1 are NaN or infinite"):
        Study.read(tmp_path)


@pytest.mark.parametrize(("off", "equal"), [(0.005, True), (0.3, True), (0.5, False)])
def test_grids_that_nearly_agree(tmp_path, off, equal):
    moved = GRID.copy()
    moved[1, 3] += off
    save(tmp_path / "A_t1.nii.gz")
    save(tmp_path / "A_t2.nii.gz", affine=moved)
    if not equal:
        with pytest.raises(CopeditError, match=r"different grids.*0.5 mm apart; use --resample"):
            Study.read(tmp_path)
        return
    study = Study.read(tmp_path)
    assert list(study.notes) == ["the grids of t2 and t1 are 0.3 mm apart, less than 0.1 voxels: equal"] * (off > 0.1)
    prepare(study, ModelConfig.preset("demo-brain"))


def test_resampling_without_scipy_says_what_is_missing(tmp_path, monkeypatch):
    save(tmp_path / "A_t1.nii.gz")
    save(tmp_path / "A_t2.nii.gz", image((8, 9, 7)))
    monkeypatch.setattr(nifti, "find_spec", lambda name: None)
    with pytest.raises(CopeditError, match="--resample needs the package scipy, which is not installed"):
        Study.read(tmp_path, resample=True)


def test_nothing_but_resampling_needs_scipy(tmp_path):
    save(tmp_path / "A_t1.nii.gz")
    code = """
import sys
sys.modules["scipy"] = None
from copedit_rt.config import ModelConfig
from copedit_rt.images.prepare import prepare
from copedit_rt.images.study import Study
prepared = prepare(Study.read(sys.argv[1]), ModelConfig.preset("demo-brain"))
prepared.restore(prepared.images)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


@pytest.mark.parametrize("packer", ["zlib", "isal.isal_zlib"])
def test_both_packers(tmp_path, monkeypatch, packer):
    if importlib.util.find_spec(packer.partition(".")[0]) is None:
        pytest.skip("isal is not installed")
    monkeypatch.setattr(nifti, "deflate", importlib.import_module(packer))
    monkeypatch.setattr(nifti, "_LEVEL", 2)
    Volume.from_array(image(), GRID).save(tmp_path / "A_t1.nii.gz")
    np.testing.assert_array_equal(nib.load(tmp_path / "A_t1.nii.gz").get_fdata(dtype=np.float32), image())
    np.testing.assert_array_equal(read_volume(tmp_path / "A_t1.nii.gz").data, image())
    content = bytearray((tmp_path / "A_t1.nii.gz").read_bytes())
    content[-6] ^= 0xFF
    (tmp_path / "A_t1.nii.gz").write_bytes(content)
    with pytest.raises(CopeditError, match="truncated or damaged gzip file"):
        read_volume(tmp_path / "A_t1.nii.gz")


# ---- writing -----------------------------------------------------------------------------------------------


def test_an_output_is_complete_with_the_sidecar_of_its_own_run(tmp_path, monkeypatch):
    study = Study.read(save(tmp_path / "A_t1.nii.gz"))
    (out,) = write(study, tmp_path / "o", std={"t2": image(seed=3)})
    sd, sidecar = out.with_name("A_t2_sd.nii.gz"), out.with_name("A_t2.json")
    assert complete_sidecar(out)
    for damaged in (sd, sidecar, out):
        kept = damaged.read_bytes()
        damaged.write_bytes(kept[:-3])
        assert not complete_sidecar(out)
        damaged.unlink()
        assert not complete_sidecar(out)
        damaged.write_bytes(kept)
    assert complete_sidecar(out)
    # A second run that dies between any two of its files leaves nothing that counts as done.
    other = study.with_synthetic({"t2": image(seed=7)})
    replace = os.replace
    for survived in (1, 2):
        left = iter([True] * survived)

        def dies(source, target, left=left):
            if not next(left, False):
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", dies)
        with pytest.raises(CopeditError):
            other.write(tmp_path / "o", model="m", std={"t2": image(seed=8)})
        assert not complete_sidecar(out)
    monkeypatch.undo()
    other.write(tmp_path / "o", model="m")
    assert complete_sidecar(out) and "sd" not in json.loads(sidecar.read_text())


@pytest.mark.parametrize(
    ("spoil", "stays"),
    [
        (lambda out, sd: None, False),
        (lambda out, sd: out.unlink(), False),
        (lambda out, sd: out.write_bytes(out.read_bytes()[:-9]), False),
        (lambda out, sd: sd.write_bytes(b"by hand"), True),
        (lambda out, sd: out.with_name("A_t2.json").write_text("[1]"), True),
        (lambda out, sd: out.with_name("A_t2.json").write_text('{"sd": {"note": "A_t2_sd.nii.gz"}}'), True),
    ],
)
def test_the_sd_map_of_an_image_that_is_replaced_goes(tmp_path, spoil, stays):
    """By the sidecar alone, whatever became of the image; what somebody changed stays."""
    study = Study.read(save(tmp_path / "A_t1.nii.gz"))
    (out,) = write(study, tmp_path / "o", std={"t2": image(seed=3)})
    sd = out.with_name("A_t2_sd.nii.gz")
    spoil(out, sd)
    write(study, tmp_path / "o")
    assert complete_sidecar(out) and sd.exists() == stays


def test_what_lies_there_is_not_read_to_be_replaced(tmp_path, monkeypatch):
    study = Study.read(save(tmp_path / "A_t1.nii.gz"))
    write(study, tmp_path / "o", std={"t2": image(seed=3)})
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"read {path}"))
    write(study, tmp_path / "o", std={"t2": image(seed=4)})


@pytest.mark.parametrize("slope", [1e-38, 3e38])
def test_a_scale_that_cannot_hold_the_filled_slices(tmp_path, slope):
    data = image((8, 9, 6))
    data[..., 3] = 0
    path = patch(save(tmp_path / "sax.nii", data), SLOPE, "<2f", slope, 0)
    try:
        study = Study.read(path)
        made = study.with_synthetic({"sax": np.full(data.shape, 60, np.float32)})
        (out,) = made.write(tmp_path / "o", model="m")
    except CopeditError as error:
        assert "sax.nii" in str(error)
    else:
        assert np.isfinite(nib.load(out).get_fdata(dtype=np.float32)).all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.integers(0, 351), st.integers(0, 255), min_size=1, max_size=8), st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_read_is_written_as_nibabel_reads_it(tmp_path, changes, two):
    kind = nib.Nifti2Image if two else nib.Nifti1Image
    content = bytearray(kind(image(), GRID).to_bytes())
    for offset, value in changes.items():
        content[offset] = value
    (tmp_path / "A_t1.nii").write_bytes(content)
    try:
        study = Study.read(tmp_path / "A_t1.nii")
        (out,) = write(study, tmp_path / "o")
    except CopeditError as error:
        assert "A_t1.nii" in str(error)
        return
    unit = {1: 1e3, 3: 1e-3}.get(int(study.reference.header["xyzt_units"]) & 7, 1)
    written = nib.load(out)
    expected = study.reference.affine / np.array([[unit]] * 3 + [[1]])
    np.testing.assert_allclose(written.affine, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert np.isfinite(written.get_fdata()).all()


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [("t1",), ("t1", "t2", "flair")])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_preparing_and_restoring_take_at_most_what_was_promised(tmp_path, there, dtype):
    shape = (160, 200, 170)
    data = image(shape).astype(dtype)
    data[:20] = data[:, -20:] = 0
    affine = np.diag([-1, 1, 1, 1.0])
    for name in there:
        nib.save(nib.Nifti1Image(data, affine), tmp_path / f"A_{name}.nii")
    config = ModelConfig.preset("brain-2mm")
    grid = np.random.default_rng(1).random((4, 1, *config.image), np.float32) * np.float32(0.8)
    tracemalloc.start()
    study = Study.read(tmp_path)
    reading = tracemalloc.get_traced_memory()[1] / data.size
    images = sum(v.data.nbytes for v in study.volumes.values()) / data.size
    tracemalloc.reset_peak()
    prepared = prepare(study, config)
    made = study.with_synthetic(prepared.restore(grid, detail=True, whole_range=True, bright=grid))
    made.write(tmp_path / "o", model="m")
    peak = tracemalloc.get_traced_memory()[1] / data.size
    tracemalloc.stop()
    print(f"bytes a voxel: reading {reading:.1f}, images {images:.1f}, beyond {peak - images:.1f}")
    assert reading < images + data.itemsize + 5
    assert peak - images < nifti.WORKING
