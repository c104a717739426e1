"""
Is ``learn()`` as fast as in another checkout? Paired runs of both, in turn, on one core.

    git worktree add ../before main~1
    python -m benchmarks.pairs --other ../before

Each run trains a model in a new process and measures its steps per second of processor time, after one iteration. Both
checkouts run with the packages of this environment. Prints the ratio of each pair, and the median.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

CASES = {"LunarLanderContinuous-v3": 30_000, "CartPole-v1": 40_000, "images": 3000}


def measure(case: str) -> float:
    """Steps per second of processor time of the checkout that is imported."""
    import gymnasium as gym
    import numpy as np
    import torch as th
    from gymnasium import spaces
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sb3_reinforce import REINFORCE

    class Images(gym.Env):
        """Random images of 84 x 84 x 4, in episodes of 100 steps."""

        observation_space = spaces.Box(0, 255, (84, 84, 4), dtype=np.uint8)
        action_space = spaces.Discrete(6)
        images = np.random.default_rng(0).integers(256, size=(16, 84, 84, 4), dtype=np.uint8)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
            self.n_steps = 0
            return self.images[0], {}

        def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self.n_steps += 1
            return self.images[self.n_steps % 16], float(action == self.n_steps % 6), False, self.n_steps == 100, {}

    th.set_num_threads(1)
    if case == "images":
        model = REINFORCE("CnnPolicy", DummyVecEnv([Images] * 8), n_steps=100, seed=1, device="cpu")
    else:
        model = REINFORCE("MlpPolicy", case, seed=1, device="cpu")
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.learn(1)
    n_steps, started = model.num_timesteps, time.process_time()
    model.learn(CASES[case], reset_num_timesteps=False)
    return (model.num_timesteps - n_steps) / (time.process_time() - started)


def run(checkout: Path, case: str) -> float:
    """:func:`measure` in a new process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--measure", case]
    return float(subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the speed of learn() in two checkouts")
    parser.add_argument("--other", type=Path, help="folder of the other checkout")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=5, help="number of paired runs per case")
    parser.add_argument("--measure", choices=CASES, help="measure the checkout in PYTHONPATH, and print one number")
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(arguments.measure))
        return
    if arguments.other is None:
        parser.error("--other is required")
    for case in arguments.cases:
        pairs = [(run(arguments.other, case), run(Path(), case)) for _ in range(arguments.pairs)]
        ratios = [ours / other for other, ours in pairs]
        print(f"{case}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; median {median(ratios):.2f}", flush=True)


if __name__ == "__main__":
    main()
