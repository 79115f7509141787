"""Signal equations against closed forms and followed magnetisation; contrasts against what is known of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from copedit_training.data import physics
from copedit_training.data.anatomy import INDEX, NAMES

T1 = np.array([350.0, 700.0, 1200.0, 4000.0])
T2 = np.array([60.0, 75.0, 95.0, 900.0])


def test_spin_echo_with_long_tr_is_proton_density_times_t2_decay():
    np.testing.assert_allclose(physics.spin_echo(T1, T2, 1e6, 40), np.exp(-40 / T2), rtol=1e-12)


def test_spin_echo_follows_the_magnetisation():
    tr, te = 600.0, 15.0
    m = np.ones_like(T1)  # longitudinal, before the 90 degree pulse; after many cycles it is steady
    for _ in range(50):
        m = 1 - np.exp(-(te / 2) / T1)  # recovers from zero until the refocusing pulse
        m = 1 - (1 + m) * np.exp(-(tr - te / 2) / T1)  # which inverts it, then recovers
    np.testing.assert_allclose(physics.spin_echo(T1, T2, tr, te), m * np.exp(-te / T2), rtol=1e-12)


def test_gradient_echo_peaks_at_the_ernst_angle():
    tr, t1 = 20.0, np.array([800.0])
    ernst = np.rad2deg(np.arccos(np.exp(-tr / t1[0])))
    value = {a: physics.gradient_echo(t1, t1, tr, 0.0, a)[0] for a in (ernst - 1, ernst, ernst + 1)}
    assert max(value, key=value.__getitem__) == ernst
    e = np.exp(-tr / t1[0])
    assert value[ernst] == pytest.approx(np.sqrt((1 - e) / (1 + e)), rel=1e-12)


def test_inversion_recovery_is_zero_at_its_null():
    tr, f = 8000.0, 0.97
    null = T1 * np.log((1 + f) / (1 + f * np.exp(-tr / T1)))
    value = [physics.inversion_recovery(T1[i : i + 1], T2[i : i + 1], tr, 100, null[i], f)[0] for i in range(4)]
    np.testing.assert_allclose(value, 0, atol=1e-15)


def test_mprage_is_what_a_train_of_pulses_gives():
    tr, ti, flip, echo, count, f, te = 2300.0, 900.0, 9.0, 7.0, 160, 0.96, 3.0
    a, m = np.deg2rad(flip), np.ones_like(T1)

    def rest(m, t):
        return 1 - (1 - m) * np.exp(-t / T1)

    for _ in range(30):
        m = rest(-f * m, ti - echo * count / 2)
        for pulse in range(count):
            if pulse == count // 2:
                signal = np.sin(a) * m * np.exp(-te / T2)
            m = rest(np.cos(a) * m, echo)
        m = rest(m, tr - ti - echo * count / 2)
    np.testing.assert_allclose(physics.mprage(T1, T2, tr, te, ti, flip, echo, count, f), signal, rtol=1e-9)


def test_the_train_of_a_drawn_mprage_lies_between_two_inversions():
    drawn = [physics._draw_t1(np.random.default_rng(seed), None) for seed in range(1000)]
    trains = [p.values for p in drawn if p.kind == "mprage"]
    for v in trains:
        assert v["count"] * v["echo"] / 2 < min(v["ti"], v["tr"] - v["ti"])
    assert len(trains) > 200 and sum(v["tr"] - v["ti"] < 5 * v["count"] * v["echo"] / 9 for v in trains) > 5


def test_texture_rows_are_the_derivatives_of_the_signal():
    tissues = physics.draw_tissues(np.random.default_rng(0), 40.0)
    protocol = physics.draw_sequence("t2", np.random.default_rng(1), tissues)
    rows = physics.signal_with_texture(tissues, protocol)
    assert rows.shape == (1 + len(physics.FIELDS), len(NAMES))
    h = 1e-4
    for i in range(len(physics.FIELDS)):
        moved = replace(
            tissues,
            t1=tissues.t1 * np.exp(h * tissues.texture_t1[i]),
            t2=tissues.t2 * np.exp(h * tissues.texture_t2[i]),
        )
        np.testing.assert_allclose(rows[1 + i], (physics.signal(moved, protocol) - rows[0]) / h, rtol=0.02, atol=1e-4)


def drawn(contrast, seeds=40):
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        tissues = physics.draw_tissues(rng, 50.0)
        own = physics.with_gadolinium(tissues, rng) if contrast == "t1ce" else tissues
        protocol = physics.draw_sequence(contrast, rng, tissues)
        value = physics.signal(own, protocol)
        yield {name: float(value[INDEX[name]]) for name in NAMES}, tissues, protocol, rng


def test_t1_shows_white_over_grey_over_fluid():
    for value, _, protocol, _ in drawn("t1"):
        fluid = abs(value["ventricle"]) if protocol.magnitude else max(value["ventricle"], 0)
        assert value["white"] > value["cortex"] > 0
        assert fluid < 0.7 * value["cortex"]


def test_t2_shows_fluid_over_grey_over_white():
    for value, *_ in drawn("t2"):
        assert value["ventricle"] > 1.3 * value["cortex"] > 1.3 * value["white"]


def test_flair_has_dark_fluid_and_bright_lesions():
    for value, *_ in drawn("flair"):
        assert abs(value["ventricle"]) < 0.3 * value["white"]
        assert value["oedema"] > value["white"]


def test_gadolinium_brightens_vessels_and_most_rims_in_t1():
    brighter = 0
    for value, tissues, protocol, _ in drawn("t1ce"):
        plain = physics.signal(tissues, protocol)
        assert value["vein"] > plain[INDEX["vein"]]
        brighter += value["rim"] > 1.1 * plain[INDEX["rim"]]
    assert brighter > 25


def test_thick_slices_blur_across_them_and_keep_a_constant():
    matrix = physics.blur_matrix(40, 2.0, 6.0, 0.5, 0.3, 0.0)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-5)
    spike = matrix @ np.eye(40, dtype=np.float32)[20]
    assert (spike > 0.02).sum() >= 4  # 6 mm on a grid of 2 mm
    thin = physics.blur_matrix(40, 2.0, 1.0, 0.5, 0.3, 0.0)
    assert (thin @ np.eye(40, dtype=np.float32)[20]).max() > 0.8


def test_a_shift_moves_the_image_by_that_many_millimetres():
    matrix = physics.blur_matrix(40, 2.0, 1.0, 0.3, 0.0, 2.0)
    assert int(np.argmax(matrix @ np.eye(40, dtype=np.float32)[20])) == 19


def test_noise_is_rician():
    scan = physics.Scan((1.0,) * 3, 0.0, (0.0,) * 3, 0.1, 0.0, 0, 1.0, 0.0, (0.0,) * 3, False)
    image = physics.acquire(torch.zeros(40, 40, 40), scan, (2.0,) * 3, True, np.random.default_rng(0))
    # Without signal Rician noise is Rayleigh's, of mean sigma sqrt(pi / 2); 64000 samples know it to 0.3 %.
    assert float(image.mean()) == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.01)
