"""A rollout buffer that holds whole episodes of any length from any number of environments."""

import math
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.type_aliases import TensorDict

_NOT_FINISHED = "The rollout is not finished: there are no whole episodes to learn from"


class EpisodeBufferSamples(NamedTuple):
    """Transitions of whole episodes as float32 tensors (observations: in their own type), ``n_transitions`` rows each."""

    observations: th.Tensor | TensorDict
    actions: th.Tensor
    old_values: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor


class EpisodeRolloutBuffer(RolloutBuffer):
    """
    Rollout buffer for whole episodes, for vector, image and dictionary observations.

    While a rollout lasts, :meth:`add` stores one row a step with an entry for each environment. :meth:`finish` then makes
    every episode contiguous, environment by environment: ``observations`` (a dictionary of arrays for ``Dict`` spaces),
    ``actions``, ``rewards``, ``episode_starts``, ``values``, ``returns`` and ``advantages`` have ``n_transitions`` rows, as
    has ``action_values`` if there is a critic of these.

    :param buffer_size: number of steps to make room for at first; the buffer grows when episodes need more
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: PyTorch device of the samples
    :param gamma: Discount factor, in (0, 1]
    :param n_envs: Number of parallel environments
    """

    observations: np.ndarray | dict[str, np.ndarray]  # type: ignore[assignment]
    action_values: np.ndarray

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        gamma: float = 0.99,
        n_envs: int = 1,
    ):
        # Rows of (n_envs, ...): by key for observations (the empty key where they are no dictionary), by name for the rest
        self._observation_rows: dict[str, np.ndarray] = {}
        self._rows: dict[str, np.ndarray] = {}
        self._spaces = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        super().__init__(buffer_size, observation_space, action_space, device, gamma=gamma, n_envs=n_envs)

    def reset(self) -> None:
        """Forget all transitions; the memory is kept for the next rollout."""
        self.pos = 0
        self.full = False
        if not self._rows:
            # The last episodes end beyond it. Memory that is not used costs nothing
            self._make_room(2 * self.buffer_size)

    def _make_room(self, n_rows: int) -> None:
        """Allocate rows and move there what has been added so far."""

        def allocate(old: np.ndarray | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            new = np.empty((n_rows, self.n_envs, *shape), dtype=dtype)
            if old is not None:
                new[: self.pos] = old[: self.pos]
            return new

        # A sample of a Gaussian is stored as it was drawn, whatever the type of the action space
        action_dtype = np.float32 if isinstance(self.action_space, spaces.Box) else self.action_space.dtype
        for name, shape, dtype in (
            ("actions", self.action_space.shape or (), action_dtype),
            ("rewards", (), np.float64),
            ("values", (), np.float64),
            ("episode_starts", (), bool),
            ("active", (), bool),
        ):
            self._rows[name] = allocate(self._rows.get(name), shape, dtype)
        for key, space in self._spaces.items():
            self._observation_rows[key] = allocate(self._observation_rows.get(key), space.shape or (), space.dtype)

    def add(  # type: ignore[override]
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        active: np.ndarray,
        values: np.ndarray | float = np.nan,
    ) -> None:
        """
        Add one step of all environments.

        :param obs: (n_envs, ...) observations that the actions answer, or a dictionary of these
        :param action: (n_envs, ...) actions as sampled, before any clipping
        :param reward: (n_envs,) rewards
        :param episode_start: (n_envs,) whether the observation is the first of its episode
        :param active: (n_envs,) False for environments that are idle, whose entries are left out
        :param values: (n_envs,) the baseline's values of obs, NaN where they are not known yet
        """
        pos, rows = self.pos, self._rows
        if pos == len(rows["rewards"]):
            self._make_room(2 * pos)
        for key, observation_rows in self._observation_rows.items():
            observation_rows[pos] = obs[key] if isinstance(obs, dict) else obs
        rows["actions"][pos] = action
        rows["rewards"][pos] = reward
        rows["episode_starts"][pos] = episode_start
        rows["values"][pos] = values
        if self.n_envs > 1:
            rows["active"][pos] = active
        self.pos = pos + 1

    def add_episode(
        self, observations: np.ndarray | dict[str, np.ndarray], actions: np.ndarray, rewards: np.ndarray, values: np.ndarray
    ) -> None:
        """Add all steps of an episode of a single environment, see :meth:`add`; arrays have a row for each step."""
        rows = slice(self.pos, self.pos + len(rewards))
        while rows.stop > len(self._rows["rewards"]):
            self._make_room(2 * len(self._rows["rewards"]))
        for key, observation_rows in self._observation_rows.items():
            observation_rows[rows, 0] = observations[key] if isinstance(observations, dict) else observations
        for name, array in (("actions", actions), ("rewards", rewards), ("values", values)):
            self._rows[name][rows, 0] = array
        self._rows["episode_starts"][rows, 0] = np.arange(len(rewards)) == 0
        self.pos = rows.stop

    def finish(self) -> None:
        """Make the episodes of the rollout contiguous, now that all of them are over."""
        active = self._rows["active"][: self.pos].T
        # Let go of the last rollout's before there are new ones: images take much memory
        self.observations = {}

        def flatten(rows: np.ndarray) -> np.ndarray:
            # SB3's swap_and_flatten() without the entries of idle environments. A single one is never idle: no copy either
            return rows[: self.pos, 0] if self.n_envs == 1 else rows[: self.pos].swapaxes(0, 1)[active]

        self.actions, self.rewards, self.episode_starts, self.values = (
            flatten(self._rows[name]) for name in ("actions", "rewards", "episode_starts", "values")
        )
        self.actions = self.actions.reshape((-1, self.action_dim))
        observations = {
            key: flatten(rows).reshape((-1, *get_obs_shape(self._spaces[key]))) for key, rows in self._observation_rows.items()
        }
        self.observations = observations if isinstance(self.observation_space, spaces.Dict) else observations[""]
        self.returns, self.advantages = np.zeros((2, len(self.rewards)))
        self.full = True

    def size(self) -> int:
        """Number of transitions; of steps of all environments while the rollout lasts."""
        return len(self.rewards) if self.full else self.pos

    def get(self, batch_size: int | None = None) -> Generator[EpisodeBufferSamples, None, None]:  # type: ignore[override]
        """
        All transitions once, in order: they make up one gradient step, for which their order means nothing.

        :param batch_size: transitions at a time, at least 1; None for all
        :return: a generator of consecutive transitions
        """
        assert self.full, _NOT_FINISHED
        size = batch_size or self.size()
        for start in range(0, self.size(), size):
            yield self._get_samples(slice(start, start + size))

    def spread(self, max_size: int) -> EpisodeBufferSamples:
        """At most so many transitions, evenly spaced over the batch."""
        assert self.full, _NOT_FINISHED
        return self._get_samples(slice(None, None, math.ceil(self.size() / max_size)))

    def sample(self, batch_size: int, env: Any = None) -> EpisodeBufferSamples:
        """Transitions drawn with replacement from NumPy's global generator, as in SB3."""
        assert self.full, _NOT_FINISHED
        return self._get_samples(np.random.randint(0, self.size(), size=batch_size))

    def _get_samples(self, batch_inds: np.ndarray | slice, env: Any = None) -> EpisodeBufferSamples:  # type: ignore[override]
        observations: Any = (
            {key: self.to_torch(obs[batch_inds]) for key, obs in self.observations.items()}
            if isinstance(self.observations, dict)
            else self.to_torch(self.observations[batch_inds])
        )
        others = (self.actions, self.values, self.advantages, self.returns)
        # What is too large for float32 becomes infinite, which the update refuses
        with np.errstate(over="ignore"):
            tensors = [self.to_torch(array[batch_inds].astype(np.float32, copy=False)) for array in others]
        return EpisodeBufferSamples(observations, *tensors)
