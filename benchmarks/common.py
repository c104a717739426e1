"""What the scripts in this folder share: where results go, what is noted beside them, and how the pages get them."""

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
WHERE = Path(__file__).parent.parent / "docs" / "where.md"
#: The environment of the libraries that are not installed here (make peers)
PEERS = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"


def tianshou(*arguments: object) -> Any:
    """What ``peer_tianshou.py`` prints, which is JSON, in the environment of the peers and whatever the paths of this one."""
    script = Path(__file__).parent / "peer_tianshou.py"
    command = [str(PEERS), "-I", "-W", "ignore", str(script), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def provenance(*others: str) -> dict[str, Any]:
    """The command, the versions (of these other packages as well) and the machine behind a result."""
    packages = ("sb3-reinforce", "stable-baselines3", "gymnasium", "torch", "numpy", *others)
    return {
        "command": " ".join(["python", "-m", *([f"benchmarks.{Path(sys.argv[0]).stem}"]), *sys.argv[1:]]),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {package: version(package) for package in packages},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result in one go: whoever looks finds all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content) + "\n")
    unfinished.replace(path)


def fill(path: Path, block: str, text: str) -> None:
    """
    Replace what stands in a Markdown file between ``<!-- block -->`` and ``<!-- /block -->``.

    :param path: the file
    :param block: name of the block
    :param text: Markdown
    :raises ValueError: if the file has no such block
    """
    begin, end = f"<!-- {block} -->", f"<!-- /{block} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    content = path.read_text(encoding="utf-8")
    if not pattern.search(content):
        raise ValueError(f"{path} has no block {begin} ... {end} to fill")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", content), encoding="utf-8")


def run_all(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], n_processes: int) -> None:
    """Call a function with the arguments of each job, in new processes, so many at a time."""
    # Not a Pool, whose processes may not start workers
    with ProcessPoolExecutor(n_processes, get_context("spawn")) as executor:
        for future in [executor.submit(function, *job) for job in jobs]:
            future.result()


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """The runs in a folder, by seed."""
    return sorted((json.loads(path.read_text()) for path in folder.glob("seed_*.json")), key=lambda run: run["seed"])
