"""Small environments that do what a test needs."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv


class ScriptedEnv(gym.Env):
    """
    Episodes of given lengths, one after the other, again and again; every observation is [environment, episode, step].

    :param lengths: of the episodes in turn; None for an episode that never ends
    :param index: of the environment among its siblings
    :param truncated: whether episodes end by a time limit
    :param spoil: gets (what, episode, step, value) for each observation, reward and "terminal observation" that is to be
        returned, with steps counted from 1 (0: reset), and may return another or raise
    """

    action_space = spaces.Box(-1, 1, (2,))
    observation_space = spaces.Box(-np.inf, np.inf, (3,))

    def __init__(
        self,
        lengths: list[int | None],
        index: int = 0,
        truncated: bool = False,
        spoil: Callable[[str, int, int, Any], Any] = lambda what, episode, step, value: value,
    ):
        self.lengths = lengths
        self.index = index
        self.truncated = truncated
        self.spoil = spoil
        self.episode = -1
        self.n_resets = 0

    def _observation(self) -> np.ndarray:
        return np.array([self.index, self.episode, self.steps], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode += 1
        self.n_resets += 1
        self.steps = 0
        return self.spoil("observation", self.episode, 0, self._observation()), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        done = self.steps == self.lengths[self.episode % len(self.lengths)]
        reward = self.spoil("reward", self.episode, self.steps, 100.0 * self.episode + self.steps)
        what = "terminal observation" if done else "observation"
        observation = self.spoil(what, self.episode, self.steps, self._observation())
        return observation, reward, done and not self.truncated, done and self.truncated, {}


class GeometricEnv(gym.Env):
    """After each step, which brings a reward of 1, the episode ends with probability p: long episodes have high returns."""

    action_space = spaces.Discrete(2)
    observation_space = spaces.Box(-1, 1, (1,))

    def __init__(self, p: float = 0.2):
        self.p = p

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(1, dtype=np.float32), 1.0, bool(self.np_random.random() < self.p), False, {}


class RandomEnv(gym.Env):
    """Random observations and rewards of any spaces; episodes of random length that end by themselves or by a time limit."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, max_length: int):
        # A copy, because a space draws its samples from a generator of its own
        self.observation_space = deepcopy(observation_space)
        self.action_space = action_space
        self.max_length = max_length

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.remaining = self.np_random.integers(1, self.max_length, endpoint=True)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.remaining -= 1
        by_time_limit = bool(self.np_random.random() < 0.5)
        over = bool(self.remaining == 0)
        reward = float(self.np_random.normal())
        return self.observation_space.sample(), reward, over and not by_time_limit, over and by_time_limit, {}


def scripted(lengths_of_each: list[list[int | None]], **kwargs: Any) -> DummyVecEnv:
    """A ``DummyVecEnv`` of monitored :class:`ScriptedEnv`, one for each list of lengths."""

    def make(index: int) -> Callable[[], gym.Env]:
        return lambda: Monitor(ScriptedEnv(lengths_of_each[index], index, **kwargs))

    return DummyVecEnv([make(index) for index in range(len(lengths_of_each))])
