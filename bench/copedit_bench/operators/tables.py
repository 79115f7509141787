"""`python -m copedit_bench.operators.tables` writes floors, tile sizes and measurements into docs/kernels.md.

They stand there between markers:

`<!-- floor OPERATOR -->`, `<!-- tiles OPERATOR -->` and `<!-- measured OPERATOR -->` begin a table, `<!-- end -->` ends
it. Tile sizes are read from the kernels' modules. Measured are the runs in bench/results/*/kernels.json that were made
on a GPU. With --check nothing is written, and the exit code is 1 if the file is not up to date.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch

from copedit_bench.operators.cases import BATCHES, OPERATORS, floor
from copedit_bench.operators.report import PRESET, short_table, yardsticks
from copedit_kernels import activation, attention_token, convolution, norm, rotary, sampler_step
from copedit_rt.config import PRESETS
from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs/kernels.md"
RESULTS = ROOT / "bench/results"
NOTHING = "Not measured yet: no GPU run so far. `bench/gpu.sh deep` on a machine with a GPU fills this table."
MARKER = r"<!-- (floor|tiles|measured) (\w+) -->"
MARKED = re.compile(MARKER + r"\n(?:(?!<!-- (?:floor|tiles|measured) ).)*?<!-- end -->", re.DOTALL)
TILES: dict[str, dict[int, Any]] = {
    "ada_norm": norm.TILES,
    "swiglu": activation.TILES,
    "conv3": convolution.TILES,
    "partial_ddim_step_": sampler_step.TILES,
}


def runs(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Folder name -> report of every recorded run on a GPU."""
    found = {path.parent.name: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/kernels.json"))}
    return {name: report for name, report in found.items() if report["machine"]["device"] == "cuda"}


def floor_table(op: str) -> list[str]:
    """Formulas, and their values for the brain at the smallest and largest batch."""
    row, dtype = OPERATORS[op], OPERATORS[op].dtype or torch.bfloat16
    small, large = (row.sizes(PRESETS[PRESET], batch) for batch in (min(BATCHES), max(BATCHES)))
    values = [f"{letter}={number}" if number == large[letter] else letter for letter, number in small.items()]
    lines = [
        f"| pass | bytes | operations | batch {min(BATCHES)} | batch {max(BATCHES)} |",
        "|---|---|---|--:|--:|",
    ]
    for direction, (moved, computed) in row.floors.items():
        numbers = [floor(op, direction, shape, dtype.itemsize) for shape in (small, large)]
        cells = [f"{size / 1e6:.4g} MB, {work / 1e9:.4g} G" for size, work in numbers]
        lines.append(f"| {direction} | `{moved}` | `{computed}` | {' | '.join(cells)} |")
    name = str(dtype).removeprefix("torch.")
    return [*lines, "", f"Values for {PRESET} in {name}: {', '.join(values)}; G is 10⁹ operations."]


def tiles_table(op: str) -> list[str]:
    """The named tile sizes of an operator, by architecture; those of attention also by head dimension."""
    if op != "axis_attention_token":
        fields = next(iter(TILES[op].values()))._fields
        body = [[f"sm_{architecture}", *map(str, tile)] for architecture, tile in TILES[op].items()]
        return [f"| | {' | '.join(fields)} |", f"|---|{'--:|' * len(fields)}", *(f"| {' | '.join(r)} |" for r in body)]

    def text(tile: attention_token.Tile) -> str:
        return f"{tile.BQ} × {tile.BK}, {tile.warps}, {tile.stages}"

    lines = [f"| queries × keys, warps, stages | {' | '.join(f'D = {dim}' for dim in rotary.HALVES)} |"]
    lines += [f"|---|{'---|' * len(rotary.HALVES)}"]
    for title, table in (
        ("forward", attention_token.FORWARD),
        ("backward, dq", attention_token.BACKWARD_Q),
        ("backward, dk and dv", attention_token.BACKWARD_KV),
        ("float32 forward", attention_token.FORWARD_32),
        ("float32 backward, both", attention_token.BACKWARD_32),
    ):
        for architecture, dims in table.items():
            lines.append(f"| {title}, sm_{architecture} | {' | '.join(text(dims[dim]) for dim in rotary.HALVES)} |")
    return [*lines, "", "Types of 16 bits where a row does not say float32."]


def measured_table(op: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """The short table of every recorded run."""
    lines: list[str] = []
    for name, report in found.items():
        table = short_table(report, op, PRESET)
        if table:
            about = report["machine"]
            title = f"{about['name']}, {report['settings']['dtype']}, torch {about['packages']['torch']}, triton"
            title += f" {about['packages']['triton']}, commit {str(about['commit'] or about['sources'])[:12]}"
            lines += [f"{title}; {yardsticks(report)} (all of it: [{name}](../bench/results/{name}/kernels.md)):", ""]
            lines += [*table, ""]
    return lines[:-1] or [NOTHING]


def filled(text: str, found: dict[str, dict[str, Any]]) -> str:
    """A document with every marked table written anew. Raises CopeditError for a marker without an end of its own."""
    ended = MARKED.findall(text)
    for kind, op in (marker for marker in re.findall(MARKER, text) if marker not in ended):
        raise CopeditError(f"{DOCUMENT.name}: <!-- {kind} {op} --> lacks a line <!-- end --> before the next marker")

    def table(match: re.Match[str]) -> str:
        kind, op = match.groups()
        tables = {"floor": floor_table, "tiles": tiles_table, "measured": lambda op: measured_table(op, found)}
        lines = tables[kind](op)
        return "\n".join([f"<!-- {kind} {op} -->", "", *lines, "", "<!-- end -->"])

    return MARKED.sub(table, text)


def main(arguments: list[str]) -> int:
    parser = ArgumentParser("copedit_bench.operators.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="end with 1 where the document is not up to date")
    check = parser.parse_args(arguments).check
    text = DOCUMENT.read_text("utf-8")
    new = filled(text, runs())
    if check:
        return int(new != text)
    write_atomically(DOCUMENT, new.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
