"""Configuration of Sphinx."""

from __future__ import annotations

import cellplm_tl

project = "cellplm_tl"
author = "the cellplm_tl developers"
copyright = f"2026, {author}"
version = release = cellplm_tl.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}

autosummary_generate = True
autodoc_typehints = "none"  # the text says types, with shapes; a test holds both equal
autodoc_member_order = "bysource"
numpydoc_class_members_toctree = False
numpydoc_show_class_members = False

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # outputs are stored: scripts/run_tutorials.py makes them

html_theme = "sphinx_book_theme"
html_title = "cellplm_tl"
