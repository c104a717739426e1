"""
Show a run of `make train` in the README: the learning curve, the video as a GIF and a summary.

    python -m benchmarks.showcase runs/LunarLanderContinuous-v3_1
"""

import argparse
import json
import shutil
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from benchmarks.common import IMAGES, README, fill


def to_gif(video: Path, gif: Path) -> None:
    """Convert a video to a small GIF, with a third of the frames at half the resolution."""
    frames = imageio.imread(video)[::3, ::2, ::2]
    imageio.imwrite(gif, frames, duration=1000 * 3 / 50, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    result = json.loads((folder / "result.json").read_text())
    shutil.copyfile(folder / "learning_curve.png", IMAGES / "train.png")
    to_gif(folder / "landing.mp4", IMAGES / "landing.gif")
    returns, seconds = np.array(result["returns"]), result["seconds"]
    fill(
        README,
        "train",
        f"Seed {result['seed']} of `make train` took {result['steps']:,} steps and {seconds:.0f} seconds on one core. "
        f"Its deterministic policy returns {returns.mean():.0f} ± {returns.std():.0f} (mean and standard deviation "
        f"of {len(returns)} new episodes; {np.mean(returns >= 200):.0%} of them reach 200).",
    )


if __name__ == "__main__":
    main()
