"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .ranks import started


def is_quiet() -> bool:
    """Return whether this process prints nothing: in a distributed run only rank 0 prints."""
    return started()[0] > 0


def warn(line: str) -> None:
    """Print one line on stderr."""
    if is_quiet():
        return
    print(f"crsam-train: {' '.join(line.split())}", file=sys.stderr, flush=True)


def say(line: str, console: Console | None = None) -> None:
    """Print one line on stdout, without wrapping or color."""
    if is_quiet():
        return
    (console or Console()).print(line, soft_wrap=True, highlight=False, markup=False)


class Bar:
    """The progress of a run: the epoch, the batch within it, and all steps."""

    def __init__(self, bar: Progress, epochs: int, steps: int, done: int) -> None:
        self._bar, self._epochs, self._steps = bar, epochs, steps
        self._task = bar.add_task(self._text(done), total=epochs * steps, completed=done)

    def step(self, done: int) -> None:
        """Set the number of steps taken."""
        self._bar.update(self._task, completed=done, description=self._text(done))

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        say(text, self._bar.console)

    def _text(self, done: int) -> str:
        epoch = min(done // self._steps, self._epochs - 1)
        return f"epoch {epoch + 1}/{self._epochs}  batch {done - epoch * self._steps}/{self._steps}"


def new_bar() -> Progress:
    """Return a progress bar that shows the description of its task; it is disabled if stdout is not a terminal."""
    console = Console()
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    return Progress(*columns, console=console, disable=is_quiet() or not console.is_terminal, transient=True)


@contextmanager
def progress(epochs: int, steps: int, done: int) -> Iterator[Bar]:
    """Show the progress of a run of ``epochs`` times ``steps`` steps; ``done`` steps are already taken."""
    with new_bar() as bar:
        yield Bar(bar, epochs, steps, done)
