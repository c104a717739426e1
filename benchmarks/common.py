"""What the scripts in this folder share: where results go, and what is noted beside them."""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
REFERENCE = Path(__file__).parent / "reference"


def provenance() -> dict[str, Any]:
    """The command, the versions and the machine behind a result."""
    packages = ("sb3-reinforce", "stable-baselines3", "gymnasium", "torch", "numpy")
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
