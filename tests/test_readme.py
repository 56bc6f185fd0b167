"""The code in README.md and docs/ works: Python runs, command lines are understood, recipes are read.

The Python blocks of a page run one after the other, with the names of the quick start (docs/quickstart.md) from the
beginning. A block that is neither run nor parsed follows a comment, ``<!-- not run: KEY -->``, and has a reason below.
"""

import inspect
import re
import shlex
import shutil
import subprocess
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from crsam_ext import CRSAM, GraphedStep, bench
from crsam_ext.training import checkpoint, options, prepare, recipes

from .test_graphs import stand_in  # noqa: F401

markdown_it = pytest.importorskip("markdown_it")

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK_START = ROOT / "docs" / "quickstart.md"

REASONS = {
    "Slurm": "needs Slurm; bash checks the syntax, and the call of crsam-train in it is parsed",
    "timm": "changes train.py of timm, which is not part of its package",
}
NEEDS = {"trainers": ["tensorboard"], "curvature": ["scipy"]}  # besides torch
HARMLESS = ("cd", "git", "tar")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    not_run: str | None  # the key of a reason

    def __str__(self):
        return f"{self.page.stem}-{self.line}"


def read(page):
    """Return the blocks of code, and the commands within sentences, each with its line."""
    blocks, inline, before = [], [], None
    for token in markdown_it.MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            language = token.info.split(maxsplit=1)[0] if token.info else ""
            marker = re.fullmatch(r"<!-- not run: (.+) -->\n", before.content) if before is not None else None
            blocks.append(Block(page, token.map[0] + 1, language, token.content, marker and marker[1]))
        for child in token.children or ():
            if child.type == "code_inline":
                inline.append((token.map[0] + 1, child.content))
        before = token if token.type == "html_block" else None
    return blocks, inline


BLOCKS = [block for page in PAGES for block in read(page)[0]]


def of(language):
    return [block for block in BLOCKS if block.language == language and not block.not_run]


def test_every_block_is_run_parsed_or_has_a_reason():
    """Directives in braces are Sphinx's; tests/test_docs.py builds the pages."""
    for block in BLOCKS:
        assert block.language in ("python", "bash", "yaml") or block.language.startswith("{") or block.not_run, block
    assert {block.not_run for block in BLOCKS if block.not_run} == set(REASONS)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.not_run], ids=str)
def test_blocks_that_are_not_run(block):
    if block.language == "bash":
        check_syntax(block)
        for call in re.findall(r"^ *crsam-train (.+)", block.text, flags=re.MULTILINE):
            options.parse([word for word in shlex.split(call) if word != "$resume"])
    pytest.skip(REASONS[block.not_run])


def check_syntax(block):
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


# Python --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    """Start a process group of one process, for snippets that are written for several processes."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def run(block, names, graphs):
    """Run a block. A block for a GPU runs on the CPU, with a stand-in for the graph."""
    text, steps = block.text, None
    if 'device="cuda"' in text:
        text = text.replace('device="cuda"', 'device="cpu"')
        names["loader"] = [(names["x"], names["y"])] * 5
        steps = names["optimizer"].stats.steps
    exec(compile("\n" * block.line + text, str(block.page), "exec"), names)
    if steps is not None:
        assert isinstance(names["step"], GraphedStep)
        assert names["optimizer"].stats.steps == steps + 5
        assert graphs.captured > 0


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}), ids=lambda page: page.stem)
def test_python_runs(page, stand_in, process_group, monkeypatch, tmp_path):  # noqa: F811
    for library in NEEDS.get(page.stem, []):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in of("python"):
            if block.page == QUICK_START != page and page.name != "README.md":
                run(block, names, stand_in)
        for block in of("python"):
            if block.page == page:
                run(block, names, stand_in)
    if "loss" in names:
        assert torch.isfinite(names["loss"])


# Commands ------------------------------------------------------------------------------------------------------------


def commands(text):
    """Yield the commands of a script as lists of words, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
                continue
            while words and re.match(r"\w+=", words[0]):
                del words[0]
            if words:
                yield words
            words = []


def check(words):
    """Raise an exception if a command would be refused."""
    program, *arguments = words
    if program == "crsam-train":
        check_training(arguments)
    elif program in ("torchrun", "python"):
        at = arguments.index("-m") if "-m" in arguments else None
        if at is None:
            assert (ROOT / next(word for word in arguments if word.endswith(".py"))).is_file(), words
        else:
            check_module(arguments[at + 1], arguments[at + 2 :])
    elif program == "crsam-bench":
        with pytest.raises(FileNotFoundError):  # the result files of the text
            bench.main(arguments)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets, words
    elif program == "pytest":
        known = set(re.findall(r'addoption\("(--\w+)"', (ROOT / "benchmarks" / "conftest.py").read_text()))
        assert {word for word in arguments if word.startswith("--")} <= known, words
    elif program == "pip":
        assert arguments[0] == "install", words
        section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
        extras = set(re.findall(r"^(\w+) = \[", section.partition("\n[")[0], flags=re.MULTILINE))
        assert {word for part in re.findall(r"\[([\w,]+)\]", " ".join(words)) for word in part.split(",")} <= extras
    else:
        assert program in HARMLESS, words


def check_training(arguments):
    if arguments[:1] == ["prepare"]:
        prepare._parse(arguments[1:])
    elif "--help" not in arguments:
        options.parse(arguments)


def check_module(name, arguments):
    if name == "crsam_ext.training":
        return check_training(arguments)
    if name == "build":
        return None
    path = ROOT.joinpath(*name.split("."))
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
    text = path.with_suffix(".py").read_text() if path.with_suffix(".py").is_file() else ""
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in text, (name, option)
    return None


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write the YAML files of the pages, and simulate the checkpoints that commands name."""
    monkeypatch.chdir(tmp_path)
    for block in of("yaml"):
        name = re.match(r"# (\S+\.yaml)", block.text)
        assert name is not None, f"{block} does not begin with the name of its file"
        Path(name[1]).write_text(block.text, encoding="utf-8")
    monkeypatch.setattr(checkpoint, "load", lambda path: {"config": {"model": "resnet50"}})


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_commands_are_understood(block, files):
    check_syntax(block)
    for words in commands(block.text):
        check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_within_sentences_are_understood(page, files):
    for line, code in read(page)[1]:
        if re.match(r"(make|crsam-train|crsam-bench|pytest|torchrun|python -m|pip install) ", code):
            try:
                for words in commands(code):
                    check(words)
            except Exception as error:
                raise AssertionError(f"{page.name}:{line}: {code}: {error}") from error


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_recipes_are_read(block, files):
    recipes.read([re.match(r"# (\S+\.yaml)", block.text)[1]])


def test_the_example_in_the_docstring_of_crsam_runs():
    text = inspect.getdoc(CRSAM).partition("Example::\n")[2].partition("\nNote:")[0]
    names: dict[str, object] = {}
    exec(textwrap.dedent(text), names)
    assert torch.isfinite(names["loss"])
