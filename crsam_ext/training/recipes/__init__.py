"""Options in YAML files: those that a user has, and the recipes in this folder."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import TrainingError

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(sources: Sequence[str]) -> dict[str, Any]:
    """The options in some files, the later ones on top; names have underscores, values are as YAML has them.

    Args:
        sources: paths of files, or names of recipes.

    Raises:
        TrainingError: there is no such file or recipe, it is no YAML, or it has a key that is no option.
    """
    import yaml

    config: dict[str, Any] = {}
    for source in sources:
        path = _path_of(source)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TrainingError(f"--config {source}: cannot read it: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise TrainingError(f"--config {source} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise TrainingError(f"--config {source} is not a mapping of options to values")
        for key, value in content.items():
            config[_checked(str(key).replace("-", "_"), source)] = value
    return config


def _path_of(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    recipe = FOLDER / f"{source}.yaml"
    if source in names():
        return recipe
    close = difflib.get_close_matches(source, names(), n=1)
    advice = f"did you mean {close[0]}?" if close else f"the recipes are {', '.join(names())}"
    raise TrainingError(f"--config {source}: there is no such file or recipe; {advice}")


def _checked(key: str, source: str) -> str:
    from ..options import NOT_IN_FILES, build_parser

    known = sorted(set(vars(build_parser().parse_args([]))) - set(NOT_IN_FILES))
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        raise TrainingError(f"--config {source}: {key} is no option" + (f"; did you mean {close[0]}?" if close else ""))
    return key
