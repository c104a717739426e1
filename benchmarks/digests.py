"""
Check that a refactoring does not change results, with digests of trained models.

    python -m benchmarks.digests --write before.json     # before the change
    python -m benchmarks.digests --compare before.json   # after the change, on the same machine

Each case trains a model for a few updates and prints the SHA-256 digest of its parameters, statistics and optimizer state.
Digests cannot be compared across machines, because floating-point results depend on the processor.
"""

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_reinforce import REINFORCE

LANDER = "LunarLanderContinuous-v3"
PENDULUM: dict[str, Any] = dict(
    n_episodes=10, gamma=0.95, cg_damping=0.1, cg_max_steps=10, normalize_observations=False, baseline="random_features"
)


class RandomWalk(gym.Env):
    """Random observations, rewards and episode lengths, reproducible from the seed."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space):
        self.observation_space = observation_space
        self.action_space = action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.n_steps, self.length = 0, int(self.np_random.integers(20, 40))
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        reward = float(np.sum(action)) * float(self.np_random.random())
        return self.observation_space.sample(), reward, self.n_steps == self.length, False, {}


def images() -> gym.Env:
    return RandomWalk(spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Discrete(3))


def dictionaries() -> gym.Env:
    entries: dict[str, spaces.Space] = {
        "vector": spaces.Box(-1, 1, (4,)),
        "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
        "n": spaces.Discrete(3),
    }
    return RandomWalk(spaces.Dict(entries), spaces.Box(-1, 1, (2,)))


def train(env: Any, n_steps: int = 8000, policy: str = "MlpPolicy", **kwargs: Any) -> BaseAlgorithm:
    return REINFORCE(policy, env, seed=3, device="cpu", **kwargs).learn(n_steps)


def resume(n_steps: int = 12_000) -> BaseAlgorithm:
    """Train for half of the steps, save, load and train for the other half."""
    file = io.BytesIO()
    REINFORCE("MlpPolicy", LANDER, seed=3, device="cpu").learn(n_steps // 2).save(file)
    file.seek(0)
    model = REINFORCE.load(file, LANDER, device="cpu")
    return model.learn(n_steps - model.num_timesteps, reset_num_timesteps=False)


CASES: dict[str, Callable[[], BaseAlgorithm]] = {
    "continuous lander": lambda: train(LANDER, 12_000),
    "continuous lander, resumed": resume,
    "continuous lander, two workers": lambda: train(LANDER, 12_000, workers=2),
    "continuous lander, three environments": lambda: train(make_vec_env(LANDER, 3), 12_000),
    "continuous lander, gSDE": lambda: train(LANDER, use_sde=True, sde_sample_freq=8),
    "continuous lander, optimizer's step": lambda: train(
        LANDER, target_kl=None, n_steps=1000, n_episodes=None, policy_kwargs=dict(net_arch=[32, 32], activation_fn=nn.ReLU)
    ),
    "continuous lander, linear baseline": lambda: train(LANDER, baseline="linear", baseline_memory=0.0),
    "discrete lander": lambda: train("LunarLander-v3"),
    "CartPole": lambda: train("CartPole-v1"),
    "CartPole, advantage": lambda: train("CartPole-v1", advantage="advantage"),
    "Pendulum": lambda: train("Pendulum-v1", **PENDULUM),
    "FrozenLake": lambda: train("FrozenLake-v1", 2000),
    "images": lambda: train(images, 600, "CnnPolicy"),
    "dictionaries": lambda: train(dictionaries, 600, "MultiInputPolicy"),
}


def digest(model: BaseAlgorithm) -> str:
    """Compute the SHA-256 digest of all tensors of a model, in the order of their names."""
    numbers = hashlib.sha256()

    def add(state: Any) -> None:
        if isinstance(state, dict):
            for _, value in sorted(state.items(), key=lambda item: str(item[0])):
                add(value)
        elif isinstance(state, th.Tensor):
            numbers.update(np.ascontiguousarray(state.detach().cpu().numpy()).tobytes())

    add(model.get_parameters())
    return numbers.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute digests of trained models")
    parser.add_argument("--write", type=Path, help="write the digests to this JSON file")
    parser.add_argument("--compare", type=Path, help="compare with the digests in this JSON file")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    digests = {}
    before = json.loads(arguments.compare.read_text()) if arguments.compare else {}
    for name, run in CASES.items():
        digests[name] = digest(run())
        verdict = "" if name not in before else ("same" if before[name] == digests[name] else f"DIFFERS from {before[name]}")
        print(f"{name:40} {digests[name]} {verdict}", flush=True)
    if arguments.write:
        arguments.write.write_text(json.dumps(digests, indent=1) + "\n")
    sys.exit(any(before.get(name, value) != value for name, value in digests.items()))


if __name__ == "__main__":
    main()
