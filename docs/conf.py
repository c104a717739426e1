"""Settings of the documentation: `make docs` builds it to docs/_build/html."""

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import sb3_reinforce

HERE = Path(__file__).parent

project = "sb3-reinforce"
author = "sb3-reinforce contributors"
copyright = f"2026, {author}"
version = release = sb3_reinforce.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"sb3-reinforce {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
# Fonts, scripts and formulas are part of the pages, which need no network
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_block"]
myst_heading_anchors = 3
# Show the committed outputs, which `make notebook` renews
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
highlight_language = "text"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def inline_math(translator: Any, node: nodes.Node) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_math(translator: Any, node: nodes.Node) -> None:
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    # Sphinx only reads files below this folder
    shutil.copyfile(HERE.parent / "examples" / "lunar_lander.ipynb", HERE / "lunar_lander.ipynb")
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
