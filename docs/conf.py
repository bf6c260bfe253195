"""Configuration of the documentation."""

from importlib.metadata import version as installed

project = "postlocal"
copyright = "2026, the postlocal authors"
author = "the postlocal authors"
release = version = installed("postlocal")

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
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# A word in single backquotes is a name of this package where there is one, else plain code.
default_role = "code"
