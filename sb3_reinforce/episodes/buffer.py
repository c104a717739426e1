"""A rollout buffer for whole episodes of any length from any number of sub-environments."""

import math
from collections.abc import Generator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.type_aliases import RolloutBufferSamples


class EpisodeRolloutBuffer(RolloutBuffer):
    """
    Rollout buffer for whole episodes with vector, image or dictionary observations. Parameters are SB3's, but the buffer grows
    as needed. :meth:`finish` makes each episode contiguous: ``observations`` (a dictionary of arrays for ``Dict`` spaces),
    ``actions``, ``rewards``, ``episode_starts``, ``values``, ``returns`` and ``advantages`` then have ``n_transitions`` rows.
    """

    observations: np.ndarray | dict[str, np.ndarray]  # type: ignore[assignment]
    action_values: np.ndarray
    evaluations: Any = None

    def reset(self) -> None:
        """Remove all transitions."""
        self.pos, self.full, self.evaluations = 0, False, None
        # (obs, action, reward, episode_start, active) of each step, or episode of a single environment
        self._steps: list[tuple[Any, ...]] = []

    def add(self, obs: Any, action: Any, reward: Any, episode_start: Any, active: Any) -> None:  # type: ignore[override]
        """Add one step of all sub-environments, or an episode of a single one: arrays of (n_envs, ...), unclipped actions."""
        self._steps.append((obs, action, reward.astype(np.float64), episode_start, active))
        self.pos += len(reward) // self.n_envs

    def finish(self) -> tuple[str, Any, int, int, int] | None:
        """
        Make the episodes contiguous. If a value is NaN or infinite, return the first one: name, value, sub-environment,
        position of the episode in the rollout, and number of steps of the episode before it.
        """
        obs, *columns = zip(*self._steps, strict=True)
        space = self.observation_space
        entries = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        self._steps, self.observations = [], {}

        def join(arrays: Any, dtype: Any = None) -> np.ndarray:
            rows = np.concatenate(arrays)[:, None] if self.n_envs == 1 else np.stack(arrays)
            return rows if dtype is None else rows.astype(dtype, copy=False)

        # Gaussian samples are float32, whatever the type of the action space
        action_dtype = np.float32 if isinstance(self.action_space, spaces.Box) else self.action_space.dtype
        actions = join(columns[0], action_dtype)
        rewards, episode_starts, active = map(join, columns[1:])
        rows = {
            f"observation {key!r}" if key else "observation": join([entry[key] for entry in obs] if key else obs, space.dtype)
            for key, space in entries.items()
        }

        def flatten(rows: np.ndarray) -> np.ndarray:
            # SB3's swap_and_flatten() without idle entries. A single environment is never idle and needs no copy
            return rows[:, 0] if self.n_envs == 1 else rows.swapaxes(0, 1)[active.T]

        self.actions = flatten(actions).reshape((-1, self.action_dim))
        self.rewards, self.episode_starts = map(flatten, (rewards, episode_starts))
        observations = {
            key: flatten(entry).reshape((-1, *get_obs_shape(space)))
            for (key, space), entry in zip(entries.items(), rows.values(), strict=True)
        }
        self.observations = observations if isinstance(self.observation_space, spaces.Dict) else observations[""]
        self.values, self.returns, self.advantages = np.zeros((3, len(self.rewards)))
        self.full, self.buffer_size = True, len(self.rewards)
        return find_not_finite({**rows, "action": actions, "reward": rewards}, episode_starts & active, active)

    def size(self) -> int:
        return len(self.rewards) if self.full else self.pos

    def get(
        self, batch_size: int | None = None, rows: np.ndarray | None = None
    ) -> Generator[RolloutBufferSamples, None, None]:
        """Iterate over the transitions in some ``rows`` (None: all) once, in order, ``batch_size`` (None: all) at a time."""
        assert self.full, "The rollout is not finished"
        n_rows = self.size() if rows is None else len(rows)
        size = batch_size or n_rows
        for start in range(0, n_rows, size):
            chunk = slice(start, start + size)
            yield self._get_samples(chunk if rows is None else rows[chunk])

    def sample_states(self, max_states: int) -> tuple[np.ndarray, th.Tensor]:
        """Take rows of at most ``max_states`` states, and their counts. Equal observations of integers are taken once."""
        rows, obs = np.arange(0, self.size(), math.ceil(self.size() / max_states)), self.observations
        counts: Any = np.ones(len(rows))
        if not isinstance(obs, dict) and obs.dtype.kind != "f":
            _, first, counts = np.unique(obs[rows], axis=0, return_index=True, return_counts=True)
            rows = rows[first]
        return rows, self.to_torch(counts.astype(np.float32))

    def _get_samples(self, batch_inds: np.ndarray | slice, env: Any = None) -> RolloutBufferSamples:
        observations: Any = (
            {key: self.to_torch(obs[batch_inds]) for key, obs in self.observations.items()}
            if isinstance(self.observations, dict)
            else self.to_torch(self.observations[batch_inds])
        )
        # Overflow becomes infinite, which the update refuses. Log-probabilities of actions are not stored
        with np.errstate(over="ignore"):
            columns: Any = (self.actions, self.values, self.advantages, self.returns)
            numbers = [self.to_torch(column[batch_inds].astype(np.float32, copy=False)) for column in columns]
        return RolloutBufferSamples(observations, *numbers[:2], None, *numbers[2:])  # type: ignore[call-arg]


def copy_obs(obs: Any) -> Any:
    """Copy observations in C order: rounding depends on the memory layout, which differs for transposed images."""
    return {key: entry.copy() for key, entry in obs.items()} if isinstance(obs, dict) else obs.copy()


def all_finite(values: np.ndarray) -> bool:
    """Whether an array of any shape and type has no NaN and no infinite value."""
    if values.dtype.kind != "f":
        return True
    # Fast path: a finite sum of squares implies finite values, but the sum may overflow
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def find_not_finite(
    arrays: dict[str, np.ndarray], starts: np.ndarray, active: np.ndarray
) -> tuple[str, Any, int, int, int] | None:
    """Find the first value in (n_steps, n_envs, ...) arrays that is not finite, see :meth:`EpisodeRolloutBuffer.finish`."""
    bad: list[tuple[int, str]] = []
    for name, array in arrays.items():
        if not all_finite(array):
            is_bad = active & ~np.isfinite(array).reshape(*active.shape, -1).all(axis=2)
            bad += [(int(position), name) for position in np.flatnonzero(is_bad)[:1]]
    if not bad:
        return None
    first, name = min(bad, key=lambda found: found[0])
    step, env_idx = divmod(first, active.shape[1])
    start = int(np.flatnonzero(starts[: step + 1, env_idx])[-1])
    # Episodes are numbered in the order in which they start
    position = int(np.count_nonzero(starts.ravel()[: start * active.shape[1] + env_idx]))
    return name, arrays[name][step, env_idx], env_idx, position, step - start
