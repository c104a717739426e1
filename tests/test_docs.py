"""
README, documentation and notebook: code runs, links are valid, and arguments, log keys and error messages are complete.

Code blocks marked ``python`` run in order, with one namespace and one temporary folder per page. Whole numbers of at least
10,000 are replaced by 2,000, and ``n_eval_episodes`` by 2. A comment on the line before a block makes an exception:

- ``<!-- skip: REASON -->``: the block is compiled, but does not run;
- ``<!-- needs: PACKAGE -->``: the block is skipped if the package is missing.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from stable_baselines3.common.logger import KVWriter, Logger

from benchmarks.notebook import NOTEBOOK, execute
from benchmarks.where import TASKS
from benchmarks.why import PAIRS
from sb3_reinforce import REINFORCE
from tests.test_api import PUBLIC

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "sb3_reinforce"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

BLOCK = re.compile(
    r"(?:<!-- (?P<mark>skip|needs): (?P<what>.+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
FENCE = re.compile(r"^(```+|~~~+).*?^\1$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
DIRECTIVE = re.compile(r"^```\{(?:image|include|figure)\} (\S+)", re.MULTILINE)
#: Blocks filled by scripts in benchmarks/
FILLED = {
    "README.md": ["headline", "peers", "stops"],
    "docs/advantages.md": ["advantages", "variance"],
    "docs/benchmarks.md": ["article", "beside", "league", "learning", "mujoco", "soak", "throughput"],
    "docs/scaling.md": ["paper", "threads", "workers"],
    "docs/step.md": ["search", "step-table"],
    "docs/where.md": [f"where-{task}" for task in TASKS],
    "docs/why.md": [f"why-{name}" for name in PAIRS],
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[re.Match, str]]:
    """Return the code blocks of a page, padded so that line numbers in tracebacks match the page."""
    text = page.read_text(encoding="utf-8")
    return [(match, "\n" * text.count("\n", 0, match.start("code")) + match["code"]) for match in BLOCK.finditer(text)]


def shorten(code: str) -> str:
    code = re.sub(r"\bn_eval_episodes=\d+", "n_eval_episodes=2", code)
    return re.sub(r"(?<![\w.])\d[\d_]*\b(?!\.)", lambda number: number[0] if int(number[0]) < 10_000 else "2_000", code)


#: Starts processes and a Dask cluster
SLOW = pytest.param(DOCS / "scaling.md", marks=pytest.mark.slow)


@pytest.mark.parametrize("page", [*(page for page in PAGES if blocks(page) and page.name != "scaling.md"), SLOW], ids=name_of)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # Pickle functions by value for workers, like those of a script
    namespace: dict[str, Any] = {"__name__": "__main__"}
    missing = []
    for match, code in blocks(page):
        compiled = compile(shorten(code), str(page), "exec")
        if match["mark"] == "needs" and importlib.util.find_spec(match["what"]) is None:
            missing.append(match["what"])
        elif match["mark"] != "skip":
            exec(compiled, namespace)
    if missing:
        pytest.skip(f"the other blocks ran; not installed: {', '.join(missing)}")


@pytest.mark.slow
def test_the_example_of_the_readme_reaches_the_return_of_the_headline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    for _, code in blocks(ROOT / "README.md"):
        exec(compile(code, "README.md", "exec"), {"np": np})
    mean, _ = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out))
    headline = (ROOT / "README.md").read_text().split("<!-- headline -->")[1]
    iqm, worst = map(float, re.search(r"IQM (\d+) .*?worst (\d+)", headline).groups())  # type: ignore[union-attr]
    assert mean > worst - 20 and abs(mean - iqm) < 30


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub and MyST create for headings."""
    if path.suffix == ".ipynb":
        text = "\n\n".join(markdown_cells(path))
    elif path.suffix == ".md":
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
    else:
        return set()
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r"^\((.+)\)=$", text, re.MULTILINE))


def markdown_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def documented_objects() -> set[str]:
    """Return the full names of all objects in api.md."""
    text, names, module, owner = (DOCS / "api.md").read_text(), set(), "", ""
    for line in text.splitlines():
        if match := re.match(r"\.\. (currentmodule|automodule|autoclass|autofunction|autodata):: (\S+)", line):
            kind, name = match.groups()
            if kind in ("currentmodule", "automodule"):
                module, owner = name, name
            else:
                owner = name if name.startswith("sb3_reinforce") else f"{module}.{name}"
            names.add(owner)
        elif match := re.match(r"   :members:(.*)", line):
            listed = [member.strip() for member in match[1].split(",") if member.strip()]
            if not listed:
                source = importlib.import_module(owner)
                listed = [name for name, value in vars(source).items() if getattr(value, "__module__", "") == owner]
            names |= {f"{owner}.{member}" for member in listed}
        elif line.startswith("```"):
            module = owner = ""
    return names


def problem(target: str, path: Path, folder: Path) -> str | None:
    """Return what is wrong with a link, whose relative path starts at a folder."""
    if re.match(r"[a-z]+:", target):
        parts = urlsplit(target)
        return None if parts.scheme == "https" and re.fullmatch(r"[\w.-]+\.[a-z]+", parts.netloc) else "not an https address"
    file, _, anchor = target.partition("#")
    other = (folder / file).resolve() if file else path
    # conf.py copies the notebook
    if other == DOCS / NOTEBOOK.name:
        other = NOTEBOOK
    if not other.is_relative_to(ROOT) or not other.exists():
        return "no such file"
    if not anchor or anchor in anchors(other) or (not file and anchor in documented_objects()):
        return None
    return "neither a heading nor an object in api.md"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", NOTEBOOK], ids=name_of)
def test_links_are_valid(page: Path):
    if page == NOTEBOOK:
        text, folder = "\n\n".join(markdown_cells(page)), DOCS
    else:
        text, folder = page.read_text(encoding="utf-8"), page.parent
    targets = LINK.findall(FENCE.sub("", text)) + DIRECTIVE.findall(text)
    wrong = {target: what for target in targets if (what := problem(target, page, folder)) is not None}
    assert not wrong


@pytest.mark.parametrize("page", FILLED)
def test_every_generated_block_exists_once(page: str):
    for path in PAGES:
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        for block in FILLED[page]:
            found = re.findall(f"<!-- {block} -->(.*?)<!-- /{block} -->", text, re.DOTALL)
            assert len(found) == (path == ROOT / page)
            assert all(content.strip() for content in found)


def test_every_argument_is_documented():
    documented = (DOCS / "settings.md").read_text()
    undocumented = [name for name in inspect.signature(REINFORCE).parameters if f"`{name}`" not in documented]
    assert undocumented == ["policy_kwargs", "_init_setup_model", "unsupported"]
    assert all(f"{kwarg}" in documented for kwarg in ("net_arch", "activation_fn", "ortho_init", "log_std_init"))


def test_every_public_name_is_in_the_api_page():
    assert set(PUBLIC) <= documented_objects()


def test_every_log_key_is_documented():
    logged = set()

    class Writer(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
            logged.update(key_values)

    for env, kwargs in (("CartPole-v1", {"advantage": "advantage"}), ("Pendulum-v1", {"target_kl": None})):
        model = REINFORCE("MlpPolicy", env, n_steps=None, n_episodes=2, seed=0, **kwargs)
        model.set_logger(Logger(None, [Writer()]))
        model.learn(500)
    documented = set(re.findall(r"`([a-z]+/[a-z_]+)`", (DOCS / "log.md").read_text()))
    assert len(logged) > 15 and logged <= documented


def message(node: ast.AST) -> str:
    """Return a string of the source code, with three dots instead of formatted values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(message, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "..."


def test_every_documented_error_message_exists():
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    called = [message(node.args[0]) for node in nodes if isinstance(node, ast.Call) and node.args]
    listed = re.findall(r"^\| (``?)(.+?)\1 \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    patterns = {text: re.escape(text).replace(re.escape("..."), ".*") for _, text in listed}
    assert len(patterns) > 30
    assert [text for text, pattern in patterns.items() if not any(re.match(pattern, other) for other in called)] == []


def test_the_notebook_is_committed_with_all_outputs_and_imports_existing_names():
    assert NOTEBOOK.stat().st_size < 1_000_000
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    exec("".join(cells[0]["source"]).partition("th.set_num_threads")[0], {})


@pytest.mark.slow
def test_the_documentation_builds_without_warnings(tmp_path: Path):
    """Like `make docs`."""
    for package in ("sphinx", "furo", "myst_nb", "sphinx_copybutton", "latex2mathml"):
        pytest.importorskip(package, reason="needs: pip install 'sb3-reinforce[docs]'")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-W", "--keep-going", str(DOCS), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr

    # No page loads scripts, fonts or images from elsewhere
    assert (tmp_path / "algorithm.html").read_text().count("<math ") > 20
    for page in tmp_path.glob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', page.read_text()), page.name

    assert (tmp_path / "lunar_lander.html").read_text().count("<img ") >= 10
    assert "readthedocs.io/en/master/guide/callbacks.html#stable_baselines3" in (tmp_path / "api.html").read_text()


@pytest.mark.slow
def test_the_notebook_runs_and_its_agent_lands():
    pytest.importorskip("nbclient")
    printed = re.findall(r"deterministic policy: (\d+)", str(execute()))
    assert len(printed) == 1 and int(printed[0]) > 200
