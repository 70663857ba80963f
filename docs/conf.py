"""Sphinx configuration. Build with: python -m sphinx -W -b html docs docs/_build/html"""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "ringmark"
author = "ringmark contributors"
copyright = "ringmark contributors, Apache-2.0"  # the name that Sphinx reads
release = version = installed_version("ringmark")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_click", "plain_reference"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
autodoc_preserve_defaults = True
add_module_names = False
python_maximum_signature_line_length = 100

highlight_language = "none"
smartquotes = False  # they would turn --option into –option
html_theme = "furo"
html_title = "ringmark"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["ringmark.css"]
