"""Configuration of Sphinx, and a directive that shows the options of ``crsam-train``."""

import io
import os
import re
from contextlib import redirect_stdout, suppress
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive

import crsam_ext
from crsam_ext.training.__main__ import main

project = "crsam_ext"
author = "The crsam_ext authors"
project_copyright = author
version = release = crsam_ext.__version__

extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon",
    "sphinx.ext.mathjax", "sphinx-mathjax-offline",  # MathJax is part of the site, which so needs no network
]  # fmt: skip
exclude_patterns = ["_build"]
smartquotes_action = "De"  # dashes; quotes stay straight, as in code

html_theme = "furo"
html_title = f"crsam_ext {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["layout.css"]

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False

nitpicky = True
nitpick_ignore_regex = [
    # Python and torch have documentation of their own. Their inventories are on the network, which a build may lack.
    (r"py:.*", r"(torch|collections|typing|contextlib|argparse|random|numpy)\..*"),
    (r"py:class", r"(Any|Callable|GradBucket|Iterable|Iterator|Mapping|Optimizer|ProcessGroup|Sequence|Tensor|nn\..*)"),
    # Internal modules, classes and constants that docstrings name and no page shows.
    (r"py:.*", r"crsam_ext\.(backends|host|reuse|step)(\..*)?"),
    (r"py:.*", r"(Bucket|Plan|COUNTERS|REGULARIZERS)"),
    # Shapes in sections "Returns", which napoleon takes for types.
    (r"py:class", r"(float64 tensor|groups|num_groups|GRAM)"),
]


class ProgramHelp(Directive):
    """What ``crsam-train`` prints for the arguments, ``--help`` or ``prepare --help``, at the time of the build."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        output = io.StringIO()
        with mock.patch.dict(os.environ, COLUMNS="90"), redirect_stdout(output), suppress(SystemExit):
            main(self.arguments[0].split())
        return [nodes.literal_block(output.getvalue(), output.getvalue(), language="text")]


def prepare_page(app, docname: str, source: list[str]) -> None:
    """Make links to Markdown files outside this folder downloads, not pages; keep numbers and units in one line."""
    text = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", source[0])
    source[0] = re.sub(r"(?<=\d) (?=[±%]|[kMGT]?B\b|[mu]?s\b)|(?<=±) (?=\d)", "\u00a0", text)


def keep_colons(app, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep napoleon from taking what precedes a colon in the first line of an attribute's docstring for its type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def setup(app) -> dict[str, bool]:
    """Register what is defined above."""
    app.add_directive("program-help", ProgramHelp)
    app.connect("source-read", prepare_page)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # napoleon has 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
