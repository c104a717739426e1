"""
Run the example and RL Zoo with an installed wheel, in another folder: `make smoke`.

    python tests/smoke.py

Needs the extras ``report`` and ``zoo``.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import sb3_reinforce

ROOT = Path(__file__).resolve().parent.parent
COMMAND = str(Path(sys.executable).with_name("sb3-reinforce"))


def run(folder: Path, *command: str, expected: str) -> None:
    print("$", *command, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SDL_VIDEODRIVER": "dummy", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    if result.returncode != 0 or expected not in result.stdout:
        raise SystemExit(
            f"Exit code {result.returncode}, expected {expected!r} in the output:\n{result.stdout}\n{result.stderr}"
        )


def main() -> None:
    if "site-packages" not in sb3_reinforce.__file__:
        raise SystemExit(f"{sb3_reinforce.__file__} is not an installed wheel")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copy(ROOT / "examples" / "lunar_lander.py", folder)
        example = [sys.executable, "lunar_lander.py", "--timesteps", "5000", "--evaluation-episodes", "2"]
        run(folder, *example, expected="Everything is in runs/")
        train = ["--env", "CartPole-v1", "-n", "3000", "--eval-freq", "-1"]
        run(folder, COMMAND, "train", *train, expected="Saving to logs/reinforce")
        run(folder, COMMAND, "enjoy", "--env", "CartPole-v1", "-n", "600", "--no-render", expected="Mean reward")
        run(folder, COMMAND, "report", "logs/reinforce/CartPole-v1_1", expected="The report is ")
    print("The wheel works")


if __name__ == "__main__":
    main()
