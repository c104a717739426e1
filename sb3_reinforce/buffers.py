"""A rollout buffer that holds whole episodes of any length from any number of environments."""

import sys
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.type_aliases import TensorDict

from sb3_reinforce.returns import batch_normalise, discounted_returns

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

    While a rollout lasts, :meth:`add` stores one row a step with an entry for each environment. :meth:`finish` then lines
    up what was stored, environment by environment, so that every episode is contiguous, and
    :meth:`compute_returns_and_advantage` adds the returns. From there on ``observations`` (a dictionary of arrays for
    ``Dict`` spaces), ``actions``, ``rewards``, ``episode_starts``, ``values``, ``returns`` and ``advantages`` are arrays of
    ``n_transitions`` rows. Subclass it to use your own (``rollout_buffer_class``).

    :param buffer_size: number of steps to make room for at first; the buffer grows when episodes need more
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: PyTorch device of the samples
    :param gamma: Discount factor, in (0, 1]
    :param n_envs: Number of parallel environments
    """

    observations: np.ndarray | dict[str, np.ndarray]  # type: ignore[assignment]

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
        self.pos = self._n_values = 0
        self.full = False
        if not self._rows:
            self._make_room(self.buffer_size)

    def _make_room(self, n_rows: int) -> None:
        """Allocate ``n_rows`` rows and move there what has been added so far."""

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
        values: np.ndarray | None = None,
    ) -> None:
        """
        Add one step of all environments.

        :param obs: (n_envs, ...) observations that the actions answer, or a dictionary of these
        :param action: (n_envs, ...) actions as sampled, before any clipping
        :param reward: (n_envs,) rewards
        :param episode_start: (n_envs,) whether the observation is the first of its episode
        :param active: (n_envs,) False for environments that are idle, whose entries are left out
        :param values: (n_envs,) the baseline's values of obs, where acting has brought them along; None leaves them to a pass
            over the whole batch
        """
        if self.pos == len(self._rows["rewards"]):
            self._make_room(2 * self.pos)
        for key, rows in self._observation_rows.items():
            rows[self.pos] = obs[key] if isinstance(obs, dict) else obs
        self._rows["actions"][self.pos] = action
        self._rows["rewards"][self.pos] = reward
        self._rows["episode_starts"][self.pos] = episode_start
        self._rows["active"][self.pos] = active
        if values is not None:
            self._rows["values"][self.pos] = values
            self._n_values += 1
        self.pos += 1

    def finish(self) -> None:
        """Line up the transitions of the rollout, environment by environment, now that all its episodes are over."""
        active = self._rows["active"][: self.pos].T
        # Let go of the last rollout's before there are new ones: images take much memory
        self.observations = {}

        def line_up(rows: np.ndarray) -> np.ndarray:
            # A single environment is never idle and needs no lining up, so no copy either
            return rows[: self.pos, 0] if self.n_envs == 1 else rows[: self.pos].swapaxes(0, 1)[active]

        self.actions, self.rewards, self.episode_starts = (
            line_up(self._rows[name]) for name in ("actions", "rewards", "episode_starts")
        )
        #: (n_transitions,) None until they are known
        self.values = line_up(self._rows["values"]) if self._n_values == self.pos else None  # type: ignore[assignment]
        self.actions = self.actions.reshape((-1, self.action_dim))
        observations = {
            key: line_up(rows).reshape((-1, *get_obs_shape(self._spaces[key]))) for key, rows in self._observation_rows.items()
        }
        self.observations = observations if isinstance(self.observation_space, spaces.Dict) else observations[""]
        self.full = True

    def compute_returns_and_advantage(self, values: np.ndarray) -> None:  # type: ignore[override]
        """
        Compute the Monte-Carlo returns, and how far each is above the baseline, for all transitions at once.

        :param values: (n_transitions,) baseline of each observation, in the order of ``observations``
        """
        self.values = values
        self.returns = discounted_returns(self.rewards, self.episode_starts, self.gamma)
        self.advantages = self.returns - values

    def normalize_advantages(self) -> None:
        """Give the advantages mean 0 and standard deviation 1 over the whole rollout."""
        self.advantages = batch_normalise(self.advantages)

    def get(self, batch_size: int | None = None) -> Generator[EpisodeBufferSamples, None, None]:  # type: ignore[override]
        """
        :param batch_size: transitions a batch, drawn without replacement; None for a single batch of all, in order
        :return: a generator of batches
        """
        if batch_size is None:
            yield from self.chunks(sys.maxsize)
            return
        assert self.full, _NOT_FINISHED
        shuffled = np.random.permutation(len(self.rewards))
        for start in range(0, len(shuffled), batch_size):
            yield self._get_samples(shuffled[start : start + batch_size])

    def chunks(self, size: int) -> Generator[EpisodeBufferSamples, None, None]:
        """
        :param size: transitions a chunk, at least 1
        :return: a generator of all transitions in order, as many as that at a time
        """
        assert self.full, _NOT_FINISHED
        for start in range(0, len(self.rewards), size):
            yield self._get_samples(slice(start, start + size))  # type: ignore[arg-type]

    def observation_chunks(self, size: int) -> Generator[th.Tensor | TensorDict, None, None]:
        """
        :param size: transitions a chunk, at least 1
        :return: a generator of the observations alone, for which no returns are needed
        """
        for start in range(0, len(self.rewards), size):
            yield self._get_observations(slice(start, start + size))

    def _get_observations(self, batch_inds: np.ndarray | slice) -> Any:
        if isinstance(self.observations, dict):
            return {key: self.to_torch(obs[batch_inds]) for key, obs in self.observations.items()}
        return self.to_torch(self.observations[batch_inds])

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> EpisodeBufferSamples:  # type: ignore[override]
        others = (self.actions, self.values, self.advantages, self.returns)
        # What is too large for float32 becomes infinite, which the update refuses
        with np.errstate(over="ignore"):
            tensors = [self.to_torch(array[batch_inds].astype(np.float32, copy=False)) for array in others]
        return EpisodeBufferSamples(self._get_observations(batch_inds), *tensors)
