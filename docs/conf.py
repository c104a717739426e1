"""Settings of the documentation: `make docs` builds it to docs/_build/html."""

import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

import sb3_reinforce

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from inventories import write_inventories  # noqa: E402

project = "sb3-reinforce"
author = "sb3-reinforce contributors"
copyright = f"2026, {author}"
version = release = sb3_reinforce.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx.ext.viewcode", "sphinx_copybutton"]
intersphinx_mapping = write_inventories(HERE / "_build" / "inventories")
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"sb3-reinforce {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
# Fonts, scripts and formulas are part of the pages, which need no network
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_block"]
myst_heading_anchors = 3
# Keep the quotes of argument values straight, so that they can be copied
smartquotes_action = "De"
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


def add_parameters(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Add SB3's fields to the docstrings of methods that have none and override a method of SB3."""
    overridden = getattr(OnPolicyAlgorithm, name.rpartition(".")[2], None)
    if what == "method" and overridden is not None and not any(line.startswith(":param") for line in lines):
        text = inspect.getdoc(overridden) or ""
        lines.extend(text[text.find(":param") :].splitlines() if ":param" in text else [])


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", add_parameters)
    # Sphinx only reads files below this folder
    shutil.copyfile(HERE.parent / "examples" / "lunar_lander.ipynb", HERE / "lunar_lander.ipynb")
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
