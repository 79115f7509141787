"""Segmentation with synthesised images: Dice, regions, and that the comparison is fair."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from copedit_rt import checkpoint
from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images.nifti import Volume
from copedit_training.data import layouts, phantom
from copedit_training.data.prepared import phantom_subject
from copedit_training.experiments import segmentation as seg

pytest.importorskip("monai", reason="the U-Net needs the extra `train`")
TINY = seg.Budget(train=3, test=2, steps=2, batch=2, crop=16, seeds=2)


def some_cases(count=3, shape=(16, 16, 8), seed=0):
    """A ball that is bright in the second modality alone, the enhancing tumour inside it."""
    rng = np.random.default_rng(seed)
    images, regions = [], []
    for _ in range(count):
        centre = np.array([rng.uniform(5, n - 5) if n > 10 else n / 2 for n in shape])
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        distance = np.sqrt(((grid - centre) ** 2).sum(-1))
        ball = np.stack([distance < r for r in (5, 4, 3)])
        image = rng.random((4, *shape)) * 0.2
        image[1] += 0.8 * ball.mean(0)
        images.append(image)
        regions.append(ball)
    images = np.stack(images).astype(np.float16)
    return seg.Cases(images, (images + 0.01).astype(np.float16), np.stack(regions))


def test_dice_is_monais_and_the_formula():
    from monai.metrics import DiceMetric

    rng = np.random.default_rng(0)
    logits, regions = (
        torch.from_numpy(rng.standard_normal((2, 3, 8, 8, 4))),
        torch.from_numpy(rng.random((2, 3, 8, 8, 4)) < 0.3),
    )
    regions[1, 2] = False
    found = seg.dice(logits, regions)
    predicted, wanted = (logits > 0).numpy(), regions.numpy()
    for i in range(2):
        for k in range(3):
            a, b = predicted[i, k], wanted[i, k]
            if b.any():
                assert found[i, k] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
            else:
                assert np.isnan(found[i, k])
    metric = DiceMetric(include_background=True, reduction="none", ignore_empty=True)
    metric((logits > 0).float(), regions.float())
    assert np.array_equal(found, metric.aggregate().numpy(), equal_nan=True)


def test_regions_are_nested():
    labels = np.array([0, 1, 2, 3, 4]).reshape(5, 1, 1)
    found = seg.regions_of(labels, seg.BRATS)[:, :, 0, 0]
    assert found.tolist() == [
        [False, True, True, True, True],
        [False, True, False, True, True],
        [False] * 3 + [True] * 2,
    ]
    for seed in range(3):
        regions = seg.regions_of(phantom.brain(seed, (24, 24, 8), (8, 8, 20)).labels, phantom.TUMOUR)
        assert not (regions[1] & ~regions[0]).any() and not (regions[2] & ~regions[1]).any()


def test_simulated_cases_have_tumours_where_they_are_bright(model_folder):
    config = checkpoint.read_config(model_folder("demo-brain"))
    config = replace(config, image=(32, 32, 16))
    ((images, regions),) = seg.phantom_cases(config, seg.TRAINING, 1)
    assert images.shape == (4, 32, 32, 16) and regions[0].sum() >= seg.SMALLEST
    brain = images[3] > 0.05
    assert images[3][regions[0]].mean() > images[3][brain & ~regions[0]].mean(), "FLAIR shows oedema"
    labels = [phantom_subject(config, seg.TRAINING + i).labels for i in range(3)]
    assert any(np.array_equal(seg.regions_of(x, phantom.TUMOUR), regions) for x in labels)


def write_brats(folder, name, config, seed, labels=True):
    subject = phantom_subject(config, seed)
    for element, image in subject.images.items():
        path = folder / name / f"{name}_{element}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        Volume.from_array(image, subject.affine()).save(path)
    wanted = np.zeros(subject.labels.shape, np.float32)
    wanted[4:8, 4:8, 2:4] = 2
    wanted[5:7, 5:7, 2:4] = 4
    if labels:
        Volume.from_array(wanted, subject.affine()).save(folder / name / f"{name}_seg.nii.gz")
    return wanted


def test_labels_of_brats_come_onto_the_models_grid(model_folder, tmp_path):
    config = checkpoint.read_config(model_folder("demo-brain"))
    wanted = write_brats(tmp_path, "BraTS2021_00001", config, 1)
    write_brats(tmp_path, "BraTS2021_00002", config, 2, labels=False)
    found = layouts.find(tmp_path, config)
    assert len(found.studies) == 2
    ((images, regions),) = seg.folder_cases(config, found.studies, skipped := [])
    assert not skipped
    assert images.shape == (4, *config.image)
    assert np.array_equal(regions[0], wanted > 0) and np.array_equal(regions[2], wanted == 4)
    with pytest.raises(CopeditError, match="has its segmentation"):
        (tmp_path / "BraTS2021_00001" / "BraTS2021_00001_seg.nii.gz").unlink()
        seg.load_cases(config, tmp_path / "o", str(tmp_path), TINY)


def test_studies_that_cannot_be_used_are_left_out_by_name(model_folder, tmp_path):
    config = checkpoint.read_config(model_folder("demo-brain"))
    names = [f"BraTS2021_{i:05d}" for i in range(4)]
    for seed, name in enumerate(names):
        wanted = write_brats(tmp_path / "data", name, config, seed)
        path = tmp_path / "data" / name / f"{name}_seg.nii.gz"
        if name in names[:2]:  # others' numbers, and no tumour
            labels = 255 * (wanted > 0) if name == names[0] else 0 * wanted
            Volume.from_array(labels.astype(np.float32), phantom_subject(config, seed).affine()).save(path)
    flair = tmp_path / "data" / names[2] / f"{names[2]}_flair.nii.gz"
    flair.write_bytes(flair.read_bytes()[:-40])
    out = tmp_path / "out"
    out.mkdir()
    people = [f"BraTS/{name}" for name in names]
    (out / "split.json").write_text(json.dumps({"train": people[1:], "test": people[:1]}))
    with pytest.raises(CopeditError, match=r"no study to test on can be used, such as .*0000_seg.* from 0 to 255"):
        seg.load_cases(config, out, str(tmp_path / "data"), replace(TINY, train=4))
    (out / "split.json").write_text(json.dumps({"train": people[:3], "test": people[3:]}))
    wanted = write_brats(tmp_path / "data", names[1], config, 1)
    for _ in range(2):  # made, and found again
        cases = seg.load_cases(config, out, str(tmp_path / "data"), replace(TINY, train=5))["train"]
        assert [item.study for item in cases.skipped] == [names[0], names[2]]
        assert len(cases.images) == 1 and np.array_equal(cases.regions[0, 0], wanted > 0)


def test_no_patient_has_what_was_synthesised_of_another(model_folder, tmp_path, monkeypatch):
    """Nor are scores of other patients kept, where a study is damaged or mended or was not left out before."""
    model = str(model_folder("demo-brain"))
    config, names = checkpoint.read_config(model_folder("demo-brain")), [f"BraTS2021_{i:05d}" for i in range(4)]
    for seed, name in enumerate(names):
        write_brats(tmp_path / "data", name, config, seed)
    people, out = [f"BraTS/{name}" for name in names], tmp_path / "out"
    out.mkdir()
    (out / "split.json").write_text(json.dumps({"train": people[:3], "test": people[3:]}))
    filler, seen = seg.Filler("synthesised", "digest", lambda images, there, seed, study: images / 2), []
    monkeypatch.setattr(seg, "fillers_of", lambda *given: (config, {}, {"synthesised": [filler]}, {}))
    monkeypatch.setattr(seg, "test", lambda net, cases, *given: np.full((len(cases.images), 4, 3), 0.5))

    def train(cases, kind, *given):
        seen.append(kind)
        if kind == "synthesised":
            assert np.array_equal(cases.synthesised, cases.images / np.float16(2))

    monkeypatch.setattr(seg, "train", train)

    def compare():
        seen.clear()
        budget = replace(TINY, test=1, seeds=1)
        return seg.compare(model, out, str(tmp_path / "data"), "cpu", budget)

    def labels(top):
        wanted = np.zeros(phantom_subject(config, 0).labels.shape, np.float32)
        wanted[4:8, 4:8, 2:4] = top
        path = tmp_path / "data" / names[0] / f"{names[0]}_seg.nii.gz"
        Volume.from_array(wanted, phantom_subject(config, 0).affine()).save(path)

    assert compare()["train"] == 3 and len(seen) == 3
    assert compare()["train"] == 3 and not seen, "kept"
    labels(255)
    report = compare()
    assert report["train"] == 2 and [item["study"] for item in report["skipped"]] == names[:1] and len(seen) == 3
    labels(4)
    assert compare()["train"] == 3 and len(seen) == 3, "looked at again"
    # The files of a version that left nothing out: without an index.
    for path in out.glob("train-*.json"):
        path.unlink()
    case = seg._case

    def strict(config, entry, path):
        if entry.files.name == names[0]:
            raise CopeditError("is refused now")
        return case(config, entry, path)

    monkeypatch.setattr(seg, "_case", strict)
    assert compare()["train"] == 2 and len(seen) == 3


def test_simulated_cases_of_an_older_version_are_kept(tmp_path, monkeypatch):
    """Which wrote no index of what is left out."""
    config = replace(ModelConfig.preset("demo-brain"), image=(32, 32, 16))
    row = np.full((4, 32, 32, 16), 0.5, np.float32), np.ones((3, 32, 32, 16), bool)
    monkeypatch.setattr(seg, "phantom_cases", lambda config, first, count: (row for _ in range(count)))
    seg.load_cases(config, tmp_path, "phantom", TINY)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy"}
    short = seg._short(config.name, "phantom")
    assert (tmp_path / f"train-{short}-3.npy").exists(), "the name of all versions"
    monkeypatch.setattr(seg, "phantom_cases", lambda *given: pytest.fail("made again"))
    assert len(seg.load_cases(config, tmp_path, "phantom", TINY)["train"].images) == 3


def test_half_made_cases_are_begun_anew_where_the_studies_are_others(model_folder, tmp_path, monkeypatch):
    """And no more studies are looked for than are wanted."""
    config = checkpoint.read_config(model_folder("demo-brain"))
    names = [f"BraTS2021_{i:05d}" for i in range(5)]
    for seed, name in enumerate(names):
        write_brats(tmp_path / "data", name, config, seed)
    people = [f"BraTS/{name}" for name in names]
    split = tmp_path / "out" / "split.json"
    split.parent.mkdir()
    split.write_text(json.dumps({"train": people[:4], "test": people[4:]}))
    prepare, label_file, prepared, looked = seg.prepare, seg.label_file, [], []

    def stopped(study, *given, **options):
        prepared.append(study.name)
        if len(prepared) == 2:
            raise KeyboardInterrupt
        return prepare(study, *given, **options)

    def load():
        return seg.load_cases(config, split.parent, str(tmp_path / "data"), replace(TINY, train=2, test=1))

    monkeypatch.setattr(seg, "prepare", stopped)
    monkeypatch.setattr(seg, "label_file", lambda entry: looked.append(entry.files.name) or label_file(entry))
    with pytest.raises(KeyboardInterrupt):
        load()
    assert prepared == names[:2] and names[2] not in looked
    (tmp_path / "data" / names[0] / f"{names[0]}_seg.nii.gz").unlink()
    cases = load()
    assert prepared[2:] == [*names[1:3], names[4]]
    for image, seed in zip(cases["train"].images, (1, 2), strict=True):
        assert np.array_equal(image, seg.model_images(config, seed)[:, 0].astype(np.float16))


def test_cases_are_never_in_memory_all_at_once(tmp_path, monkeypatch):
    config = replace(ModelConfig.preset("demo-brain"), image=(32, 32, 16))
    row = np.full((4, 32, 32, 16), 0.5, np.float32), np.ones((3, 32, 32, 16), bool)
    monkeypatch.setattr(seg, "phantom_cases", lambda config, first, count: (row for _ in range(count)))
    filler, budget = seg.Filler("", "", lambda images, there, seed, study: images / 2), replace(TINY, train=40)
    tracemalloc.start()
    cases = seg.load_cases(config, tmp_path, "phantom", budget)["train"]
    cases = seg.synthesised("train", cases, filler)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(cases.images) == 40 and cases.regions.all() and (cases.images == 0.5).all()
    assert (cases.synthesised == 0.25).all() and peak < cases.images.nbytes / 2


def test_what_the_network_is_given():
    cases = some_cases()
    rows, missing = np.array([2, 0]), np.array([1, 3])
    given = {kind: seg.network_input(cases, rows, missing, kind) for kind in seg.INPUTS}
    assert np.array_equal(given["complete"], cases.images[rows].astype(np.float32))
    for i, (row, element) in enumerate(zip(rows, missing, strict=True)):
        assert not given["missing"][i, element].any()
        assert np.array_equal(given["synthesised"][i, element], cases.synthesised[row, element].astype(np.float32))
        others = np.arange(4) != element
        for kind in seg.INPUTS:
            assert np.array_equal(given[kind][i, others], cases.images[row, others].astype(np.float32))


def test_a_network_learns_and_misses_what_is_blank():
    device, budget = torch.device("cpu"), replace(TINY, steps=40, batch=4, lr=3e-3)
    scores = {}
    for kind in ("missing", "complete"):
        net = seg.train(some_cases(8), kind, budget, 0, device)
        scores[kind] = seg.test(net, some_cases(3, seed=1), kind, device)
    assert scores["complete"].shape == (3, 4, 3)
    assert scores["complete"][..., 0].mean() > 0.7
    assert scores["missing"][:, 1, 0].mean() < scores["missing"][:, 0, 0].mean(), "only the second modality shows it"


def test_the_summary_leaves_out_subjects_without_a_region():
    scores = {kind: np.full((2, 3, 4, 3), 0.5) for kind in seg.INPUTS}
    for values in scores.values():
        values[:, 2, :, 2] = np.nan
    scores["synthesised"][:, :2] += 0.1
    scores["synthesised"][:, 2, :, :2] += 0.1
    table = seg.summarise(scores, ("a", "b", "c", "d"))["dice"]
    assert table["synthesised"]["enhancing tumour"]["subjects"] == 2
    assert table["synthesised"]["enhancing tumour"]["mean"] == pytest.approx(0.6)
    assert table["missing"]["average"]["mean"] == pytest.approx(0.5)
    assert table["synthesised"]["average"]["difference"]["mean"] == pytest.approx(0.1)


@pytest.mark.filterwarnings("error")
def test_a_region_that_nobody_has_is_null_and_a_dash(tmp_path):
    scores = {kind: np.full((2, 1, 4, 3), 0.5) for kind in seg.INPUTS}
    for values in scores.values():
        values[..., 2] = np.nan
    summary = seg.summarise(scores, ("a", "b", "c", "d"))
    assert summary["dice"]["complete"]["enhancing tumour"]["mean"] is None
    about = {"model": "m", "data": "d", "elements": list("abcd"), "budget": vars(TINY), "train": 1, "test": 1}
    report = about | {"beside": {}, "skipped": [{"reason": "x: is damaged"}]} | summary
    path, text = (path.read_text() for path in seg.write_report(report | {"odd": [np.nan]}, tmp_path))
    assert "NaN" not in path and json.loads(path)["odd"] == [None]
    assert "| left blank | 50.0 | 50.0 | – | 50.0 |" in text and "- x: is damaged" in text


def test_a_deviation_is_of_a_sample():
    scores = {kind: np.full((1, 2, 4, 3), 0.5) for kind in seg.INPUTS}
    scores["missing"][:, 1] = 0.7
    assert seg.summarise(scores, "abcd")["dice"]["missing"]["average"]["sd"] == pytest.approx(0.02**0.5)


def test_a_comparison_is_reported_and_kept(model_folder, tmp_path, monkeypatch):
    drawn = some_cases(5, checkpoint.read_config(model_folder("demo-brain")).image)
    source = iter(list(zip(drawn.images.astype(np.float32), drawn.regions, strict=True)))
    monkeypatch.setattr(seg, "phantom_cases", lambda config, first, count: [next(source) for _ in range(count)])
    model = str(model_folder("demo-brain"))
    report = seg.compare(model, tmp_path, device="cpu", budget=TINY)
    assert report["train"] == 3 and report["test"] == 2 and set(report["dice"]) == set(seg.INPUTS)
    paths = seg.write_report(report, tmp_path)
    assert json.loads(paths[0].read_text())["dice"] == json.loads(json.dumps(report["dice"]))
    assert paths[1].read_text().count("| synthesised |") == 3
    assert report["model"] == model and set(report["weights"]) == {"tokenizer", "denoiser"}

    def refuse(*given):
        raise AssertionError("done again")

    monkeypatch.setattr(seg, "phantom_cases", lambda *given: map(refuse, [0]))
    monkeypatch.setattr(seg, "train", refuse)
    assert seg.compare(model, tmp_path, device="cpu", budget=TINY) == report
    with pytest.raises(AssertionError, match="done again"):
        seg.compare(model, tmp_path, device="cpu", budget=replace(TINY, steps=3))


def test_hearts_are_refused(model_folder, tmp_path):
    with pytest.raises(CopeditError, match="brain tumours"):
        seg.compare(str(model_folder("demo-cardiac")), tmp_path, device="cpu", budget=TINY)
    assert ModelConfig.preset("demo-cardiac").task == "cardiac"


def test_budgets():
    assert seg.budget_of(False, ["steps=7", "lr=0.5"]) == replace(seg.Budget(), steps=7, lr=0.5)
    assert seg.budget_of(True) == seg.FULL
    for item in ("depth=3", "steps=few", "train=0", "lr=nan", "lr=inf", "crop=7", "crop=20"):
        with pytest.raises(CopeditError, match=f"--set {item}"):
            seg.budget_of(False, [item])
