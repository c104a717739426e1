"""Small environments that do what a test needs."""

import multiprocessing
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv


class ScriptedEnv(gym.Env):
    """
    Episodes of given lengths, one after the other, again and again; every observation is [environment, episode, step].

    ``seeds`` and ``options`` hold the arguments of every reset, ``lengths_run`` how many steps each episode was given.

    :param lengths: of the episodes in turn; None for an episode that never ends
    :param index: of the environment among its siblings
    :param truncated: whether episodes end by a time limit
    :param spoil: gets (what, episode, step, value) for each observation, reward and "terminal observation" that is to be
        returned, with steps counted from 1 (0: reset), and may return another or raise
    """

    action_space: spaces.Space = spaces.Box(-1, 1, (2,))
    observation_space: spaces.Space = spaces.Box(-np.inf, np.inf, (3,))

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
        self.seeds: list[int | None] = []
        self.options: list[dict | None] = []
        self.lengths_run: list[int] = []

    @property
    def episode(self) -> int:
        """Number of the current episode, counted over the life of the environment."""
        return len(self.seeds) - 1

    @property
    def n_resets(self) -> int:
        return len(self.seeds)

    def _observation(self) -> Any:
        return np.array([self.index, self.episode, self.steps], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.options.append(options)
        self.lengths_run.append(0)
        self.steps = 0
        return self.spoil("observation", self.episode, 0, self._observation()), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        self.lengths_run[-1] += 1
        done = self.steps == self.lengths[self.episode % len(self.lengths)]
        reward = self.spoil("reward", self.episode, self.steps, 100.0 * self.episode + self.steps)
        what = "terminal observation" if done else "observation"
        observation = self.spoil(what, self.episode, self.steps, self._observation())
        return observation, reward, done and not self.truncated, done and self.truncated, {}


class RandomLengthEnv(ScriptedEnv):
    """Lengths of episodes and observations are random; all of an episode but its rewards follows from its seed alone."""

    def __init__(self, max_length: int, action_space: spaces.Space = ScriptedEnv.action_space):
        super().__init__([None])
        self.max_length = max_length
        self.action_space = action_space

    def _observation(self) -> Any:
        if self.steps == 0:
            self.lengths = [int(self.np_random.integers(1, self.max_length, endpoint=True))]
        return self.np_random.normal(size=3).astype(np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        observation, _, *rest = super().step(action)
        return observation, float(observation[0] + np.sum(action)), *rest


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


class OwnVecEnv(DummyVecEnv):
    """Stepped as it is, because it is a subclass."""


class Simulators(VecEnv):
    """
    Simulators in one array, as on a GPU, which reset themselves: only the first ``reset()`` does anything. Observations use
    the same memory again.

    Episodes have the given lengths in turn; observations are [simulator, episode, step], rewards 100 * episode + step.

    :param lengths_of_each: lengths of the episodes of each simulator
    :param dtypes: of the rewards and of the done flags
    """

    def __init__(self, lengths_of_each: list[list[int]], dtypes: tuple[Any, Any] = (np.float32, bool)):
        super().__init__(len(lengths_of_each), spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1, 1, (2,)))
        self.lengths_of_each = lengths_of_each
        self.dtypes = dtypes
        self.episodes, self.steps = np.zeros((2, self.num_envs), dtype=int)
        self.memory = self._observations()
        self.n_resets = 0
        # (simulator, episode, step before) of every step that was taken
        self.taken: list[tuple[int, int, int]] = []

    def _observations(self) -> np.ndarray:
        return np.column_stack([np.arange(self.num_envs), self.episodes, self.steps]).astype(np.float32)

    def reset(self) -> np.ndarray:
        self.n_resets += 1
        self.memory[:] = self._observations()
        return self.memory

    def step_async(self, actions: np.ndarray) -> None:
        assert actions.shape == (self.num_envs, 2)

    def step_wait(self) -> Any:
        self.taken += [tuple(row) for row in self._observations().astype(int).tolist()]
        self.steps += 1
        rewards = 100 * self.episodes + self.steps
        lengths = np.array([of[e % len(of)] for of, e in zip(self.lengths_of_each, self.episodes, strict=True)])
        dones = self.steps == lengths
        infos: list[dict] = [{"key": index} for index in range(self.num_envs)]
        for index in dones.nonzero()[0]:
            infos[index].update(terminal_observation=self._observations()[index], episode=dict(r=0, l=lengths[index], t=0))
        self.episodes[dones] += 1
        self.steps[dones] = 0
        self.memory[:] = self._observations()
        return self.memory, rewards.astype(self.dtypes[0]), dones.astype(self.dtypes[1]), infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        assert attr_name == "render_mode", f"There are no single environments to ask for {attr_name}"
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError("There are no single environments")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise AttributeError("There are no single environments")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def subproc(env_fns: list[Callable[[], gym.Env]]) -> SubprocVecEnv:
    """Forked where that is possible: the default start method imports PyTorch anew in each process."""
    return SubprocVecEnv(env_fns, start_method="fork" if "fork" in multiprocessing.get_all_start_methods() else None)
