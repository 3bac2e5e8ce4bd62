"""Sphinx configuration: ``make docs`` builds the site with warnings as errors."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_ext"))

import mmrec  # noqa: E402

project = "mmrec"
author = "the mmrec maintainers"
version = release = mmrec.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "generated_pages",  # docs/_ext
]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
smartquotes_action = "D"  # dashes, but no quotes

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "mmrec"
html_static_path = ["_static"]
html_css_files = ["mmrec.css"]
html_copy_source = False
html_show_copyright = False
