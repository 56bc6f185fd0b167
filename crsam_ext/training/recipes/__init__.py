"""Options in YAML files: those that a user has, and the recipes in this folder."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..options import NOT_IN_FILES, build_parser

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(sources: Sequence[str]) -> dict[str, Any]:
    """The options in some files, the later ones on top; names have underscores, values are as YAML has them.

    Args:
        sources: paths of files, or names of recipes.

    Raises:
        TrainingError: there is no such file or recipe, it is no YAML, it has a key that is no option, or an option has
            a list, a mapping or a truth value where it takes something else.
    """
    import yaml

    # argparse lists the actions of a parser nowhere else.
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
    raise TrainingError(f"--config {source}: there is no such file or recipe; {advice}")


def _check(name: str, value: object, options: dict[str, argparse.Action]) -> None:
    """Refuse what is no option, and what its words on a command line could not say. The parser checks the rest."""
    if name in NOT_IN_FILES:
        raise ValueError("is for the command line alone")
    if name not in options:
        close = difflib.get_close_matches(name, set(options) - set(NOT_IN_FILES), n=1)
        raise ValueError("is no option" + (f"; did you mean {close[0]}?" if close else ""))
    if value is None:
        return
    nargs = options[name].nargs
    if nargs == 0:
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(nargs, int):
        fits, wanted = isinstance(value, list) and len(value) == nargs, f"a list of {nargs} values"
    elif nargs == "+":
        fits, wanted = isinstance(value, list) and len(value) > 0, "a list"
    else:  # YAML reads an unquoted no, off, yes or on as a truth value
        fits, wanted = isinstance(value, str | int | float) and not isinstance(value, bool), "a number or text"
    if not fits:
        raise ValueError(f"takes {wanted}, but is {value!r}")
