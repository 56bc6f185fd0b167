"""The README's Python snippets run as printed, one after the other."""

import re
import warnings
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(snippets) >= 4
    torch.manual_seed(0)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for snippet in snippets:
            exec(compile(snippet, str(README), "exec"), names)
    assert torch.isfinite(names["loss"])
