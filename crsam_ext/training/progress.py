"""What a run shows while it works: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .ranks import started


def is_quiet() -> bool:
    """Whether another process speaks for this one: of those that torchrun starts, the first does."""
    return started()[0] > 0


def warn(line: str) -> None:
    """Print one line on stderr."""
    if is_quiet():
        return
    print(f"crsam-train: {' '.join(line.split())}", file=sys.stderr, flush=True)


def say(line: str, console: Console | None = None) -> None:
    """Print one line on stdout as it is, neither wrapped nor coloured."""
    if is_quiet():
        return
    (console or Console()).print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def progress(total: int, completed: int) -> Iterator[tuple[Callable[[], None], Callable[[str], None]]]:
    """Show the progress of ``total`` steps; yields two functions, one to advance a step and one to print a line."""
    console = Console()
    columns = (TextColumn("training"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=is_quiet() or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total, completed=completed)
        yield lambda: bar.advance(task), lambda line: say(line, console)
