"""Configuration of Sphinx: `make docs` builds the pages and the API reference into build/docs."""

import os
import re
from pathlib import Path
from typing import Any

import sparsecnx

project = "sparsecnx"
author = copyright = "The sparsecnx authors"
release = sparsecnx.__version__
html_title = f"sparsecnx {release}"
html_theme = "furo"
html_copy_source = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
default_role = "literal"  # Docstrings mark code with single backticks.
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False

FOLDER = Path(__file__).parent
SOURCES = "https://github.com/sparsecnx/sparsecnx/blob/main"


def link_to_sources(app: Any, page: str, source: list[str]) -> None:
    """Let links to files outside docs/ lead to GitHub; in the clone they are relative."""

    def replace(link: re.Match[str]) -> str:
        target = os.path.relpath((FOLDER / page).parent / link[1], FOLDER.parent)
        return link[0] if target.startswith("docs") else f"]({SOURCES}/{target})"

    source[0] = re.sub(r"\]\((\.\./[^)]*)\)", replace, source[0])


def mark_formulas(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Show the indented lines after a colon and a blank line as they are: formulas and code in docstrings."""
    for number, (line, blank, following) in enumerate(zip(lines, lines[1:], lines[2:], strict=False)):
        if line.endswith(":") and not blank and following.startswith(line[: len(line) - len(line.lstrip())] + "    "):
            lines[number] = f"{line}:"


def setup(app: Any) -> None:
    app.connect("source-read", link_to_sources)
    app.connect("autodoc-process-docstring", mark_formulas, priority=0)  # before napoleon
