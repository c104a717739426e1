"""Paths, result files and generated blocks of the documentation, shared by the benchmark scripts."""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
REFERENCE = Path(__file__).parent / "reference"
README = Path(__file__).parent.parent / "README.md"
ADVANTAGES = Path(__file__).parent.parent / "docs" / "advantages.md"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
SCALING = Path(__file__).parent.parent / "docs" / "scaling.md"
STEP = Path(__file__).parent.parent / "docs" / "step.md"
WHERE = Path(__file__).parent.parent / "docs" / "where.md"
WHY = Path(__file__).parent.parent / "docs" / "why.md"
#: Python of the virtual environment with the peer libraries (``make peers``)
PEERS = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"


def tianshou(*arguments: object) -> Any:
    """Run ``peer_tianshou.py`` in the virtual environment of the peers and return the JSON it prints."""
    script = Path(__file__).parent / "peer_tianshou.py"
    command = [str(PEERS), "-I", "-W", "ignore", str(script), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def provenance(*others: str) -> dict[str, Any]:
    """Return the command, the machine and the package versions (including ``others``) behind a result."""
    packages = ("sb3-reinforce", "stable-baselines3", "gymnasium", "torch", "numpy", *others)
    return {
        "command": " ".join(["python", "-m", *([f"benchmarks.{Path(sys.argv[0]).stem}"]), *sys.argv[1:]]),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {package: version(package) for package in packages},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content) + "\n")
    unfinished.replace(path)


def fill(path: Path, block: str, text: str) -> None:
    """
    Replace the text between ``<!-- block -->`` and ``<!-- /block -->`` in a Markdown file.

    :param path: path of the file
    :param block: name of the block
    :param text: new content of the block
    :raises ValueError: if the file has no such block
    """
    begin, end = f"<!-- {block} -->", f"<!-- /{block} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    content = path.read_text(encoding="utf-8")
    if not pattern.search(content):
        raise ValueError(f"{path} has no block {begin} ... {end}")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", content), encoding="utf-8")


def run_all(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], n_processes: int) -> None:
    """Call a function with the arguments of each job, in ``n_processes`` new processes."""
    # Processes of a multiprocessing.Pool are daemonic and cannot start worker processes
    with ProcessPoolExecutor(n_processes, get_context("spawn")) as executor:
        for future in [executor.submit(function, *job) for job in jobs]:
            future.result()


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """Read the runs in a folder, sorted by seed."""
    return sorted((json.loads(path.read_text()) for path in folder.glob("seed_*.json")), key=lambda run: run["seed"])
