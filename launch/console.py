"""What the commands share: the answer as JSON, progress bars, values for people."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")]


@contextlib.contextmanager
def answering(as_json: bool) -> Iterator[Callable[[Any], None]]:
    """Gives the function that prints a command's answer.

    With --json, what libraries print on stdout (also from C++) goes to stderr, and the answer is all that stdout gets.
    """
    if not as_json:
        yield lambda answer: None
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    answers: list[Any] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield answers.append
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    for answer in answers:
        print(json.dumps(answer, ensure_ascii=False, indent=2))


@contextlib.contextmanager
def progress_bar(what: str, in_bytes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with an ETA on stderr; gives the function to call with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_values(values: dict[str, Any]) -> None:
    """One line a value, nested ones with their keys joined by dots."""
    for name, value in _flatten(values):
        print(f"{name}: {value:,.5g}" if isinstance(value, float) else f"{name}: {value}")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
