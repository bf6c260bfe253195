"""Configuration of the documentation."""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path

from sphinx.application import Sphinx

project = "postlocal"
copyright = "2026, the postlocal authors"
author = "the postlocal authors"
release = version = installed("postlocal")

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))  # `benchmarks` is not part of the package

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"postlocal {release}"
pygments_style = "default"  # the theme's own does not colour diffs
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# A word in single backquotes is a name of this package where there is one, else plain code.
default_role = "code"


def index_arguments(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Put every documented argument into the index, under its name, with whose it is."""
    owner = name.removeprefix("postlocal.").rsplit(".", 1)[-1]
    inside = False
    entries = []
    for line in lines:
        if line.strip() in ("Args:", "Attributes:"):
            inside, kind = True, "argument" if line.strip() == "Args:" else "attribute"
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and (found := re.fullmatch(r"    (\w+): .*", line)):
            entries.append(f"   single: {found[1]} ({kind} of {owner})")
    if entries:
        lines += ["", ".. index::", *entries, ""]


def offer_records(app: Sphinx, page: str, source: list[str]) -> None:
    """Make links to records downloads: their Markdown is not a page of the documentation."""
    link = r"\[([^]]+)\]\((\S*benchmarks/records/\S+\.md)\)"
    source[0] = re.sub(link, r"{download}`\1 <\2>`", source[0])


def drop_blank_ends(app: Sphinx, page: str, source: list[str]) -> None:
    """Drop the blank line before a closing fence, which ends the output of a doctest."""
    source[0] = re.sub(r"\n\n```(?=\n|$)", "\n```", source[0])


def setup(app: Sphinx) -> None:
    """Sphinx calls this. The index is made before napoleon rewrites the arguments."""
    app.connect("source-read", drop_blank_ends)
    app.connect("source-read", offer_records)
    app.connect("autodoc-process-docstring", index_arguments, priority=100)
