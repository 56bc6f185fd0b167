"""The documentation builds without a warning: links between pages, anchors, references, formulas, figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_docs_build_without_a_warning(tmp_path):
    for module in ("sphinx", "myst_parser", "furo", "sphinx-mathjax-offline", "lightning", "transformers", "timm"):
        pytest.importorskip(module)  # of the extra docs
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-d", tmp_path / "trees"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, ROOT / "docs", tmp_path / "html"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (tmp_path / "html").glob("*.html")} - {"genindex", "py-modindex", "search"}
    assert pages == {path.stem for path in (ROOT / "docs").glob("*.md")}
    options = (tmp_path / "html" / "options.html").read_text(encoding="utf-8")
    assert "--curvature-interval" in options
    assert "SOURCE" in options
