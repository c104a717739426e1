"""Imports between the modules of the package, and their sizes."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sb3_reinforce

PACKAGE = "sb3_reinforce"
ROOT = Path(sb3_reinforce.__file__).parent
ALGORITHM = ["reinforce", "policies", "baselines", "natural_gradient", "returns"]


def name_of(path: Path) -> str:
    """Dotted name of a module, e.g. ``sb3_reinforce.episodes.acting``."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports, in functions and for type checkers, too."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # Either a module or a name in one
                found.add(f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module)
    return {module for module in found if module.split(".")[0] == PACKAGE}


IMPORTS = {name: imports_of(name) for name in MODULES}


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_imports_are_found():
    assert f"{PACKAGE}.returns" in IMPORTS[f"{PACKAGE}.reinforce"]
    assert f"{PACKAGE}.episodes.buffer" in IMPORTS[f"{PACKAGE}.episodes.rollout"]
    assert all(module in MODULES for imports in IMPORTS.values() for module in imports)


def test_episodes_import_nothing_of_the_package_above_them():
    engine = f"{PACKAGE}.episodes"
    wrong = {
        (name, module) for name in MODULES if below(name, engine) for module in IMPORTS[name] if not below(module, engine)
    }
    assert not wrong


def test_only_the_package_and_the_command_line_import_the_tools():
    tools = f"{PACKAGE}.tools"
    users = {name for name in MODULES if not below(name, tools) and any(below(module, tools) for module in IMPORTS[name])}
    assert users == {PACKAGE, f"{PACKAGE}.__main__"}


def test_the_picture_in_the_documentation_shows_all_imports():
    drawn = re.findall(r'id="(\w+)-(\w+)"', (ROOT.parent / "docs" / "images" / "house.svg").read_text())
    pairs = {tuple(f"{name}.".split(".")[1] for name in pair) for pair in [(n, m) for n in MODULES for m in IMPORTS[n]]}
    shown = {*ALGORITHM, "episodes", "tools"}
    assert sorted(drawn) == sorted((name, other) for name, other in pairs if {name, other} <= shown and name != other)


def test_there_are_no_import_cycles():
    TopologicalSorter(IMPORTS).prepare()


def n_lines(name: str) -> int:
    return len(MODULES[name].read_text().splitlines())


CORE = [name for name in MODULES if not below(name, f"{PACKAGE}.tools")]


@pytest.mark.parametrize("name", CORE)
def test_a_core_file_has_at_most_350_lines(name: str):
    assert n_lines(name) <= 350


def test_the_core_has_less_than_3000_lines_and_the_algorithm_at_most_1250():
    assert sum(map(n_lines, CORE)) < 3000
    assert sum(n_lines(f"{PACKAGE}.{name}") for name in ALGORITHM) <= 1250
