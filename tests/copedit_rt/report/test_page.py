"""The page of a study: what it holds, and how a real browser shows it without a network."""

import base64
import gzip
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from commands import AFFINE, SHORT_AXIS, image, run, save, slices, study
from PIL import Image

from copedit_rt.errors import CopeditError
from copedit_rt.report import page
from copedit_rt.report.page import LARGEST, Panel, pack

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def volumes(text: str) -> list[dict[str, str]]:
    return json.loads(re.search(r'id="volumes">(.+?)</script>', text)[1])


def unpacked(content: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(content)))


def test_a_page_and_an_index(tmp_path, brain_model):
    home = tmp_path / "Jane Doe"
    for name in ("a", "b"):
        study(home / name, name)
    (home / "b" / "b_t2.nii.gz").write_bytes(b"")
    command = ["synth", home, "-o", tmp_path / "out", "--model", brain_model, "--samples", 2]
    result = run(*command, "--report")
    assert f"a: page written: {tmp_path / 'out' / 'a' / 'a_report.html'}" in result.stdout
    text = (tmp_path / "out" / "a" / "a_report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST and "BSD 2-Clause License" in text
    assert text.count('<figure class="synthetic"') == 2 and text.count('<figure class="observed"') == 3
    for words in ("never diagnose", "P(number of elements missing)", "2 steps of ddim, 2 samples, seed 0", "no card"):
        assert words in text
    assert "outside the model&#x27;s field of view" in text and str(tmp_path) not in text
    assert "<noscript>" in text and 'role="img" aria-label="t1, observed"' in text and "<th></th>" not in text
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", re.sub(r"<script>.+?</script>", "", text, flags=re.S))
    t1, *_, t1ce, spread = (unpacked(volume["content"]) for volume in volumes(text))
    made = nib.load(tmp_path / "out" / "a" / "a_t1ce.nii.gz").get_fdata()
    assert t1.get_data_dtype() == np.uint8 and np.array_equal(t1.affine, AFFINE)
    assert np.corrcoef(np.asarray(t1ce.dataobj).ravel(), made.ravel())[0, 1] > 0.98
    assert np.asarray(spread.dataobj).max() == 255 and volumes(text)[-1]["colormap"] == "hot"
    overview = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert 'href="a/a_report.html"' in overview and "b_t2.nii.gz is an empty file" in overview
    assert "niivue" not in overview and str(tmp_path) not in overview and "Doe" not in overview
    assert "<h1>2 studies, 1 filled in by CoPeDiT</h1>" in overview
    assert "<td>written</td><td>t1ce</td><td>tiny-brain</td>" in overview
    assert "<td>failed</td><td></td><td>tiny-brain</td>" in overview, "nothing was made of it"
    before = run(*command, "--report")
    assert f"a: page kept: {tmp_path / 'out' / 'a' / 'a_report.html'}" in before.stdout
    again = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert 'href="a/a_report.html"' in again, "a repeat keeps the links"
    seconds = re.compile(r"<td>(\d+\.\d)</td>")
    assert seconds.search(again).group(1) == seconds.search(overview).group(1) != "0.0", "and how long it took"
    (tmp_path / "out" / "a" / "a_report.html").unlink()
    assert "a: nothing was made, so no page was written; --overwrite makes both" in run(*command, "--report").stderr


def test_a_page_that_could_not_be_written_is_not_linked(tmp_path, brain_model, monkeypatch):
    def write(result, model, path):
        raise CopeditError(f"cannot write {path}")

    monkeypatch.setattr(page, "write", write)
    for name in ("a", "b"):
        study(tmp_path / "in" / name, name)
    assert run("synth", tmp_path / "in", "-o", tmp_path, "--model", brain_model, "--report").exit_code == 1
    overview = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "href" not in overview and "cannot write a/a_report.html" in overview


def test_every_cell_of_an_index_is_text(tmp_path):
    odd = "<b>&"
    entry = {"study": odd, "status": "kept", "outputs": {odd: ""}, "model_name": odd, "remark": odd, "report": odd}
    page.index([entry], tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert odd not in text and text.count("&lt;b&gt;&amp;") == 4


def test_an_entry_of_an_older_version_says_why_it_failed(tmp_path):
    entry = {"study": "a", "status": "failed", "model": "/data/x/tiny", "error": "/data/x/a_t1.nii.gz is empty"}
    page.index([entry], tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<td>tiny</td>" in text and "<td>a_t1.nii.gz is empty</td>" in text and "/data" not in text


def test_one_slice_among_hundreds_shows_how_samples_vary():
    """More than 99.5 of 100 voxels are 0: the window ended at 1, or at what is next to nothing."""
    std = np.zeros((4, 4, 400))
    std[..., 7] = np.linspace(20, 40, 16).reshape(4, 4)
    shown = page._spread("sax", std, SimpleNamespace(reference=SimpleNamespace(affine=AFFINE)))
    assert len(np.unique(shown.data[..., 7])) > 10 and "up to 39.9" in shown.role


def test_names_are_text(tmp_path, brain_model):
    name = "x<script>alert(1)<"
    study(tmp_path / "in", name)
    assert run("synth", tmp_path / "in", "-o", tmp_path / "out", "--model", brain_model, "--report").exit_code == 0
    (path,) = (tmp_path / "out").glob("*.html")
    text = path.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "x&lt;script&gt;alert(1)&lt;" in text


def test_a_heart_beside_itself(tmp_path, heart_model, monkeypatch):
    monkeypatch.setattr(page, "STILL", 30_000)  # many slices need more than there is
    stack = slices(16, 12)
    stack[..., 4] = 0
    path = save(tmp_path / "heart.nii.gz", stack, SHORT_AXIS)
    assert run("synth", path, "-o", tmp_path / "out", "--model", heart_model, "--report").exit_code == 0
    text = (tmp_path / "out" / "heart_report.html").read_text(encoding="utf-8")
    assert 1000 < len(re.search(r"image/png;base64,([^\"]+)", text)[1]) <= 30_000
    given, filled = (np.asarray(unpacked(volume["content"]).dataobj) for volume in volumes(text))
    assert given[..., 4].max() == 0 and filled[..., 4].max() > 0
    assert np.array_equal(np.delete(given, 4, 2), np.delete(filled, 4, 2)) and "slices 4 synthesised" in text


def test_volumes_get_as_coarse_as_they_must():
    """Noise cannot be packed: only coarser grids fit; and they stay where they were in space."""
    data = np.random.default_rng(0).random((120, 110, 60), np.float32)
    panel = Panel("t1", "observed", data, AFFINE)
    fine = unpacked(pack([panel], 10**8)[0])
    assert fine.shape == data.shape and np.array_equal(fine.affine, AFFINE)
    packed = pack([panel, panel], 500_000)
    assert sum(map(len, packed)) <= 500_000
    coarse = unpacked(packed[0])
    steps = nib.affines.voxel_sizes(coarse.affine) / nib.affines.voxel_sizes(AFFINE)
    assert np.allclose(steps, np.rint(steps)) and steps[2] <= steps[0]  # the thickest side last
    block = data[tuple(slice(0, int(s)) for s in steps)]
    assert abs(float(np.asarray(coarse.dataobj)[0, 0, 0]) - 255 * block.mean()) <= 1
    centre = nib.affines.apply_affine(AFFINE, (steps - 1) / 2)
    assert np.allclose(coarse.affine[:3, 3], centre)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_in_a_browser(tmp_path, brain_model):
    """Opened from a file, in a browser that may reach nothing: volumes on every canvas, no error on the console."""
    save(tmp_path / "in" / "case_t1.nii.gz", image(0))
    save(tmp_path / "in" / "case_t2.nii.gz", image(1))
    options = ["--model", brain_model, "--target", "flair", "--report"]
    assert run("synth", tmp_path / "in", "-o", tmp_path / "out", *options).exit_code == 0
    shot, console = screenshot(tmp_path / "out" / "case_report.html", tmp_path / "shot.png")
    assert not console, console
    frames = [box for box in panels_of(shot)]
    assert len(frames) == 3
    for left, top, right, bottom in frames:
        grey = np.asarray(shot.crop((left + 6, top + 40, right - 6, bottom - 6)).convert("L"), float)
        assert grey.std() > 15 and (grey > 60).mean() > 0.03
    orange = [np.asarray(shot)[(top + bottom) // 2, left].tolist() for left, top, _, bottom in frames]
    assert [abs(red - 255) < 9 for red, _, _ in orange] == [False, False, True]


def screenshot(path: Path, to: Path) -> tuple[Image.Image, str]:
    """What a browser shows of a page, and what its console said."""
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--use-angle=swiftshader"),
        *("--enable-unsafe-swiftshader", "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *("--hide-scrollbars", "--window-size=1360,1000", "--virtual-time-budget=20000", f"--screenshot={to}"),
        *(f"--user-data-dir={to.parent / 'profile'}", path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert to.is_file(), done.stderr
    return Image.open(to).convert("RGB"), _complaints(done.stderr)


def _complaints(log: str) -> str:
    """The console's lines, but for how fast WebGL is without a GPU."""
    return "\n".join(x for x in log.splitlines() if "CONSOLE" in x and "GPU stall due to ReadPixels" not in x)


def panels_of(shot: Image.Image) -> list[tuple[int, int, int, int]]:
    """Boxes of the figures: their borders are of two colours that nothing else has."""
    pixels = np.asarray(shot).astype(int)
    border = np.zeros(pixels.shape[:2], bool)
    for colour in ((51, 51, 59), (255, 150, 30)):
        border |= (np.abs(pixels - colour) <= 2).all(-1)
    rows = np.flatnonzero(border.mean(1) > 0.9)
    boxes = []
    for top, bottom in pairwise(rows):
        if bottom - top > 200:
            columns = np.flatnonzero(border[top + 5 : bottom - 5].mean(0) > 0.95)
            starts = [c for c in columns if c - 1 not in columns]
            boxes += [(a, top, b, bottom) for a, b in zip(starts[::2], starts[1::2], strict=True)]
    return boxes


def test_the_viewer_is_shipped_with_its_licence():
    assert "Copyright (c) 2021, Niivue" in page._part("NIIVUE-LICENSE.txt")
    assert "</script" not in page._viewer() and "</script" not in page._part("panels.js")
