import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from copedit_training.evaluation import metrics


def pair(shape, seed=0, noise=0.1):
    rng = np.random.default_rng(seed)
    a = rng.random(shape)
    return a, np.clip(a + noise * rng.standard_normal(shape), 0, 1)


def test_psnr_and_mae_closed_form():
    a = np.zeros((4, 4, 4))
    assert metrics.psnr(a, a + 0.1) == pytest.approx(20)
    assert metrics.psnr(a, a + 10, data_range=100) == pytest.approx(20)
    assert metrics.psnr(a, a) == math.inf
    assert metrics.mae(a, a - 0.25) == pytest.approx(0.25)


def test_ssim_is_torchmetrics():
    a, b = pair((24, 20, 16))
    one, two = (torch.from_numpy(x)[None, None] for x in (a, b))
    expected = structural_similarity_index_measure(one, two, data_range=1.0, sigma=1.5)
    assert metrics.ssim_map(a, b).mean() == pytest.approx(float(expected), abs=1e-9)


def test_ssim_closed_forms():
    a, _ = pair((16, 16, 16))
    assert metrics.ssim_map(a, a).mean() == pytest.approx(1)
    # Two constants have no variance: only the luminance term is left.
    x, y = np.full((12, 12, 12), 0.4), np.full((12, 12, 12), 0.6)
    assert metrics.ssim_map(x, y).mean() == pytest.approx((2 * 0.24 + 1e-4) / (0.16 + 0.36 + 1e-4))


def test_ssim_shrinks_the_window_on_thin_axes():
    a, b = pair((24, 20, 4))
    assert metrics.ssim_map(a, b).shape == a.shape
    assert 0 < metrics.ssim_map(a, b).mean() < 1
    assert metrics.ssim_map(a[..., :1], a[..., :1]).mean() == pytest.approx(1)


def test_ssim_over_slices_sees_only_these():
    a, b = pair((20, 20, 16))
    b[..., :14] = a[..., :14]
    far, near = (metrics.measure(a, b, slices)["ssim"] for slices in ([2, 3], [14, 15]))
    assert far == pytest.approx(1) and near < 0.99


def naive_ssim(a, b, at, window=11, sigma=1.5):
    """At one voxel, from the definition: weighted moments under a full window of a reflected volume."""
    sizes = [min(window, n - 1 + n % 2) for n in a.shape]
    axes = [np.exp(-0.5 * ((np.arange(n) - n // 2) / sigma) ** 2) for n in sizes]
    weights = np.einsum("i,j,k->ijk", *axes)
    weights /= weights.sum()
    pads = [(n // 2, n // 2) for n in sizes]
    place = tuple(slice(i, i + n) for i, n in zip(at, sizes, strict=True))
    x, y = (np.pad(v.astype(np.float64), pads, mode="reflect")[place] for v in (a, b))
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy, cov = ((weights * p * q).sum() for p, q in ((x - mx, x - mx), (y - my, y - my), (x - mx, y - my)))
    c1, c2 = 1e-4, 9e-4
    return (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


@pytest.mark.parametrize("shape", [(40, 44, 40), (20, 18, 4)])
def test_ssim_is_the_naive_one_everywhere_around_an_object(shape):
    """Also where the computation is skipped, at its edge, and at the border of the volume."""
    a, b = (np.zeros(shape, np.float32) for _ in range(2))
    one, two = pair((9, 8, shape[2] // 4), seed=3)
    a[3:12, 5:13, : shape[2] // 4], b[3:12, 5:13, : shape[2] // 4] = one, two
    values = metrics.ssim_map(a, b)
    rng = np.random.default_rng(0)
    near = [(x, y, z) for x in range(0, 20, 3) for y in range(0, 18, 3) for z in range(min(shape[2], 14))]
    for at in [near[i] for i in rng.permutation(len(near))[:60]] + [tuple(n - 1 for n in shape), (3, 5, 0)]:
        assert values[at] == pytest.approx(naive_ssim(a, b, at), abs=1e-9), at


def test_measure_is_torchmetrics_and_masks_by_voxel():
    a, b = (x.astype(np.float32) for x in pair((24, 20, 16)))
    b[:, :, :5] = a[:, :, :5] = 0
    found = metrics.measure(a, b)
    one, two = (torch.from_numpy(x)[None, None].double() for x in (a, b))
    assert found["psnr"] == pytest.approx(float(peak_signal_noise_ratio(one, two, data_range=1.0)), abs=1e-6)
    ssim, every = structural_similarity_index_measure(one, two, data_range=1.0, sigma=1.5, return_full_image=True)
    assert found["ssim"] == pytest.approx(float(ssim), abs=1e-9)
    mask = np.random.default_rng(1).random(a.shape) > 0.6
    inside, slices = metrics.measure(a, b, mask=mask), [2, 7, 8]
    error = (a.astype(np.float64) - b)[mask]
    assert inside["psnr_inside"] == pytest.approx(-10 * math.log10((error**2).mean()))
    assert inside["mae_inside"] == pytest.approx(np.abs(error).mean())
    assert inside["ssim_inside"] == pytest.approx(every[0, 0].numpy()[mask].mean(), abs=1e-9)
    assert {name: inside[name] for name in found} == found
    some = metrics.measure(a, b, slices, mask)
    within = (a.astype(np.float64) - b)[..., slices][mask[..., slices]]
    assert some["mae_inside"] == pytest.approx(np.abs(within).mean())
    nothing = metrics.measure(a, b, mask=np.zeros_like(mask))
    assert nothing["psnr_inside"] == nothing["psnr"]
