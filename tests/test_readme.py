"""The README's Python snippets run as printed, one after the other, and so does the example in CRSAM's docstring."""

import inspect
import re
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from crsam_ext import CRSAM, GraphedStep

from .test_graphs import stand_in  # noqa: F401

README = Path(__file__).parents[1] / "README.md"


def fenced():
    """Language and text of each block of code."""
    text = README.read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_python_is_in_fences_that_say_so():
    """Or the test below would pass it by."""
    text = re.sub(r"^```python\n.*?^```", "", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    others = re.findall(r"(?:^ {4}.+\n)+", text, flags=re.MULTILINE)
    others += re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert others
    for block in others:
        with pytest.raises(SyntaxError):
            compile(textwrap.dedent(block), str(README), "exec")


@pytest.fixture
def process_group(tmp_path):
    """That of one process, for the snippet of several."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("needs_gpu", [False, True])
def test_snippets_run(needs_gpu, stand_in, process_group, monkeypatch):  # noqa: F811
    """One after the other; those for a GPU with the CPU and a stand-in for the graph in its place."""
    names: dict[str, object] = {}
    torch.manual_seed(0)
    ran = {True: 0, False: 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for language, snippet in fenced():
            on_gpu = 'device="cuda"' in snippet
            if language != "python" or (on_gpu and not needs_gpu):
                continue
            if on_gpu:
                snippet = snippet.replace('"cuda"', '"cpu"')
                names["loader"] = [(names["x"], names["y"])] * 5
                steps = names["optimizer"].stats.steps
            exec(compile(snippet, str(README), "exec"), names)
            ran[on_gpu] += 1
            if on_gpu:
                assert isinstance(names["step"], GraphedStep)
                assert names["optimizer"].stats.steps == steps + 5
                assert stand_in.captured > 0
    assert ran[False] >= 4
    assert ran[True] == needs_gpu
    assert torch.isfinite(names["loss"])


def test_the_example_in_the_docstring_of_crsam_runs():
    text = inspect.getdoc(CRSAM).partition("Example::\n")[2].partition("\nNote:")[0]
    names: dict[str, object] = {}
    exec(textwrap.dedent(text), names)
    assert torch.isfinite(names["loss"])
