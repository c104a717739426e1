"""
Show a run of `make train` in the docs: the learning curve, and the video as a GIF.

    python -m benchmarks.showcase runs/LunarLanderContinuous-v3_1
"""

import argparse
import shutil
from pathlib import Path

import imageio.v3 as imageio

from benchmarks.common import IMAGES


def to_gif(video: Path, gif: Path) -> None:
    """Convert a video to a small GIF, with a third of the frames at half the resolution."""
    frames = imageio.imread(video)[::3, ::2, ::2]
    imageio.imwrite(gif, frames, duration=1000 * 3 / 50, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    shutil.copyfile(folder / "learning_curve.png", IMAGES / "train.png")
    to_gif(folder / "landing.mp4", IMAGES / "landing.gif")


if __name__ == "__main__":
    main()
