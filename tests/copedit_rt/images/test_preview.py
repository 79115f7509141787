import numpy as np
import pytest
from PIL import Image

from copedit_rt.errors import CopeditError
from copedit_rt.images import preview
from copedit_rt.images.grids import Orientation
from copedit_rt.images.nifti import Volume
from copedit_rt.images.study import Study

SPACING = np.array([1.0, 1.0, 4.0])
SHAPE = (60, 72, 12)


def brain(codes_flipped: bool = False, made: tuple[str, ...] = ("flair",)) -> Study:
    """A box of noise with a bright mark at the right, anterior and superior corner of its inside."""
    data = np.zeros(SHAPE, np.float32)
    data[6:-6, 6:-6, 1:-1] = np.random.default_rng(0).uniform(0.3, 0.5, (48, 60, 10))
    data[40:54, 50:66, 7:11] = 1
    affine = np.diag([*SPACING, 1.0])
    if codes_flipped:  # the same image, stored from right to left and from top to bottom
        turn = np.diag([-1.0, 1, -1, 1])
        turn[:3, 3] = [SHAPE[0] - 1, 0, SHAPE[2] - 1]
        data, affine = data[::-1, :, ::-1].copy(), affine @ turn
    volumes = {name: Volume.from_array(data, affine) for name in ("t1", "t2", "flair")}
    return Study("case", "brain", volumes, synthetic=frozenset(made))


def heart() -> tuple[Study, np.ndarray]:
    truth = np.random.default_rng(0).uniform(50, 100, (32, 32, 10)).astype(np.float32)
    made = truth.copy()
    made[..., 4:6] = 75
    volume = Volume.from_array(made, np.diag([2.0, 2.0, 8.0, 1.0]))
    return Study("stack", "cardiac", {"sax": volume}, (4, 5), frozenset(["sax"])), truth


def share_of(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    return float((np.asarray(picture) == colour).all(axis=-1).mean())


def test_panels_follow_the_radiological_convention():
    cut = np.zeros((10, 20))
    cut[8, 17] = 1  # high x (patient's right is low x ... so this is the left), high y
    panel = np.asarray(preview._panel(cut, (1, 1)))[..., 0]
    assert panel.shape == (20, 10)
    row, column = np.unravel_index(panel.argmax(), panel.shape)
    assert row == 2 and column == 1


def test_aspect_is_that_of_the_voxels():
    assert preview._panel(np.zeros((10, 20)), (2, 6)).size == (20, 120)


def test_the_same_image_gives_the_same_picture_in_any_voxel_order():
    one, two = (np.asarray(preview.draw(brain(flipped), model="x")) for flipped in (False, True))
    assert np.array_equal(one, two)


def test_only_synthesised_images_are_framed():
    assert share_of(preview.draw(brain(made=()), model="x"), preview.SYNTHETIC) == 0
    assert share_of(preview.draw(brain(), model="x"), preview.SYNTHETIC) > 0.002


def test_truth_adds_columns():
    study = brain()
    with_truth = preview.draw(study, model="x", truth={"flair": study.volumes["flair"].data})
    assert with_truth.width > preview.draw(study, model="x").width * 1.4


def test_heart_shows_every_slice_and_marks_the_missing():
    study, truth = heart()
    picture = preview.draw(study, model="x")
    assert share_of(picture, preview.SYNTHETIC) > 0.001
    compared = preview.draw(study, model="x", truth={"sax": truth})
    assert compared.height > picture.height


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_heart_sliced_along_any_axis(axis):
    study, _ = heart()
    volume = study.volumes["sax"]
    data = np.moveaxis(volume.data, 2, axis)
    columns = [0, 1]
    columns.insert(axis, 2)
    affine = volume.affine[:, [*columns, 3]]
    turned = Study("stack", "cardiac", {"sax": Volume.from_array(data, affine)}, (4, 5), frozenset(["sax"]))
    assert Orientation.slices_last(affine, axis).apply(data).shape == (32, 32, 10)
    assert np.array_equal(np.asarray(preview.draw(turned, model="x")), np.asarray(preview.draw(study, model="x")))


def test_slices_thinner_than_a_pixel_are_marked():
    marked = preview._marked(Image.new("RGB", (50, 20)), range(40), 40)
    assert share_of(marked, preview.SYNTHETIC) > 0.05


def test_constant_and_nan_images_are_drawn():
    study = brain()
    study.volumes["t2"].data[:] = np.nan
    study.volumes["flair"].data[:] = 3
    preview.draw(study, model="x")


def test_save_is_atomic_and_tells_where_it_cannot_write(tmp_path):
    picture = preview.draw(brain(), model="x")
    preview.save(picture, tmp_path / "new" / "p.png")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.png"]
    assert Image.open(tmp_path / "new" / "p.png").size == picture.size
    (tmp_path / "file").write_text("")
    with pytest.raises(CopeditError, match=r"file/p\.png"):
        preview.save(picture, tmp_path / "file" / "p.png")
