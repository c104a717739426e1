"""Numbered episodes: which of them a batch consists of, which environment runs which, and all seeds."""

from typing import Any

import numpy as np


def episode_seed(seed: int, number: int) -> int:
    """What the environment of an episode is reset with, in [0, 2**31), from the model's seed and the episode's number."""
    return int(np.random.SeedSequence(seed, spawn_key=(number, 0)).generate_state(1)[0] >> 1)


def episode_rng(seed: int, number: int) -> np.random.Generator:
    """Generator of the noise of the actions of an episode, from the model's seed and the episode's number."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, 1)))


def update_rng(seed: int, n_updates: int) -> np.random.Generator:
    """Generator of what is random in an update (dropout), from the model's seed and the number of updates before it."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(n_updates, 2)))


class EpisodeSchedule:
    """
    Which episodes a rollout consists of, and which environment runs which.

    An environment that ends an episode starts the next number while fewer than ``min_transitions`` transitions have been
    collected, finished and in progress, or fewer than ``min_episodes`` episodes started; after that it is idle. Every episode
    that is started is used: a batch is not biased towards short ones.

    :param n_envs: number of environments
    :param min_transitions: transitions wanted, over all environments
    :param min_episodes: episodes wanted, over all environments
    :param next_number: number of the first episode
    :param seed: seed of the model, None to leave environments unseeded
    """

    def __init__(self, n_envs: int, min_transitions: int, min_episodes: int, next_number: int = 0, seed: int | None = None):
        self.min_transitions = min_transitions
        self.min_episodes = min_episodes
        self.next_number = next_number
        self.seed = seed
        # Arrays are never changed in place: what was read from here stays as it was
        #: (n_envs,) environments with an episode of the rollout
        self.active = np.zeros(n_envs, dtype=bool)
        #: (n_envs,) number of the latest episode of each environment, the step of the rollout at which it began, and what the
        #: latest reset was seeded with
        self.numbers = np.zeros(n_envs, dtype=int)
        self.began = np.zeros(n_envs, dtype=int)
        self.seeds: list[int | None] = [None] * n_envs
        #: Environments that have started an episode with the latest step
        self.started: list[int] = []
        self.n_active = self.n_steps = self.n_transitions = self.n_started = 0
        self._n_spare = 0
        self._before = self.active, self.numbers, self.began

    def wants_more(self) -> bool:
        """Whether another episode has to be started."""
        return self.n_transitions < self.min_transitions or self.n_started < self.min_episodes

    def _seed_of(self, number: int) -> int | None:
        return None if self.seed is None else episode_seed(self.seed, number)

    def begin(self, at_start: np.ndarray) -> None:
        """Start the first episodes where environments can begin one; the others finish one that is not in the rollout."""
        for env_idx in at_start.nonzero()[0].tolist():
            self._start(env_idx)
        self._before = self.active, self.numbers, self.began

    def begin_step(self) -> None:
        """Count a step of all active environments, before it is taken."""
        self._before = self.active, self.numbers, self.began
        self.n_steps += 1
        self.n_transitions += self.n_active
        self._n_spare = 0
        if self.started:
            self.started = []

    def end_episode(self, env_idx: int) -> bool:
        """
        An environment has ended an episode with the current step: start the next number in it, or let it go idle.

        Call this for one environment after the other, in order. One that goes idle but is reset all the same gets the seed
        that the next rollout expects, should that begin right there.

        :return: whether the environment has started an episode
        """
        if self.active[env_idx]:
            self.active = replaced(self.active, env_idx, False)
            self.n_active -= 1
        if self.wants_more():
            self._start(env_idx)
            return True
        self.began = replaced(self.began, env_idx, self.n_steps)
        self.seeds[env_idx] = self._seed_of(self.next_number + self._n_spare)
        self._n_spare += 1
        return False

    def _start(self, env_idx: int) -> None:
        self.active = replaced(self.active, env_idx, True)
        self.numbers = replaced(self.numbers, env_idx, self.next_number)
        self.began = replaced(self.began, env_idx, self.n_steps)
        self.started.append(env_idx)
        self.n_active += 1
        self.n_started += 1
        self.seeds[env_idx] = self._seed_of(self.next_number)
        self.next_number += 1

    def where(self, env_idx: int) -> str:
        """The place of the current step of an environment, in words; what it has ended is not over yet."""
        active, numbers, began = self._before
        if not active[env_idx]:
            return "within an episode that is not in the rollout"
        return f"at step {self.n_steps - began[env_idx]} of {self.name(int(numbers[env_idx]))}"

    def name(self, number: int) -> str:
        """An episode, in words, with what shows it again."""
        seed = self._seed_of(number)
        return f"episode {number}" + ("" if seed is None else f" (reset(seed={seed}))")


def replaced(array: np.ndarray, index: int, value: Any) -> np.ndarray:
    """A copy of an array with another value at an index."""
    array = array.copy()
    array[index] = value
    return array
