"""A measurement as JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copedit_bench.operators.cases import OPERATORS
from copedit_bench.timing import TIME_UP
from copedit_training.evaluation.report import table, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = Mapping[str, Any]
PRESET = "brain-brats"  # of the plot and of the short tables


def write_report(report: Report, folder: Path) -> list[Path]:
    """kernels.json, kernels.md and, with matplotlib, kernels.png."""
    return write(report, markdown(report), folder, "kernels", lambda: [("kernels", plot(report))])


# -------------------------------------------------------------------------------------------------- Markdown


def markdown(report: Report) -> str:
    """The whole report."""
    lines = [f"# Operators on {report['machine']['name']}", "", *description(report)]
    for op in measured(report):
        lines += ["", f"## {op}"]
        for mode in modes(report, op):
            title = "each call replayed from a CUDA graph" if mode == "graph" else "each call from Python"
            lines += ["", f"Microseconds, {title}:", "", *full_table(report, op, mode)]
        if any(row["peak_bytes"] is not None for row in rows(report, op)):
            lines += ["", "Peak extra memory in MiB, results included:", "", *memory_table(report, op)]
        lines += ["", *check_list(report, op)]
    lines += ["", "## Python", "", "Microseconds a call on tensors too small to matter:", "", *overhead_table(report)]
    return "\n".join(lines) + "\n"


def summary(report: Report) -> str:
    """What the command prints: the short table of each operator, and what was not measured."""
    lines = [f"{report['machine']['name']}: {yardsticks(report)}"]
    for op in measured(report):
        lines += ["", op, *short_table(report, op, PRESET), *check_list(report, op, everything=False)]
    return "\n".join([*lines, "", "Python, microseconds a call:", *overhead_table(report)])


def description(report: Report) -> list[str]:
    """Machine, versions, yardsticks and method, in sentences."""
    about, packages = report["machine"], report["machine"]["packages"]
    versions = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
    lines = [
        f"{about['date']}, commit {about['commit'] or 'unknown'}{' with changes' * about['changed']}, "
        f"kernels {about['sources']}, COPEDIT_KERNELS={about['kernels']}. Python {about['python']}, {versions}. "
        f"{report['settings']['dtype']}; {report['seconds']:.0f} s in all."
    ]
    if about["device"] == "cuda":
        after = report.get("clocks_after", {})
        lines += [
            f"Driver {about['driver']}, CUDA {about['cuda']}, cuDNN {about['cudnn']}; power limit "
            f"{about['power_limit_w']} W; SM clock {about['sm_clock_mhz']} MHz before and {after.get('sm_clock_mhz')} "
            f"after (at most {about['sm_clock_max_mhz']}), memory {about['memory_clock_mhz']} MHz."
        ]
    return [
        *lines,
        f"Yardsticks of this run: {yardsticks(report)}.",
        "",
        "Median and half the distance between the deciles; the fastest is bold. Shares compare the floor of "
        "`docs/kernels.md` with the yardstick. Contestants take turns; inputs rotate so that none stays in the L2 "
        "cache; every contestant was checked against float64 before. torch.compile and FlexAttention compile for one "
        "shape each (dynamic=False), at the shapes that show a number.",
    ]


def yardsticks(report: Report) -> str:
    sticks = report["yardsticks"]
    texts = [f"copy {_rate(sticks['copy'], 1e9)} GB/s"]
    texts += [f"{dtype} product {_rate(stick, 1e12)} TFLOP/s" for dtype, stick in sticks["product"].items()]
    return ", ".join(texts)


def _rate(stick: Mapping[str, float], unit: float) -> str:
    return f"{stick['median'] / unit:.4g} ({stick['low'] / unit:.4g} to {stick['high'] / unit:.4g})"


def rows(report: Report, op: str, mode: str | None = None) -> list[dict[str, Any]]:
    return [row for row in report["timings"] if row["op"] == op and mode in (None, row["mode"])]


def measured(report: Report) -> list[str]:
    ops = {check["op"] for check in report["checks"]}
    return [op for op in OPERATORS if op in ops]


def modes(report: Report, op: str) -> list[str]:
    """graph before eager."""
    return sorted({row["mode"] for row in rows(report, op)}, reverse=True)


def _contestants(report: Report, op: str) -> list[str]:
    timed = {row["contestant"] for row in rows(report, op)}
    return [p for p in dict.fromkeys(c["contestant"] for c in report["checks"] if c["op"] == op) if p in timed]


def _groups(found: Sequence[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Rows of one shape and direction together, by contestant; in the order of presets and batch."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(found, key=lambda r: (r["presets"], list(r["sizes"].values()))):
        key = json.dumps([row["sizes"], row["direction"]])
        groups.setdefault(key, {})[row["contestant"]] = row
    return list(groups.values())


def _number(value: float, digits: int) -> str:
    """So many digits, and never an exponent."""
    return f"{value:.{digits}g}" if value < 10**digits else f"{value:,.0f}"


def _cell(row: Mapping[str, Any] | None, key: str = "median_us", best: bool = False) -> str:
    if row is None:
        return "–"
    text = f"{_number(row[key], 4)} ±{_number((row['high_us'] - row['low_us']) / 2, 2)}"
    return f"**{text}**" if best else text


def _share(op: str) -> tuple[str, str]:
    return ("product_share", "of product") if OPERATORS[op].compute_bound else ("copy_share", "of copy")


def _names(group: Mapping[str, dict[str, Any]]) -> list[str]:
    row = next(iter(group.values()))
    sizes = " ".join(f"{letter}={number}" for letter, number in row["sizes"].items())
    return [", ".join(row["presets"]), sizes, row["direction"]]


def full_table(report: Report, op: str, mode: str) -> list[str]:
    """Every shape, direction and contestant."""
    contestants, (share, title) = _contestants(report, op), _share(op)
    body = []
    for group in _groups(rows(report, op, mode)):
        best = min(group, key=lambda p: group[p]["median_us"])
        ours = f"{group['ours'][share]:.0%}" if "ours" in group else "–"
        body.append([*_names(group), ours, *(_cell(group.get(p), best=p == best) for p in contestants)])
    return table(["used by", "shape", "pass", f"ours, {title}", *contestants], body, 3)


def memory_table(report: Report, op: str) -> list[str]:
    """Peak memory of every shape, direction and contestant."""
    contestants = _contestants(report, op)
    body = []
    for group in _groups(rows(report, op, "eager")):
        cells = [_number(group[p]["peak_bytes"] / 2**20, 4) if p in group else "–" for p in contestants]
        body.append([*_names(group), *cells])
    return table(["used by", "shape", "pass", *contestants], body, 3)


def short_table(report: Report, op: str, preset: str) -> list[str]:
    """Ours beside the fastest other and the baseline, at one preset's shapes; as CUDA graphs where there are some."""
    found = modes(report, op)
    if not found:
        return []
    share, title = _share(op)
    body = []
    for group in _groups(rows(report, op, found[0])):
        others = [p for p in group if not p.startswith("ours")]
        if preset not in _names(group)[0].split(", ") and preset in _presets(report, op):
            continue
        ours = group.get("ours")
        line = [*_names(group)[1:], _cell(ours), f"{ours[share]:.0%}" if ours else "–"]
        for other in (min(others, key=lambda p: group[p]["median_us"], default=None), _plainest(others)):
            if other is None or ours is None:
                line += ["–", "–"]
            else:
                ratio = group[other]["median_us"] / ours["median_us"]
                line += [f"{other} {_cell(group[other])}", f"{ratio:.2f}"]
        body.append(line)
    header = ["shape", "pass", "ours, µs", title, "fastest other, µs", "ratio", "plain PyTorch, µs", "ratio"]
    return table(header, body, 2)


def _presets(report: Report, op: str) -> set[str]:
    return {preset for row in rows(report, op) for preset in row["presets"]}


def _plainest(contestants: Sequence[str]) -> str | None:
    """The one that stands for PyTorch as users write it."""
    return next((p for p in ("eager", "cdist", "sdpa-flash", "sdpa-math") if p in contestants), None)


def check_list(report: Report, op: str, everything: bool = True) -> list[str]:
    """Who was right, and why the others were not timed; without `everything`, only what went wrong or did not fit."""
    found: dict[str, dict[str, list[str]]] = {}
    checks = [check for check in report["checks"] if check["op"] == op]
    for check in checks:
        shape = " ".join(f"{letter}={number}" for letter, number in check["sizes"].items())
        reasons = list(check.get("broken", []))
        if check["status"] == "wrong":
            error = "not finite" if check["error"] is None else f"{check['error']:.2g}"
            reasons.append(f"WRONG, not timed: {check['note']}, error {error}, allowed {check['tolerance']:.2g}")
        elif check["status"] == "failed" or (everything and check["status"] != "ok") or check["note"] in TIME_UP:
            reasons.append(f"{check['status']}, {check['note']}")
        for reason in reasons:
            found.setdefault(reason, {}).setdefault(check["contestant"], []).append(shape)
    lines = []
    for reason, contestants in found.items():
        shapes = list(dict.fromkeys(shape for own in contestants.values() for shape in own))
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        lines.append(f"- {', '.join(contestants)}: {reason} ({shapes[0]}{more})")
    if everything:
        right = [check for check in checks if check["status"] == "ok"]
        worst = max((check["error"] / check["tolerance"] for check in right if check["tolerance"]), default=0.0)
        lines.insert(0, f"- {len(right)} answers right, the worst with {worst:.0%} of the error that is allowed")
    return lines


def overhead_table(report: Report) -> list[str]:
    """Python's share: ours beside the baseline, forward and both."""
    body = []
    for entry in report["overhead"]:
        text = entry.get("note", "–") if entry["us"] is None else _cell(entry, "us")
        body.append([entry["op"], entry["contestant"], entry["direction"], text])
    return table(["operator", "contestant", "pass", "µs"], body, 3)


# ------------------------------------------------------------------------------------------------------ plot


def _first(row: Mapping[str, Any]) -> int:
    """The size that grows with the batch."""
    return next(iter(row["sizes"].values()))


def plot(report: Report) -> Figure:
    """Microseconds over the batch, one row of panels an operator, one line a contestant."""
    from matplotlib.figure import Figure

    ops = measured(report)
    figure = Figure(figsize=(15, 3.4 * len(ops)), layout="constrained")
    panels = figure.subplots(len(ops), 3, squeeze=False)
    figure.suptitle(f"{report['machine']['name']}, {report['settings']['dtype']}: median and deciles")
    for line, op in zip(panels, ops, strict=True):
        mode = next(iter(modes(report, op)), "eager")
        preset = PRESET if PRESET in _presets(report, op) else min(_presets(report, op), default=PRESET)
        found = [row for row in rows(report, op, mode) if preset in row["presets"]]
        for panel, direction in zip(line, ("forward", "backward", "both"), strict=True):
            ticks = sorted({_first(row) for row in found})
            for name in _contestants(report, op):
                mine = [row for row in found if (row["contestant"], row["direction"]) == (name, direction)]
                mine.sort(key=_first)
                if not mine:
                    continue
                middle = [row["median_us"] for row in mine]
                spread = [
                    [row["median_us"] - row["low_us"] for row in mine],
                    [row["high_us"] - row["median_us"] for row in mine],
                ]
                places = [ticks.index(_first(row)) for row in mine]
                width = 2.5 if name == "ours" else 1.0
                panel.errorbar(places, middle, spread, label=name, marker="o", markersize=3, linewidth=width)
            if not panel.lines:
                panel.set_axis_off()
                continue
            panel.set(yscale="log", ylabel="µs", title=f"{op}, {direction} ({preset}, {mode})")
            panel.set_xticks(range(len(ticks)), [f"{tick:,}" for tick in ticks])
            panel.set_xlabel("vectors" if op == "nearest_code" else "batch")
            panel.grid(alpha=0.3, which="both")
            panel.legend(fontsize=7)
    return figure
