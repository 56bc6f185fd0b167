"""Options from YAML files: files of the user, and the recipes in this folder."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..options import NOT_IN_FILES, build_parser

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(sources: Sequence[str]) -> dict[str, Any]:
    """Return the options of several files; later files override earlier ones.

    Args:
        sources: paths of files, or names of recipes.

    Returns:
        Option names with underscores, and the values as YAML parses them.

    Raises:
        TrainingError: a file or recipe does not exist or is not YAML, a key is not an option, or a value is a list, a
            mapping or a boolean and the option needs another type.
    """
    import yaml

    # argparse has no public list of the actions of a parser.
    options = {action.dest: action for action in build_parser()._actions if action.dest != "help"}
    config: dict[str, Any] = {}
    for source in sources:
        try:
            content = yaml.safe_load(_path_of(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise TrainingError(f"--config {source}: cannot read it: {error.strerror}") from error
        except (yaml.YAMLError, ValueError) as error:
            raise TrainingError(f"--config {source} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise TrainingError(f"--config {source} is not a mapping of options to values")
        for key, value in content.items():
            name = str(key).replace("-", "_")
            try:
                _check(name, value, options)
            except ValueError as error:
                raise TrainingError(f"--config {source}: {key} {error}") from error
            config[name] = value
    return config


def _path_of(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if source in names():
        return FOLDER / f"{source}.yaml"
    close = difflib.get_close_matches(source, names(), n=1)
    advice = f"did you mean {close[0]}?" if close else f"the recipes are {', '.join(names())}"
    raise TrainingError(f"--config {source}: no such file or recipe; {advice}")


def _check(name: str, value: object, options: dict[str, argparse.Action]) -> None:
    """Check that a key is an option and that its value can be written on a command line; the parser checks the rest."""
    if name in NOT_IN_FILES:
        raise ValueError("can only be given on the command line")
    if name not in options:
        close = difflib.get_close_matches(name, set(options) - set(NOT_IN_FILES), n=1)
        raise ValueError("is not an option" + (f"; did you mean {close[0]}?" if close else ""))
    if value is None:
        return
    nargs = options[name].nargs
    if nargs == 0:
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(nargs, int):
        fits, wanted = isinstance(value, list) and len(value) == nargs, f"a list of {nargs} values"
    elif nargs == "+":
        fits, wanted = isinstance(value, list) and len(value) > 0, "a list"
    else:  # YAML parses an unquoted no, off, yes or on as a boolean
        fits, wanted = isinstance(value, str | int | float) and not isinstance(value, bool), "a number or text"
    if not fits:
        raise ValueError(f"must be {wanted}, got {value!r}")
