"""Every command that a document shows is one: its options exist, and what it needs is given. None is run."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from copedit_rt.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "copedit_rt/weights").glob("*/*.md")]
COMMAND = re.compile(r"^ +(?:\S*torchrun .*?-m copedit_rt|(?:\.venv/bin/)?copedit) ((?:.*\\\n)*.*)$", re.M)


def commands(page: Path) -> list[str]:
    """Indented lines that begin with copedit, without it; a backslash at the end goes on with the next one."""
    return [line.replace("\\\n", " ") for line in COMMAND.findall(page.read_text("utf-8"))]


@pytest.fixture(scope="module")
def parser() -> Any:
    """The whole command line, of which no command does anything."""

    def silence(command: Any) -> Any:
        for one in getattr(command, "commands", {}).values():
            silence(one)
        if not hasattr(command, "commands"):
            command.callback = lambda **_: None
        return command

    return silence(typer.main.get_command(app))


def refusal(parser: Any, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says of wrong usage; nothing where there is none."""
    with pytest.raises(SystemExit) as left:
        parser.main(shlex.split(line, comments=True), prog_name="copedit")
    said = capsys.readouterr()
    return f"copedit {line}: {said.err}" if left.value.code else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_the_documents(page: Path, parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [refusal(parser, line, capsys) for line in commands(page)]
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_there_are_commands_and_wrong_ones_are_noticed(parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(len(commands(page)) for page in PAGES) > 50
    for line in ("synth -o x --nonsense", "train tokenizer", "analyze x -o y"):
        assert "Error" in refusal(parser, line, capsys) or "error" in refusal(parser, line, capsys), line
