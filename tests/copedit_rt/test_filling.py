"""Images in, images out, with tiny models whose weights are random."""

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import AFFINE, GRID, SHORT_AXIS, image, run, save, slices, study

import copedit_rt
from copedit_rt import CopeditError, Study, Volume, fill, filling
from copedit_rt.images.nifti import MARK, is_synthetic, read_volume, write_nifti
from copedit_rt.models import Models
from copedit_rt.synthesizer import Synthesizer

ROOT = Path(copedit_rt.__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*(outside the model's field of view|are blank and count as missing)")


def given(folder: Path) -> dict[str, Path]:
    return {e: folder / f"case_{e}.nii.gz" for e in ("t1", "t2", "flair")}


def test_files_give_what_the_command_gives(tmp_path, brain_model):
    files = given(study(tmp_path / "in"))
    options = [f"--{element}={path}" for element, path in files.items()]
    assert run("synth", *options, "-o", tmp_path / "out", "--model", brain_model, "--seed", 5).exit_code == 0
    made = fill(**files, model=brain_model, seed=5)
    assert list(made) == ["t1ce"]
    made["t1ce"].to_filename(tmp_path / "made.nii.gz")
    written = nib.load(tmp_path / "out" / "case_t1ce.nii.gz")
    again = nib.load(tmp_path / "made.nii.gz")
    assert np.array_equal(again.get_fdata(), written.get_fdata()) and np.array_equal(again.affine, written.affine)
    assert again.header == written.header and is_synthetic(tmp_path / "made.nii.gz")


def test_every_kind_of_image_gives_the_same(tmp_path, brain_model):
    files = given(study(tmp_path / "in"))
    loaded = {element: nib.load(path) for element, path in files.items()}
    arrays = {element: (shown.get_fdata(), shown.affine) for element, shown in loaded.items()}
    mixed = {"t1": arrays["t1"], "T2w": loaded["t2"], "flair": str(files["flair"])}
    made = [fill(**kind, name="x", model=brain_model)["t1ce"] for kind in (files, loaded, arrays, mixed)]
    for other in made[1:]:
        assert np.array_equal(other.get_fdata(), made[0].get_fdata()) and np.array_equal(other.affine, AFFINE)
        assert other.header["descrip"].item().startswith(MARK.encode())
    assert made[0].shape == GRID and np.array_equal(loaded["t1"].get_fdata(), arrays["t1"][0])
    assert not np.array_equal(fill(**files, name="y", model=brain_model)["t1ce"].get_fdata(), made[0].get_fdata())


def test_half_precision_means_its_grey_values(brain_model):
    half = image(0).astype(">f2")
    made = [fill(t1=(array, AFFINE), model=brain_model)["t2"].get_fdata() for array in (half, half.astype(np.float32))]
    assert np.array_equal(*made)


def test_scaled_integers_and_other_formats(tmp_path, brain_model):
    """A file with a slope, and FreeSurfer's format, mean the grey values that they stand for."""
    header = Volume.from_array(image(0), AFFINE).header
    header.set_slope_inter(0.5, 10)
    write_nifti(tmp_path / "t1.nii.gz", image(0).astype(np.int16), header, None, scaled=True)
    grey = image(0).astype(np.int16) * 0.5 + 10
    plain = (grey, AFFINE)
    mgh = nib.MGHImage(grey.astype(np.float32), AFFINE)
    made = [fill(t1=t1, name="x", model=brain_model) for t1 in (nib.load(tmp_path / "t1.nii.gz"), plain, mgh)]
    for other in made[1:]:
        assert np.array_equal(other["flair"].get_fdata(), made[0]["flair"].get_fdata())
        assert np.allclose(other["flair"].affine, AFFINE, atol=1e-4)


def test_samples_targets_and_progress(tmp_path, brain_model):
    heard = []
    options = {"target": ["FLAIR"], "samples": 2, "steps": 3}
    made = fill(t1=(image(0), AFFINE), model=brain_model, progress=lambda *step: heard.append(step), **options)
    assert list(fill(t1=(image(0), AFFINE), model=brain_model, target="t1ce,flair")) == ["t1ce", "flair"]
    assert list(made) == ["flair", "flair_sd"] and made["flair_sd"].get_fdata().max() > 0
    assert heard == [(2, 6), (4, 6), (6, 6)], "both samples at once"


def test_a_stack_keeps_its_slices(tmp_path, heart_model):
    stack = slices(16, 12).astype(np.int16)
    stack[..., 4] = 0
    header = Volume.from_array(stack, SHORT_AXIS).header
    header.set_slope_inter(2.0, 0)
    write_nifti(tmp_path / "heart.nii.gz", stack, header, None, scaled=True)
    made = fill(sax=nib.load(tmp_path / "heart.nii.gz"), name="x", model=heart_model, missing_slices=[5])
    there = [z for z in range(12) if z not in (4, 5)]
    filled = made["sax"].get_fdata()
    assert np.array_equal(filled[..., there], 2.0 * stack[..., there]) and np.ptp(filled[..., 4]) > 0
    read = Study.read(tmp_path / "heart.nii.gz", missing_slices=[5])
    read.name = "x"
    result = Synthesizer.load(heart_model).synthesize(read)
    (path,) = result.study.write(tmp_path / "out", model="x")
    assert np.array_equal(read_volume(path).data, filled.astype(np.float32))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({}, ["no image"]),
        ({"t1": image(0)}, ["t1", "(array, affine)"]),
        ({"swi": (image(0), AFFINE)}, ["swi", "t1ce"]),
        ({"t1": (image(0)[0], AFFINE)}, ["t1", "2-D"]),
        ({"t1": (np.full(GRID, 7.0), AFFINE)}, ["an image in memory", "every voxel of t1 is 7"]),
        ({"t1": (image(0), np.zeros((4, 4)))}, ["t1", "affine"]),
        ({"t1": (image(0), np.diag([900.0, 900, 900, 1]))}, ["t1", "mm"]),
        ({"t1": (image(0), AFFINE.T)}, ["t1", "transpose the affine"]),
        ({"t1": (image(0).astype(complex), AFFINE)}, ["t1", "complex"]),
        ({"t1": (image(0) > 0, AFFINE)}, ["t1 holds bool voxels", "convert it"]),
        ({"t1": (image(0), AFFINE), "T1w": (image(1), AFFINE)}, ["two images for t1"]),
        ({"t1": (image(0), AFFINE), "t2": (image(1)[:, :, 1:], AFFINE)}, ["different grids", "--resample"]),
        ({"sax": (slices(16, 8), SHORT_AXIS), "t1": (image(0), AFFINE)}, ["short-axis"]),
        ({"t1": "no/such.nii.gz"}, ["no/such.nii.gz"]),
        ({"t1": (image(0), AFFINE), "target": []}, ["names no modality"]),
        ({"t1": (image(0), AFFINE), "target": "flare"}, ["'flare'"]),
    ],
)
def test_what_cannot_be_filled_is_told_in_a_sentence(brain_model, images, words):
    with pytest.raises(CopeditError) as caught:
        fill(**images, model=brain_model)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_synthetic_images_are_refused(brain_model):
    made = fill(t1=(image(0), AFFINE), model=brain_model)
    with pytest.raises(CopeditError, match="marked as synthetic"):
        fill(t1=(image(0), AFFINE), t2=made["t2"], model=brain_model)


def test_notes_are_warnings(brain_model):
    shown = nib.Nifti1Image(image(0), AFFINE)
    shown.header["qform_code"] = shown.header["sform_code"] = 0
    near = AFFINE.copy()
    near[0, 3] += 0.05
    with pytest.warns(UserWarning, match="the grids of t2 and t1 are"):
        fill(t1=(image(0), AFFINE), t2=(image(1), near), model=brain_model)


def test_the_model_stays_loaded(brain_model, monkeypatch):
    filling._models.cache_clear()
    loads, load = [], Synthesizer.load
    monkeypatch.setattr(Synthesizer, "load", lambda *given, **more: loads.append(given) or load(*given, **more))
    for _ in range(2):
        fill(t1=(image(0), AFFINE), model=brain_model)
    assert len(loads) == 1


def test_threads_that_begin_at_once_load_a_model_once(brain_model, monkeypatch):
    filling._models.cache_clear()
    loads, load, begin = [], Synthesizer.load, Models.__init__
    slow = lambda call: lambda *given, **more: time.sleep(0.1) or call(*given, **more)  # noqa: E731
    monkeypatch.setattr(Models, "__init__", slow(begin))
    monkeypatch.setattr(Synthesizer, "load", slow(lambda *given, **more: loads.append(given) or load(*given, **more)))
    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(lambda _: fill(t1=(image(0), AFFINE), model=brain_model), range(3)))) == 3
    assert len(loads) == 1


def test_public_names_are_there_and_load_nothing_heavy():
    code = "import copedit_rt as c, sys; print(*sorted(set(c.__all__) - set(dir(c))), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr
    assert all(getattr(copedit_rt, name) is not None for name in copedit_rt.__all__)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_examples_of_the_pages_run(tmp_path, brain_model, heart_model, monkeypatch, page):
    """Every Python example of a page, one after another, in a folder that holds what it names."""
    study(tmp_path / "STUDY_FOLDER")
    for element in ("t1", "t2"):
        save(tmp_path / f"{element}.nii.gz", image(3))
    stack = slices(16, 12)
    stack[..., 4] = 0
    save(tmp_path / "stack.nii.gz", stack, SHORT_AXIS)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.+?)^```", text, re.M | re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        for model, tiny in (("brain-2mm", brain_model), ("heart-3mm", heart_model)):
            block = block.replace(f'"{model}"', repr(str(tiny)))
        exec(compile(block, page, "exec"), names)
    assert list(tmp_path.rglob("case_t1ce.nii.gz"))
