"""Configuration of Sphinx, and a directive that shows the options of ``crsam-train``."""

import io
import os
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

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"crsam_ext {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

nitpicky = True
nitpick_ignore_regex = [
    # Python and torch have documentation of their own. Their inventories are on the network, which a build may lack.
    (r"py:.*", r"(torch|collections|typing|argparse|random|numpy)(\..*)?"),
    (r"py:.*", r"(Any|Callable|Iterable|Iterator|Sequence|Mapping|AbstractContextManager|defaultdict|Optimizer)"),
    (r"py:.*", r"(ProcessGroup|Tensor|GradBucket|Future|SummaryWriter|LightningModule|Trainer|Callback)"),
    (r"py:.*", r"(nn|dist|torch|optim)\..*"),
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


def setup(app) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("program-help", ProgramHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
