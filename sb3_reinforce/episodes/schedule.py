"""Numbered episodes: which episodes a batch has, which sub-environment runs which, and all seeds."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch as th

#: PyTorch's generators are shared by all threads
TORCH_LOCK = threading.RLock()


def episode_seed(seed: int, number: int) -> int:
    """Seed of an episode's ``reset()``, in [0, 2**31)."""
    return int(np.random.SeedSequence(seed, spawn_key=(number, 0)).generate_state(1)[0] >> 1)


def episode_rng(seed: int, number: int) -> np.random.Generator:
    """Generator of an episode's action noise."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, 1)))


def update_rng(seed: int, n_updates: int) -> np.random.Generator:
    """Generator of an update's randomness (dropout)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(n_updates, 2)))


@contextmanager
def torch_seeded_from(rng: np.random.Generator, device: th.device) -> Iterator[None]:
    """Seed PyTorch on a device from a NumPy generator, and restore PyTorch's generators afterwards."""
    seed = int(rng.integers(2**63))
    with TORCH_LOCK, th.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # th.manual_seed() would initialize devices that are not used
        th.default_generator.manual_seed(seed)
        if device.type == "cuda":
            th.cuda.manual_seed(seed)
        yield


class EpisodeSchedule:
    """
    The episodes of one rollout, from ``next_number`` on. A sub-environment that ends one starts the next while there are fewer
    than ``min_transitions`` transitions, also of unfinished episodes, or than ``min_episodes`` started episodes. Then, it is
    idle. Every episode that is started is used: the batch is not biased towards short ones. None for ``seed`` seeds none.
    """

    def __init__(self, n_envs: int, min_transitions: int, min_episodes: int, next_number: int = 0, seed: int | None = None):
        self.min_transitions, self.min_episodes = min_transitions, min_episodes
        self.next_number, self.seed = next_number, seed
        # (n_envs,) running sub-environments, and the number, first step and seed of their latest episodes. The array of
        # running ones is replaced instead of changed, so that callbacks may keep it
        self.active = np.zeros(n_envs, dtype=bool)
        self.numbers, self.start_steps = np.zeros((2, n_envs), dtype=int)
        self.seeds: list[int | None] = [None] * n_envs
        #: Sub-environments that started an episode with the latest step
        self.started: list[int] = []
        self.n_active = self.n_steps = self.n_transitions = self.n_started = self._n_idle_resets = 0

    def wants_more(self) -> bool:
        """Whether another episode has to be started."""
        return self.n_transitions < self.min_transitions or self.n_started < self.min_episodes

    def begin(self, at_start: np.ndarray) -> None:
        """Start the first episodes in the (n_envs,) sub-environments that are at the start of one."""
        for env_idx in at_start.nonzero()[0].tolist():
            self._start(env_idx)

    def begin_step(self) -> None:
        """Count a step of all active sub-environments before it is taken."""
        self.n_steps += 1
        self.n_transitions += self.n_active
        self._n_idle_resets = 0
        self.started = []

    def end_episode(self, env_idx: int) -> bool:
        """
        End the episode of a sub-environment with the current step. Return whether it starts the next one. Call this in order:
        an idle one that resets all the same gets the seed that the next rollout expects of it.
        """
        self._set_active(env_idx, False)
        if self.wants_more():
            self._start(env_idx)
            return True
        self.start_steps[env_idx] = self.n_steps
        self.seeds[env_idx] = self._seed_of(self.next_number + self._n_idle_resets)
        self._n_idle_resets += 1
        return False

    def _start(self, env_idx: int) -> None:
        self._set_active(env_idx, True)
        self.numbers[env_idx], self.start_steps[env_idx] = self.next_number, self.n_steps
        self.seeds[env_idx] = self._seed_of(self.next_number)
        self.started.append(env_idx)
        self.n_started += 1
        self.next_number += 1

    def _set_active(self, env_idx: int, value: bool) -> None:
        self.active = self.active.copy()
        self.active[env_idx] = value
        self.n_active = int(np.count_nonzero(self.active))

    def _seed_of(self, number: int) -> int | None:
        return None if self.seed is None else episode_seed(self.seed, number)

    def name(self, number: int) -> str:
        """Describe an episode, with the seed that reproduces it."""
        seed = self._seed_of(number)
        return f"episode {number}" + ("" if seed is None else f" (reset(seed={seed}))")

    def where(self, env_idx: int) -> str:
        """Describe the latest step, or reset, of a sub-environment."""
        if not self.active[env_idx]:
            return "in an episode outside the rollout"
        episode = self.name(int(self.numbers[env_idx]))
        n_steps = self.n_steps - self.start_steps[env_idx]
        return f"in reset() of {episode}" if env_idx in self.started else f"at step {n_steps} of {episode}"
