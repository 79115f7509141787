"""Anatomies from a made-up folder of label maps: fractions, masks, flips, lesions and errors."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from copedit_rt.errors import CopeditError
from copedit_training.data import anatomy
from copedit_training.data.anatomy import INDEX, NAMES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("labels"))


def made_up(folder: Path) -> Path:
    """A head of 3 mm voxels: nested ellipsoids, a brain in two hemispheres with ventricles, and one lesion mask."""
    axes = np.meshgrid(*(np.arange(-96, 96, 3.0),) * 3, indexing="ij")

    def inside(rx, ry, rz, x=0.0, y=0.0, z=0.0):
        return ((axes[0] - x) / rx) ** 2 + ((axes[1] - y) / ry) ** 2 + ((axes[2] - z) / rz) ** 2 < 1

    left = axes[0] < 0
    labels = np.zeros(axes[0].shape, np.int16)
    for radius, label in ((86, 511), (83, 507), (78, 515), (74, 516), (71, 515), (68, 24)):
        labels[inside(radius, radius, radius)] = label
    labels[inside(64, 64, 64)] = 42
    labels[inside(64, 64, 64) & left] = 3
    labels[inside(58, 58, 58)] = 41
    labels[inside(58, 58, 58) & left] = 2
    for side, names in ((-1, (4, 10, 12)), (1, (43, 49, 51))):
        labels[inside(7, 26, 9, side * 12, 0, 12)] = names[0]
        labels[inside(8, 12, 8, side * 12, -14, 0)] = names[1]
        labels[inside(6, 15, 9, side * 28, 4, 0)] = names[2]
    (folder / "synthseg").mkdir()
    (folder / "ms_lesions_mni").mkdir()
    affine = np.diag([3.0, 3, 3, 1])
    nib.save(nib.Nifti1Image(labels, affine), folder / "synthseg" / "one.nii.gz")
    mask = np.zeros((91, 109, 91), np.uint8)
    mask[60:66, 50:58, 50:56] = 1
    mni = np.diag([2.0, 2, 2, 1])
    mni[:3, 3] = (-90, -126, -72)
    nib.save(nib.Nifti1Image(mask, mni), folder / "ms_lesions_mni" / "one.nii.gz")
    return folder


@pytest.fixture(scope="module")
def head(folder):
    return anatomy.read_map(anatomy.read_folder(folder).maps[0])


def drawing(head, folder, seed=0, stripped=True, disease=anatomy.Disease(0, 0)):
    tubes = torch.from_numpy(anatomy.noise_block(32))
    lesions = anatomy.read_folder(folder).lesions
    rng = np.random.default_rng(seed)
    return anatomy.draw(head, lesions, tubes, rng, (48, 56, 24), (4.0, 4.0, 8.0), stripped, disease)


def test_a_folder_without_maps_says_what_it_needs(tmp_path):
    with pytest.raises(CopeditError, match=r"holds no label map.*synthseg"):
        anatomy.read_folder(tmp_path)


def test_a_file_that_is_no_label_map_is_named(tmp_path):
    (tmp_path / "synthseg").mkdir()
    nib.save(nib.Nifti1Image(np.ones((20, 20, 20), np.int16), np.eye(4)), tmp_path / "synthseg" / "x.nii.gz")
    with pytest.raises(CopeditError, match=r"x\.nii\.gz holds no brain"):
        anatomy.read_map(tmp_path / "synthseg" / "x.nii.gz")
    (tmp_path / "synthseg" / "x.nii.gz").write_bytes(b"not a file")
    with pytest.raises(CopeditError, match=r"x\.nii\.gz cannot be read"):
        anatomy.read_map(tmp_path / "synthseg" / "x.nii.gz")


@pytest.fixture
def altered(folder, tmp_path):
    """Writes the map of the folder, changed by a function, as float32 and returns its path."""

    def write(change):
        image = nib.load(folder / "synthseg" / "one.nii.gz")
        labels = np.asarray(image.dataobj, np.float32)
        change(labels)
        nib.save(nib.Nifti1Image(labels, image.affine), tmp_path / "x.nii.gz")
        return tmp_path / "x.nii.gz"

    return write


@pytest.mark.parametrize("value", [17.5, np.nan, np.inf])
def test_a_map_that_was_resampled_linearly_is_refused(altered, value):
    def change(labels):
        labels[30, 30, 30] = value

    with pytest.raises(CopeditError, match=rf"x\.nii\.gz is no label map \(it holds {value:g}\); resample it with"):
        anatomy.read_map(altered(change))


def test_regions_of_the_cortex_are_cortex(head, altered):
    def change(labels):
        labels[30:] = np.select([labels[30:] == 3, labels[30:] == 42], [1035, 2000], labels[30:])

    assert torch.equal(anatomy.read_map(altered(change)).tissue, head.tissue)


def test_labels_of_no_known_tissue_are_named_and_not_made_air(altered):
    def change(labels):
        labels[30:34, 30:34, 30:34] = 11101  # 1.7 ml
        labels[30, 30, 30] = -1

    with pytest.raises(CopeditError, match=r"x\.nii\.gz holds 2 ml of labels that .* \(-1, 11101\); give them labels"):
        anatomy.read_map(altered(change))


def test_a_prepared_map_is_read_back_as_it_was(head, tmp_path):
    anatomy.save_map(head, tmp_path / "map.npz")
    back = anatomy.load_map(tmp_path / "map.npz")
    assert torch.equal(back.tissue, head.tissue) and torch.equal(back.push, head.push)
    np.testing.assert_array_equal(back.to_mni, head.to_mni)


def test_distances_are_negative_inside_and_ventricles_push_outwards(head):
    brain = torch.isin(head.tissue, torch.tensor([INDEX["cortex"], INDEX["white"]], dtype=torch.uint8))
    assert (head.brain[brain] < 128).all()
    assert (head.brain[head.tissue == INDEX["skin"]] > 128).all()
    assert (head.ventricle[head.tissue == INDEX["ventricle"]] * 0.125 <= 3).all()  # within a voxel
    assert (head.ventricle[head.tissue == INDEX["skin"]] == 255).all()
    assert float(head.push.abs().max()) <= 1.5


def test_fractions_are_shares_of_every_voxel(head, folder):
    for stripped in (True, False):
        got = drawing(head, folder, stripped=stripped)
        np.testing.assert_allclose(got.fractions.sum(1).numpy(), 1, atol=1e-6)
        assert 0 <= float(got.mask.min()) and float(got.mask.max()) == 1
        assert (got.fractions.max(1).values < 1).any()  # partial volume


def test_a_stripped_brain_has_no_skull_and_a_head_has(head, folder):
    got = drawing(head, folder)
    kept = (got.fractions * got.mask[:, None]).sum(0)
    assert kept[INDEX["skin"]] < 0.01 * kept.sum()
    whole = drawing(head, folder, stripped=False).fractions.sum(0)
    assert whole[INDEX["skin"]] > 0.03 * whole.sum()


def test_flips_swap_the_sides(head, folder):
    lesioned = head.tissue.clone()
    half = lesioned.shape[0] // 2
    lesioned[:half][lesioned[:half] == INDEX["white"]] = INDEX["lesion"]
    one_sided = anatomy.HeadMap(**{**vars(head), "tissue": lesioned})
    sides = set()
    for seed in range(8):
        labels = drawing(one_sided, folder, seed).labels().numpy()
        where = np.argwhere(labels == anatomy.HYPERINTENSITY)[:, 0].mean()
        sides.add(bool(where > 23.5))
    assert sides == {True, False}


def test_a_tumour_has_its_parts_and_stays_in_the_brain(head):
    seen = set()
    for seed in range(12):
        painter = anatomy.Painter(head, np.random.default_rng(seed))
        painter.tumour(14.0)
        changed = painter.tissue != head.tissue
        seen |= {NAMES[i] for i in painter.tissue[changed].unique()}
        assert not changed[head.tissue == INDEX["bone"]].any() and not changed[head.tissue == INDEX["ventricle"]].any()
    assert {"necrosis", "rim", "oedema", "solid tumour"} <= seen


def test_lesion_masks_are_laid_over_white_matter(head, folder):
    painter = anatomy.Painter(head, np.random.default_rng(0))
    mask, voxel = anatomy.read_folder(folder).lesions[0]
    painter.mask(mask, voxel, 0.0)
    changed = painter.tissue != head.tissue
    assert changed.any() and (head.tissue[changed] == INDEX["white"]).all()
    where = np.argwhere(changed.numpy()).mean(0) * head.spacing
    mni = (head.to_mni @ [*where, 1])[:3]
    np.testing.assert_allclose(mni, (35, -19, 33), atol=6)  # the middle of the mask


def test_wider_sulci_hold_more_fluid(head):
    index = torch.arange(head.tissue.numel()).reshape(-1, 1)
    kinds = head.tissue.reshape(-1, 1)
    fluid = [int((anatomy._atrophy(head, kinds, index, level) == INDEX["sulcus"]).sum()) for level in (0.3, 0.5, 0.7)]
    assert fluid[0] > fluid[1] > fluid[2]


def test_growing_ventricles_take_more_room(head, folder):
    axes = anatomy.axes_of((48, 56, 24), (4.0, 4.0, 8.0))
    place = anatomy.Place(np.eye(3), head.brain_centre)
    sizes = []
    for growth in (-2.0, 0.0, 4.0):
        points = anatomy._coarse_points(head, place, axes, np.random.default_rng(0), [], growth)
        found = head.tissue.reshape(-1)[anatomy._flat(list(points), head.tissue.shape, head.spacing)]
        sizes.append(int((found == INDEX["ventricle"]).sum()))
    assert sizes[0] < sizes[1] < sizes[2]


def test_fields_have_variance_one_and_the_wanted_length():
    axes = anatomy.axes_of((40, 40, 40), (4.0,) * 3)
    field = anatomy.smooth_field(np.random.default_rng(0), axes, 8.0, 4, torch.device("cpu"))
    assert field.shape == (4, 40, 40, 40)
    assert float(field.std()) == pytest.approx(1, abs=0.1)
    lag = float((field[:, 2:] * field[:, :-2]).mean() / field.square().mean())  # 8 mm: exp(-1/4)
    assert lag == pytest.approx(np.exp(-0.25), abs=0.06)
