"""What `evaluate` and `sweep` found, as JSON, Markdown tables in the form of the paper's, and a plot per table."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copedit_rt.files import write_atomically
from copedit_rt.task import Task
from copedit_rt.terminal import finite
from copedit_training.evaluation.features import said

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = Mapping[str, Any]
# metric: heading, digits
METRICS = {
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 4),
    "mae": ("MAE", 4),
    "psnr_inside": ("PSNR in mask", 2),
    "ssim_inside": ("SSIM in mask", 4),
    "mae_inside": ("MAE in mask", 4),
    "lpips": ("LPIPS", 4),
}


PLOTS = {
    "evaluation": ("counts", "patterns", "reconstruction", "frechet", "calibration", "heads"),
    "sweep": ("sweep",),
    "side-by-side": ("side-by-side",),
}


def write(
    report: Report,
    text: str,
    folder: Path,
    name: str,
    figures: Callable[[], Iterable[tuple[str, Figure]]] = tuple,
) -> list[Path]:
    """NAME.json and, with its text, NAME.md in a folder; with matplotlib also figures as PNG, each by its own name.
    Those of `PLOTS` that are not drawn this time are removed, as they would be of an earlier report."""
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    write_json(report, paths[0])
    write_atomically(paths[1], text.encode())
    for title, figure in figures() if find_spec("matplotlib") else ():
        paths.append(folder / f"{title}.png")
        save_figure(figure, paths[-1])
    for path in (folder / f"{title}.png" for title in PLOTS.get(name, ())):
        if path not in paths:
            path.unlink(missing_ok=True)
    return paths


def write_json(report: Report, path: Path) -> None:
    """One entry of a list a line, so that two reports can be compared with diff; null for NaN and infinities."""
    parts = []
    for key, value in finite(report).items():
        text = json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n ")
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n ]"
        parts.append(f"{json.dumps(key)}: {text}")
    write_atomically(path, ("{\n " + ",\n ".join(parts) + "\n}\n").encode())


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    """As PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    write_atomically(path, out.getvalue())


def unplotted() -> str | None:
    """What there is to remark where `write` draws no figures."""
    return None if find_spec("matplotlib") else "no plots: matplotlib is not installed (the extra `train` has it)"


def write_report(report: Report, folder: Path) -> list[Path]:
    """evaluation.json, evaluation.md and plots (of a sweep: sweep.*) in a folder."""
    name = "sweep" if "sweep" in report else "evaluation"
    return write(report, markdown(report), folder, name, lambda: plots(report))


# ------------------------------------------------------------------------------------------------------------- tables


def table(header: Sequence[str], body: Iterable[Sequence[str]], left: int) -> list[str]:
    """Lines of a Markdown table, its first `left` columns flush left."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return [f"| {' | '.join(line)} |" for line in (header, rule, *body)]


def markdown(report: Report) -> str:
    """The report as Markdown tables."""
    lines = _sweep(report) if "sweep" in report else _evaluation(report)
    return "\n".join(lines) + "\n"


def _whom(report: Report) -> str:
    if "split" not in report:
        return f"{report['subjects']} simulated subjects ({report['data']}) from seed {report['first_seed']}"
    which = {"test": "held-out subjects", "all": "subjects"}.get(
        report["split"], f"subjects held out by {report['split']}"
    )
    watched = report["people_watched"]
    without = f", without the {watched} that the run was watched on" if watched else ""
    return f"{report['subjects']} {which} of {report['data']}{without}"


def _sweep(report: Report) -> list[str]:
    header = ["solver", "steps", "images", "PSNR (dB)", "SSIM", "MAE", "converged (dB)", "s a study"]
    body = []
    for row in report["sweep"]:
        cells = [f"{row[metric]['mean']:.{METRICS[metric][1]}f}" for metric in ("psnr", "ssim", "mae")]
        last = [f"{row['converged']['mean']:.1f}", f"{row['seconds_per_study']:.2f}"]
        body.append([row["solver"], str(row["steps"]), str(row["images"]), *cells, *last])
    return [
        f"# {report['model']}: quality against steps",
        "",
        f"{_whom(report)}, {len(report['patterns'])} missing patterns, the same noise for every row. Converged: PSNR "
        "against the second-order solver at the most steps.",
        "",
        *table(header, body, 1),
    ]


def _evaluation(report: Report) -> list[str]:
    """Every section is there whatever was asked for: one that is off says so."""
    brain = report["task"] == Task.BRAIN
    mean = f" Means of {report['samples']} samples." if report["samples"] > 1 else ""
    if report.get("seeds", 1) > 1:
        mean += f" Seeds {report['seed']} to {report['seed'] + report['seeds'] - 1}."
    steps, studies = report["steps"], len(report["studies"])
    lines = [
        f"# {report['model']}: quality",
        "",
        f"{_whom(report)} ({studies} {'studies' if studies > 1 else 'study'}), {steps} step{'s' * (steps > 1)} of "
        f"{report['solver']}, "
        f"{report['seconds_per_study']:.2f} s a study.{mean} Mean ± standard deviation over subjects; intensities on "
        f"0..1, on the files' grids. "
        + ("In mask: in the brain, where any image of the truth is above 0." if brain else "Missing slices only."),
    ]
    for title, key in (("count", "by_count"), ("pattern", "by_pattern")):
        lines += ["", f"## By missing {title}", "", *_scores(report[key], "missing" if brain else "missing slabs")]
    if report.get("beside"):
        lines += ["", "## Beside the model", "", *_beside(report)]
    lines += ["", "## Perceptual distances", "", *_distances(report)]
    lines += [
        "",
        "## Reconstruction by the tokenizer",
        "",
        "On the model's grid. Synthesis decodes "
        + ("the nearest codes." if report["quantise"] else "latents as they are."),
        "",
        *_scores(report["reconstruction"], "image"),
        "",
        "## Uncertainty",
        "",
        *_calibration(report),
        "",
        "## What the heads perceive",
        "",
    ]
    body = [[name, str(r["studies"]), f"{r['count']:.1%}", f"{r['which']:.1%}"] for name, r in report["heads"].items()]
    lines += table(["missing", "studies", "number right", "which right"], body, 1)
    if mislabel := report["mislabel"]:
        lines += [
            "",
            f"A T2 named FLAIR: caught in {mislabel['caught']} of {mislabel['studies']} studies; "
            f"correctly named studies flagged: {mislabel['false_alarms']} of {mislabel['studies']}.",
        ]
    if left_out := [*report.get("skipped", ()), *report["impossible"]]:
        lines += ["", "## Left out", ""]
        for item in left_out:
            reason = item.get("reason") or f"{item['study']}: too few slices to take {item['missing']} away alone"
            lines.append(f"- {reason}")
    return lines


def _scores(keys: Report, heading: str) -> list[str]:
    first = next(iter(next(iter(keys.values())).values()))
    metrics = {name: METRICS[name] for name in METRICS if name in first}
    body = [
        [
            key,
            method,
            str(row["images"]),
            *(spread(row[name], digits) for name, (_, digits) in metrics.items()),
        ]
        for key, methods in keys.items()
        for method, row in methods.items()
    ]
    return table([heading, "method", "images", *(title for title, _ in metrics.values())], body, 2)


def spread(value: Report, digits: int) -> str:
    """Mean ± standard deviation, which one subject has not."""
    return f"{value['mean']:.{digits}f}" + ("" if value["sd"] is None else f" ± {value['sd']:.{digits}f}")


COST = ("parameters", "steps", "volumes", "slices", "seconds", "processor_seconds")


def costs(beside: Mapping[str, Report]) -> list[str]:
    """What the training of each method has cost, and, where that was measured, a study."""
    timed = any("seconds_per_study" in row for row in beside.values())
    body = []
    for name, row in beside.items():
        counts = [_thousands(row.get(key)) for key in COST]
        body.append([name, row.get("space", "–"), *counts, *([f"{row['seconds_per_study']:.2f}"] if timed else [])])
    header = ["", "space", "parameters", "steps", "volumes seen", "slices seen"]
    header += ["s of training", "of a processor", *["s a study"] * timed]
    return [
        "Steps, volumes and seconds are of one run's training, of both parts where there are two; a dash: of a model "
        "that is no run. The tokenizer's training is in nobody's budget, which favours methods on latents.",
        "",
        *table(header, body, 2),
    ]


def _beside(report: Report) -> list[str]:
    """What each method has cost, and how it differs from the model."""
    lines = [
        *costs(report["beside"]),
        "",
        "Differences to the model on the same subjects and seeds: mean ± standard error over subjects, and under each "
        "seed. Resolved: more than two standard errors from zero, and the seeds, two at least, agree.",
        "",
    ]
    inside = any("psnr_inside" in row for methods in report["differences"].values() for row in methods.values())
    metrics = ("psnr_inside", "ssim_inside") if inside else ("psnr", "ssim")
    body = []
    for key, methods in report["differences"].items():
        for name, row in methods.items():
            cells = [cell for metric in metrics for cell in difference(row[metric], METRICS[metric][1])]
            body.append([key, name, *cells])
    seeds = ("under each seed", "resolved")
    return [*lines, *table(["missing", "", METRICS[metrics[0]][0], *seeds, METRICS[metrics[1]][0], *seeds], body, 2)]


def difference(row: Report, digits: int) -> list[str]:
    """Cells of a `paired` difference: mean ± standard error, under each seed, whether it is resolved."""
    error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.{digits}f}"
    each = ", ".join(f"{x:+.{digits}f}" for x in row["per_seed"])
    return [f"{row['mean']:+.{digits}f}{error}", each, "yes" if row["resolved"] else "no"]


def _thousands(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _distances(report: Report) -> list[str]:
    files = {name: report["networks"].get(name) for name in ("fid", "fvd", "lpips")}
    lines = ["  \n".join(said({name: Path(path) if path else None for name, path in files.items()}))]
    if not report["frechet"]:
        return lines
    body = []
    for key, methods in report["frechet"].items():
        for method, row in methods.items():
            planes = [f"{name} {number(value)}" for name, value in row.get("planes", {}).items()]
            cells = [number(row.get("fid")), ", ".join(planes), str(row.get("slices", "–"))]
            body.append([key, method, *cells, number(row.get("fvd")), str(row.get("volumes", "–"))])
    header = ["missing", "method", "FID", "by plane", "slices", "FVD", "volumes"]
    return [
        *lines,
        "",
        "Fréchet distances grow as samples get fewer: compare those of equally many. FID is the mean over the planes.",
        "",
        *table(header, body, 2),
    ]


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "–" if value is None else f"{value:.4g}"


def _calibration(report: Report) -> list[str]:
    found = report["calibration"]
    if not found:
        return ["Off: it needs several samples of each study (--samples 2 or more)."]
    body = [[str(r["voxels"]), f"{r['predicted']:.4f}", f"{r['actual']:.4f}"] for r in found["bins"]]
    ence = "not defined, as some voxels do not vary at all" if found["ence"] is None else f"{found['ence']:.3f}"
    lines = [
        f"{report['samples']} samples: the deviation that they predict against the error of their mean, root mean "
        f"squares in bins of equally many voxels. All voxels: predicted {found['predicted']:.4f}, actual "
        f"{found['actual']:.4f}. Expected normalised calibration error: {ence} (0 is perfect).",
    ]
    if report["steps"] == 1:
        lines.append("One sampler step gives nearly the same image whatever the noise: there is hardly any spread.")
    return [*lines, "", *table(["voxels", "predicted", "actual"], body, 0)]


# -------------------------------------------------------------------------------------------------------------- plots


def plots(report: Report) -> Iterator[tuple[str, Figure]]:
    """File name (no ending) and figure per table."""
    if "sweep" in report:
        yield "sweep", _sweep_plot(report["sweep"])
        return
    for name, key in (("counts", "by_count"), ("patterns", "by_pattern"), ("reconstruction", "reconstruction")):
        yield name, _bars(f"{report['model']}: {name}", report[key])
    if report["frechet"]:
        yield "frechet", _frechet_plot(report["frechet"])
    if report["calibration"]:
        yield "calibration", _reliability_plot(report["calibration"], report["samples"])
    yield "heads", _heads_plot(report["heads"])


def _figure(columns: int, width: float, height: float = 3.6) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _grouped(panel: Any, keys: Mapping[str, Mapping[str, Any]], value: Callable[[Any], Any]) -> None:
    """Bars of each method at each key; value(row): height and whisker (None: no bar)."""
    methods = list(dict.fromkeys(method for rows in keys.values() for method in rows))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        found = [(x, value(rows[method])) for x, rows in enumerate(keys.values()) if method in rows]
        bars = [(x + (i - (len(methods) - 1) / 2) * width, *pair) for x, pair in found if pair is not None]
        if bars:
            place, height, whisker = zip(*bars, strict=True)
            panel.bar(place, height, width, yerr=whisker, label=method, error_kw={"linewidth": 1})
    tall = max(map(len, keys)) * len(keys) > 30
    panel.set_xticks(range(len(keys)), list(keys), rotation=90 if tall else 0, fontsize=8)
    panel.grid(axis="y", alpha=0.3)


def _mean_and_spread(name: str, row: Report) -> tuple[float, float]:
    return row[name]["mean"], row[name]["sd"] or 0.0


def _single(name: str, row: Report) -> tuple[float, float] | None:
    return None if row.get(name) is None else (row[name], 0.0)


def _bars(title: str, keys: Mapping[str, Mapping[str, Any]]) -> Figure:
    first = next(iter(next(iter(keys.values())).values()))
    names = [name for name in ("psnr", "ssim", "mae", "lpips") if name in first]
    figure, panels = _figure(len(names), 4.2 * len(names), 4.2)
    figure.suptitle(title)
    for panel, name in zip(panels, names, strict=True):
        _grouped(panel, keys, partial(_mean_and_spread, name))
        panel.set_ylabel(METRICS[name][0])
        if name in ("psnr", "ssim"):  # differences are small beside the values
            low = min(row[name]["mean"] - (row[name]["sd"] or 0.0) for rows in keys.values() for row in rows.values())
            panel.set_ylim(bottom=low - 0.1 * abs(low))
    panels[0].legend(fontsize=7)
    return figure


def _frechet_plot(keys: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, panels = _figure(2, 9.0)
    for panel, name in zip(panels, ("fid", "fvd"), strict=True):
        _grouped(panel, keys, partial(_single, name))
        panel.set(ylabel=name.upper(), xlabel="missing")
    panels[0].legend(fontsize=7)
    return figure


def _reliability_plot(found: Report, samples: int) -> Figure:
    figure, (panel,) = _figure(1, 4.6, 4.4)
    predicted, actual = ([row[name] for row in found["bins"]] for name in ("predicted", "actual"))
    panel.plot(predicted, actual, marker="o", markersize=4, label=f"bins of {samples} samples")
    top = 1.05 * max(*predicted, *actual)
    panel.plot([0, top], [0, top], color="grey", linestyle="--", label="calibrated")
    title = "ENCE undefined" if found["ence"] is None else f"ENCE {found['ence']:.3f}"
    panel.set(
        xlabel="predicted deviation (RMS)", ylabel="actual error (RMS)", title=title, xlim=(0, top), ylim=(0, top)
    )
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure


def _heads_plot(heads: Report) -> Figure:
    figure, (panel,) = _figure(1, 5.0)
    keys = {name: {"number": row["count"], "which": row["which"]} for name, row in heads.items()}
    _grouped(panel, keys, lambda share: (share, 0.0))
    panel.set(xlabel="missing", ylabel="share right", ylim=(0, 1.05))
    panel.legend(fontsize=8, loc="lower right")
    return figure


def _sweep_plot(rows: Sequence[Report]) -> Figure:
    figure, panels = _figure(3, 12.6)
    for solver in dict.fromkeys(row["solver"] for row in rows):
        mine = sorted((row for row in rows if row["solver"] == solver), key=lambda row: row["steps"])
        steps = [row["steps"] for row in mine]
        for panel, name in zip(panels, ("psnr", "ssim"), strict=False):
            panel.plot(steps, [row[name]["mean"] for row in mine], marker="o", label=solver)
            panel.set_ylabel(METRICS[name][0])
        panels[2].plot(steps, [row["seconds_per_study"] for row in mine], marker="o", label=solver)
    panels[2].set_ylabel("s a study")
    for panel in panels:
        panel.set(xlabel="steps", xscale="log")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return figure
