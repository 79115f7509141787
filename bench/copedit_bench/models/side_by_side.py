"""Whole models side by side: answers first, then times in turns, then JSON and Markdown. `cpu`, `sampler` and
`train_step` say who takes part."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from copedit_bench import machine
from copedit_bench.timing import Lap, Stopwatch, Yardsticks, calls_of, interleave, quantile, sentence
from copedit_rt.config import PRESETS, DenoiserConfig, DiffusionConfig, ModelConfig, TokenizerConfig
from copedit_rt.errors import CopeditError
from copedit_rt.task import Task
from copedit_training.evaluation.report import table

BASELINE = "eager"
SEED = 0
CELL = 2.0  # seconds of samples a contestant
# On some processors the baseline in float32 agrees with float64 by chance (the same order of sums); others then need
# not be nearer than a few roundings of their many layers.
CLOSE = 4 * torch.finfo(torch.float32).eps
# Where nothing is to be learnt but that the harness works.
TINY = ModelConfig(
    "tiny",
    Task.BRAIN,
    ("t1", "t1ce", "t2", "flair"),
    (32, 32, 16),
    TokenizerConfig(
        channels=(8, 8), strides=((2, 2, 2), (2, 2, 2)), residual_units=1, residual_channels=8, codes=64,
        latent_channels=4, prompt_channels=(8, 8), prompt_dim=16, contrast_dim=8,
    ),
    DenoiserConfig(width=64, heads=2, blocks=4),
    DiffusionConfig(steps=4),
)  # fmt: skip

Answer = Mapping[str, Tensor]


def chosen(presets: Sequence[str] | None, usual: Sequence[str], device: torch.device) -> list[ModelConfig]:
    """The models to measure: of these presets, of the usual ones, or on a CPU the tiny one.

    Raises CopeditError for a preset that does not exist, for one with a prior, and for any on a CPU.
    """
    if unknown := [name for name in presets or () if name not in PRESETS]:
        raise CopeditError(f"preset {unknown[0]!r} is unknown; choose among {', '.join(PRESETS)}")
    if presets and device.type != "cuda":
        raise CopeditError(f"preset {presets[0]!r}: on a CPU a tiny model takes the place of presets; leave it out")
    models = [PRESETS[name] for name in presets or usual] if device.type == "cuda" else [TINY]
    if own := [config.name for config in models if config.denoiser.prior]:
        raise CopeditError(f"preset {own[0]!r} starts from a prior, which plain PyTorch does not; leave it out")
    return models


@dataclass(frozen=True)
class Contestant:
    """One way to do a piece of work. call: what is timed. answer: its results by name, the first thing that is asked
    for (None: what `call` returns)."""

    call: Callable[[], Any]
    dtype: torch.dtype
    answer: Callable[[], Answer] | None = None


class SideBySide:
    """Checks and timings of one run on one device."""

    def __init__(self, title: str, device: torch.device, dtypes: set[torch.dtype], memory: str, **settings: Any):
        """memory: what peak memory is of, in words. settings: for the report."""
        settings["memory"] = memory
        self.title, self.device, self.watch = title, device, Stopwatch(device)
        self.settings, self.start, self.load = settings, time.perf_counter(), os.getloadavg()[0]
        with self.watch.stream():
            self.sticks = Yardsticks(self.watch, dtypes)
            self.sticks.measure()
        self.machine = machine.describe(device)
        self.checks: list[dict[str, Any]] = []
        self.timings: list[dict[str, Any]] = []
        self.extra: dict[str, Any] = {}  # further figures for the report,
        self.notes: list[str] = []  # and sentences

    def absent(self, what: Mapping[str, Any], name: str, reason: str) -> None:
        """Note that someone cannot take part."""
        self.checks.append({**what, "contestant": name, "status": "unavailable", "note": reason})

    def run(
        self,
        what: Mapping[str, Any],
        contestants: Mapping[str, Callable[[], Contestant]],
        exact: Answer | None,
        operations: float = 0.0,
        items: int = 1,
        budget: float = CELL,
    ) -> None:
        """what: names of the piece of work, such as {"stage": "encode", "batch": 1}. contestants: makers, by name; the
        baseline of each type first. exact: the right results (None: the first contestant's, which is then judged by
        nobody, and the others by a fixed bound). operations: of the piece of work, for rates. items: what a throughput
        counts.
        """
        laps: dict[str, Lap] = {}
        clocks: dict[str, list[float]] = {}
        facts: dict[str, dict[str, Any]] = {}
        low: dict[torch.dtype, float] = {}
        independent = exact is not None
        with self.watch.stream():
            for name, make in contestants.items():
                self.watch.free()
                held = self._reserved()
                try:
                    one = make()
                    found = one.answer() if one.answer else one.call()
                    exact = found if exact is None else exact
                    error = distance(found, exact)
                    del found
                    self.watch.free()
                    held = self._reserved() - held
                    peak = self.watch.peak(one.call)
                except Exception as problem:
                    self.checks.append({**what, "contestant": name, "status": "failed", "note": sentence(problem)})
                    continue
                eps = torch.finfo(one.dtype).eps
                allowed = 2 * max(low[one.dtype], CLOSE) + eps if one.dtype in low else 32 * eps
                right = error <= allowed  # false for NaN
                check = {"error": error if math.isfinite(error) else None, "tolerance": allowed}
                self.checks.append({**what, "contestant": name, "status": "ok" if right else "wrong", **check})
                if not right:
                    continue
                if independent:  # how near to one another contestants are does not tell how near others can be
                    low.setdefault(one.dtype, error)
                clocks[name] = []
                once = self.watch.sample(Lap(one.call, 1))
                calls = calls_of(once, 1) if once < 1e-3 else 1
                laps[name] = Lap(_clocked(one.call, calls, clocks[name]), calls)
                facts[name] = {"dtype": _plain(one.dtype), "peak_bytes": None if peak is None else held + peak}
            samples, broken = interleave(laps, self.watch, budget * len(laps))
            self.sticks.measure()
        for name, reason in broken.items():
            self.checks.append({**what, "contestant": name, "status": "failed", "note": reason})
        for name, values in samples.items():
            median = quantile(values, 0.5)
            self.timings.append(
                {
                    **what,
                    "contestant": name,
                    **facts[name],
                    "median_s": median,
                    "low_s": quantile(values, 0.1),
                    "high_s": quantile(values, 0.9),
                    # Of the process: where others take turns on the cores, the wall clock counts theirs as well.
                    "processor_s": quantile(clocks[name][1:] or clocks[name], 0.5),
                    "samples": len(values),
                    "per_second": items / median,
                    "tflop_s": operations / median / 1e12 or None,
                }
            )

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def report(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "format": 1,
            "title": self.title,
            "machine": self.machine,
            "settings": {
                **self.settings,
                "seed": SEED,
                "threads": torch.get_num_threads(),
                "load_before": round(self.load, 2),
                "load_after": round(os.getloadavg()[0], 2),
            },
            "seconds": time.perf_counter() - self.start,
            "yardsticks": self.sticks.report(),
            "checks": self.checks,
            "timings": self.timings,
            **self.extra,
            "notes": self.notes,
        }


def _clocked(call: Callable[[], Any], calls: int, clock: list[float]) -> Callable[[], None]:
    def run() -> None:
        start = time.process_time()
        for _ in range(calls):
            call()
        clock.append((time.process_time() - start) / calls)

    return run


def distance(found: Answer, exact: Answer) -> float:
    """The greatest of the results' relative errors, root mean square; infinite where one is missing."""
    if found.keys() != exact.keys():
        return float("inf")
    errors = [] if exact else [float("inf")]
    for name, truth in exact.items():
        wide = truth.double()
        size = wide.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        errors.append(float((found[name].double().to(wide.device) - wide).square().mean().sqrt() / size))
    return max(errors, key=lambda error: error if error == error else float("inf"))


@torch.no_grad()
def perturb(net: nn.Module) -> None:
    """Move the weights of a fresh network, whose zero-initialised layers would return zeros."""
    generator = torch.Generator().manual_seed(SEED)
    for p in net.parameters():
        if p.is_floating_point():
            scale = 0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p))


# ---------------------------------------------------------------------------------------------------- results


def markdown(report: Mapping[str, Any]) -> str:
    about, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in about["packages"].items() if number)
    lines = [
        f"# {report['title']} on {about['name']}",
        "",
        f"{about['date']}, commit {about['commit'] or 'unknown'}{' with changes' * about['changed']}. Python "
        f"{about['python']}, {versions}. {settings['threads']} threads; load of the machine "
        f"{settings['load_before']} before, {settings['load_after']} after; {report['seconds']:.0f} s in all.",
        *_processor(about),
        "",
        "Median and half the distance between the deciles; the fastest of its row is bold. In brackets processor time, "
        "where it differs by more than a tenth. Contestants take turns; each was right before it was timed.",
        "",
    ]
    sticks = report["yardsticks"]["product"]
    products = (f"{dtype} {stick['median'] / 1e12:.4g} TFLOP/s" for dtype, stick in sticks.items())
    lines += [f"Matrix product of this run: {', '.join(products)}.", "", *tables(report), "", *remarks(report)]
    lines += [""] * bool(report["notes"]) + [f"- {note}" for note in report["notes"]]
    return "\n".join(lines) + "\n"


def _processor(about: Mapping[str, Any]) -> list[str]:
    if "flags" not in about:
        return []
    memory = f"{about['memory_bytes'] / 2**30:.0f} GiB" if about["memory_bytes"] else "memory unknown"
    flags = ", ".join(about["flags"]) or "none that matters"
    return ["", f"{about['cores']} cores, {memory}; flags: {flags}. torch uses {about['torch_uses']}."]


def tables(report: Mapping[str, Any]) -> list[str]:
    """Times, and memory and rates where they were measured."""
    rows = report["timings"]
    if not rows:
        return ["Nothing has been timed."]
    facts = ("contestant", "dtype", "peak_bytes", "median_s", "low_s", "high_s", "processor_s", "samples")
    names = [
        key for key in dict.fromkeys(k for row in rows for k in row) if key not in (*facts, "per_second", "tflop_s")
    ]
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((*(row.get(name, "") for name in names), row["dtype"]), {})[row["contestant"]] = row
    body, extra = [], []
    for key, group in groups.items():
        best = min(group, key=lambda name: group[name]["median_s"])
        line = [*map(str, key), *(_cell(group.get(name), name == best) for name in contestants)]
        ratio = "–"
        if "ours" in group and BASELINE in group:
            ratio = f"{group[BASELINE]['median_s'] / group['ours']['median_s']:.2f}"
        body.append([*line, ratio])
        memory = [group[name]["peak_bytes"] if name in group else None for name in contestants]
        rates = [group[name]["tflop_s"] if name in group else None for name in contestants]
        if any(x is not None for x in (*memory, *rates)):
            product = report["yardsticks"]["product"].get(key[-1], {}).get("median")
            extra.append(
                [
                    *map(str, key),
                    *("–" if x is None else f"{x / 2**20:,.0f}" for x in memory),
                    *("–" if x is None else f"{x:.3g} ({1e12 * x / product:.0%})" for x in rates),
                ]
            )
    left: list[str] = [*names, "type"]
    lines = table([*left, *contestants, f"{BASELINE} / ours"], body, len(left))
    if extra:
        heads = [f"{name}, {unit}" for unit in ("MiB", "TFLOP/s") for name in contestants]
        lines += [
            "",
            f"Peak memory {report['settings']['memory']}; rate of the reference's operations and its share of",
        ]
        lines += ["the product:"]
        lines += ["", *table([*left, *heads], extra, len(left))]
    return lines


def _cell(row: Mapping[str, Any] | None, best: bool) -> str:
    if row is None:
        return "–"
    text = f"{seconds(row['median_s'])} ±{seconds((row['high_s'] - row['low_s']) / 2)}"
    if abs(row["processor_s"] / row["median_s"] - 1) > 0.1:
        text += f" ({seconds(row['processor_s'])})"
    return f"**{text}**" if best else text


def seconds(value: float) -> str:
    """In the unit that fits."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Who was wrong, failed or could not take part."""
    labels = ("contestant", "status", "note", "error", "tolerance")
    lines = []
    for check in report["checks"]:
        if check["status"] != "ok":
            what = ", ".join(f"{k} {v}" for k, v in check.items() if k not in labels)
            error = "not finite" if check.get("error") is None else f"{check['error']:.2g}"
            why = check.get("note") or f"error {error}, allowed {check['tolerance']:.2g}"
            lines.append(f"- {check['contestant']} ({what}): {check['status']}, {why}")
    return lines or ["All answers were right."]


def verify(report: Mapping[str, Any]) -> None:
    """CopeditError where we were wrong or failed."""
    bad = [c for c in report["checks"] if c["contestant"] == "ours" and c["status"] in ("wrong", "failed")]
    if bad:
        raise CopeditError(f"ours did not give the right answer: {remarks({'checks': bad})[0].removeprefix('- ')}")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
