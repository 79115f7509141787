"""Predictions: never below what the hardware can do, up to date in the documents, and beside what is measured."""

import json

import pytest
import torch

from copedit_bench import predict
from copedit_bench.operators.cases import BATCHES, OPERATORS, directions, floor
from copedit_rt.config import PRESETS


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("gpu", predict.GPUS.values(), ids=lambda gpu: gpu.name)
def test_no_prediction_is_faster_than_the_hardware(op, gpu):
    row = OPERATORS[op]
    itemsize = (row.dtype or torch.bfloat16).itemsize
    for preset in PRESETS.values():
        for batch in BATCHES:
            sizes = row.sizes(preset, batch)
            for direction in directions(op):
                moved, computed = floor(op, direction, sizes, itemsize)
                least = moved / gpu.bandwidth
                if op in predict.PRODUCTS:
                    least = max(least, computed / gpu.products)
                if op == "nearest_code":
                    least = max(least, computed / (predict.LANES * gpu.processors * gpu.clock))
                assert least < predict.operator(op, direction, sizes, itemsize, gpu) < 3.5 * least + 2e-5


def test_products_fill_the_multiprocessors_as_well_as_tiles_let_them():
    gpu = predict.GPUS["H100"]
    rate = 2 * 8192**3 / predict.product(8192, 8192, 8192, gpu) / gpu.products
    assert 0.6 < rate < predict.PRODUCT
    assert predict.product(2304, 768, 768, gpu) > predict.KERNEL + 2 * 2304 * 768**2 / (predict.PRODUCT * gpu.products)


def test_the_last_residual_of_a_block_costs_no_kernels():
    """One gated norm a block would be its second; the first comes with the block before, but where elements are told
    apart, and the last with the final layer."""
    config = PRESETS["brain-brats"]
    counted, blocks = predict.launches(config), config.denoiser.blocks
    assert counted["gated_residual_ada_norm"] == 2 * blocks - 1 and counted["ada_norm"] == 2
    assert counted["axis_attention"] == counted["swiglu"] == blocks
    assert sum(counted.values()) + predict.LOOP < 155


def test_larger_and_slower():
    config, (h100, h200) = PRESETS["brain-brats"], predict.GPUS.values()
    assert predict.sampling(config, 1, 20, h200) < predict.sampling(config, 1, 20, h100)
    assert predict.study(config, 1, "all", 1, h100) < predict.study(config, 1, "all", 20, h100)
    parts = sum(predict.study(config, 2, stage, 20, h100) for stage in ("encode", "sample", "decode"))
    assert predict.study(config, 2, "all", 20, h100) == pytest.approx(parts)
    cold, replayed = (predict.sampling(config, 1, 1, h100, warm) for warm in (False, True))
    assert cold > replayed == pytest.approx(predict.sampling(config, 1, 20, h100) / 20)
    row = {"model": "brain-brats", "stage": "sample", "steps": 1, "batch": 1}
    assert predict.of_row(row, h100) == replayed, "the benchmark captures loops before it times them"
    assert predict.training(config, 32, h100) > 3 * sum(predict.blocks(config, 32, h100).values())


def test_the_document_is_up_to_date():
    """`python -m copedit_bench.predict --write` writes the tables."""
    assert predict.main(["--check"]) == 0


@pytest.mark.parametrize("wrong", ["--wirte", "missing", "--write --check", "--write ."])
def test_what_it_does_not_know_is_refused(tmp_path, monkeypatch, capsys, wrong):
    """Any word was a folder to be made: `--help` wrote its predictions into one of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        predict.main(wrong.split())
    assert not list(tmp_path.iterdir()) and wrong.split()[0] in capsys.readouterr().err


def test_beside_what_was_measured(tmp_path, capsys):
    timings = [
        {"op": "swiglu", "sizes": {"B": 1, "m": 4, "T": 576, "F": 2048}, "direction": "forward", "dtype": "bfloat16"}
        | {"contestant": "ours", "mode": "graph", "median_us": 20.0, "gb_s": 1415.6, "tflop_s": 1.2},
        {"model": "brain-brats", "stage": "sample", "steps": 20, "batch": 1, "contestant": "ours", "median_s": 0.05},
        {"model": "brain-brats", "stage": "denoiser", "batch": 32, "contestant": "ours", "median_s": 0.2},
        {"model": "tiny", "stage": "all", "steps": 2, "batch": 1, "contestant": "ours", "median_s": 0.5},
        {"model": "tiny", "stage": "all", "steps": 2, "batch": 1, "contestant": "eager", "median_s": 0.5},
        {"model": "demo-brain", "stage": "all", "steps": 1, "threads": 2, "contestant": "ours", "median_s": 0.5},
    ]
    report = {"machine": {"name": "NVIDIA H200", "device": "cuda"}, "timings": timings}
    (tmp_path / "some.json").write_text(json.dumps(report))
    assert predict.main([str(tmp_path)]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 4
    swiglu, sample, step, tiny = rows
    seconds = predict.operator("swiglu", "forward", timings[0]["sizes"], 2, predict.GPUS["H200"])
    assert swiglu[2].strip() == "20 µs" and float(swiglu[4]) == pytest.approx(20e-6 / seconds, abs=0.01)
    assert swiglu[5].strip() == "29%"
    assert float(sample[4]) > 1 and float(step[4]) > 1 and tiny[3].strip() == "–"
    assert (tmp_path / "predictions.md").read_text().count("\n|") == 6
