"""What became of a cohort, whoever worked on it: several processes and machines may share one output folder.

Each process leaves a file of its entries there. What is on the disk decides whether a study is done; the files tell
what went wrong and how long it took.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copedit_rt.errors import printable
from copedit_rt.files import write_atomically

if TYPE_CHECKING:
    from rich.console import RenderableType

NAME = "copedit_summary"
# What is kept of an entry.
KEPT = {
    *("study", "task", "status", "overwrite", "model", "model_name", "outputs", "preview", "report", "dicom"),
    *("seconds", "notes", "error", "remark"),
}
OUTCOMES = ("done", "complete", "failed", "not done")  # complete: nothing is missing; not done: or only in part
LEFT = OUTCOMES[2:]


def keep(entries: Iterable[Mapping[str, Any]], output: Path, number: int, of: int) -> Path:
    """Leave the entries of process `number`, from 0, of `of` in the output folder. A study
    that was kept has the seconds of the run that made it."""
    before = gather(output)
    path = output / (f"{NAME}.json" if of == 1 else f"{NAME}_{number + 1}of{of}.json")
    short = [{key: _below(value, output) for key, value in entry.items() if key in KEPT} for entry in entries]
    for entry in short:
        if entry["status"] == "kept" and "seconds" in (made := before.get(entry["study"], {})):
            entry["seconds"] = made["seconds"]
    write_atomically(path, (json.dumps({"studies": short}, indent=2, default=str) + "\n").encode())
    return path


def _below(value: Any, output: Path) -> Any:
    """Paths from the output folder on, which may have another name elsewhere."""
    if isinstance(value, dict):
        return {key: _below(part, output) for key, part in value.items()}
    if isinstance(value, str) and Path(value).is_relative_to(output):
        return Path(value).relative_to(output).as_posix()
    return value


def gather(output: Path) -> dict[str, dict[str, Any]]:
    """The newest entry of every study that any process left, and when ("noted", ns); files that cannot be read are
    passed over."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(output.glob(f"{NAME}*.json"), key=lambda path: path.stat().st_mtime_ns):
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["studies"]
            noted = {"noted": path.stat().st_mtime_ns}
            news = {str(entry["study"]): dict(entry) | noted for entry in entries}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        for name, entry in news.items():
            before = found.get(name, {})
            if entry.get("status") == "kept" and before.get("status") == "written":
                continue  # that says more
            found[name] = entry
    return dict(sorted(found.items()))


def judge(there: Sequence[Mapping[str, Any]], output: Path) -> list[dict[str, Any]]:
    """An entry with its outcome for every study. there: what `cohort.Job.look_ahead` says of each now."""
    told, rows = gather(output), []
    for now in there:
        before = told.get(now["study"], {})
        outcome = {"kept": "done", "complete": "complete"}.get(now["status"], "not done")
        if outcome == "done" and before.get("status") == "failed" and before.get("overwrite") and _later(before, now):
            outcome = "not done"  # what was to be replaced is there still
        if outcome == "not done" and (error := now.get("error") or before.get("error")):
            outcome, before = "failed", before | {"error": error}
        if before.get("status") == "complete" and outcome == "not done":  # a heart, as only its voxels tell
            outcome = "complete"
        kept = {key: before[key] for key in ("seconds", "notes", "report", "preview") if key in before}
        row = {"study": now["study"], "outcome": outcome, "model": now.get("model"), "outputs": now.get("outputs", {})}
        if now.get("outlived"):
            row["outlived"] = now["outlived"]
        rows.append(row | kept | ({"error": before["error"]} if outcome == "failed" else {}))
    return rows


def _later(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an entry was noted after all that was written of its study."""
    return all(Path(path).stat().st_mtime_ns < before["noted"] for path in now["sidecars"].values())


def count(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many studies have which outcome."""
    counts = Counter(row["outcome"] for row in rows)
    return {outcome: counts[outcome] for outcome in OUTCOMES}


def render(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> RenderableType:
    """A table of studies, and under it the counts of all."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("study", "outcome", "synthesised", "model", "seconds", "error or note"):
        table.add_column(heading, overflow="fold")
    style = {"failed": "red", "not done": "yellow"}
    for row in rows:
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        made = ", ".join(row["outputs"]) if row["outcome"] == "done" else ""
        cells = [row["study"], row["outcome"], made, str(row["model"] or ""), seconds]
        told = row.get("error") or "; ".join(row.get("outlived", ()))
        shown = [Text(printable(cell)) for cell in (*cells, told)]
        table.add_row(*shown, style=style.get(row["outcome"], ""))
    said = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
    return Group(table, f"{sum(counts.values())} studies: {said}")
