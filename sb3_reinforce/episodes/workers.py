"""Batches of whole episodes from an executor: processes of this machine, or of a cluster."""

import numbers
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.episodes.checks import check_count
from sb3_reinforce.episodes.rollout import log_rollout, timeout_values
from sb3_reinforce.episodes.schedule import EpisodeSchedule
from sb3_reinforce.episodes.source import endless_steps, skips_idle_envs
from sb3_reinforce.episodes.tasks import Episode, Job, run_episodes, start_process
from sb3_reinforce.episodes.vec_env import EpisodeRunner

#: A range of episodes whose worker has died is tried so many times.
MAX_TRIES = 3


def attach_workers(workers: Any, env: VecEnv) -> None:
    """
    Let an environment know whether workers run its episodes.

    :raises ValueError: if they are neither a number nor an executor, or cannot make the environment
    """
    inner: Any = env.unwrapped
    if workers is None:
        if isinstance(inner, EpisodeRunner):
            inner.has_workers = False
        return
    if not isinstance(workers, Executor):
        check_count("workers", workers)
    # Of a wrapper around it, workers would know nothing
    if not skips_idle_envs(env) or env.num_envs > 1 or inner.maker is None:
        raise ValueError(
            f"workers={workers!r} cannot have the environment that was given ({env}): each makes its own. Give its id, an "
            "EnvSpec, or a function that makes it with all its wrappers (for VecNormalize: normalize_observations=True)"
        )
    inner.has_workers = True


@dataclass
class Task:
    """Consecutive episodes that run in one call."""

    first: int
    n_episodes: int
    future: Future

    @property
    def is_done(self) -> bool:
        """Whether it has a result."""
        return self.future.done() and self.future.exception() is None


class Workers:
    """
    Runs episodes on an executor, in the order of their numbers.

    :param workers: a number of processes, which loky starts; or an executor, which is used as it is
    :raises ImportError: if loky is needed and not installed
    """

    def __init__(self, workers: int | Executor):
        self._n_processes = int(workers) if isinstance(workers, numbers.Integral) else None
        self._executor: Any = self._start() if self._n_processes is not None else workers
        #: Mean number of steps of an episode of the latest batch, None before the first
        self.mean_steps: float | None = None
        #: Steps that were run beyond the end of a batch, in all
        self.n_discarded = 0

    def _start(self) -> Any:
        try:
            from loky import ProcessPoolExecutor
        except ImportError as error:
            raise ImportError(f"{error}. A number of workers needs: pip install 'sb3-reinforce[workers]'") from error
        # Not loky's reusable executor, which others may use, too
        return ProcessPoolExecutor(self._n_processes, timeout=300, initializer=start_process, initargs=(os.getpid(),))

    def count(self) -> int:
        """How many tasks run at a time, as far as the executor says; at least 1, as a cluster may have no workers yet."""
        if self._n_processes is not None:
            return self._n_processes
        for name in ("_max_workers", "num_workers"):
            if isinstance(n_workers := getattr(self._executor, name, None), int):
                return n_workers
        client = getattr(self._executor, "_client", None)
        return max(1, sum(client.ncores().values())) if client is not None else os.cpu_count() or 1

    def close(self) -> None:
        """Stop the processes; an executor that was given goes on."""
        if self._n_processes is not None:
            self._executor.shutdown(wait=True, kill_workers=True)

    def episodes(self, job: Job, schedule: EpisodeSchedule) -> Iterator[Episode]:
        """
        Run the episodes of a batch.

        :param job: environment, policy and seeds
        :param schedule: says how many; episodes are counted in it when they are returned
        :return: a generator of episodes in the order of their numbers
        :raises RuntimeError: if workers die again and again
        :raises Exception: what :func:`~sb3_reinforce.episodes.tasks.run_episodes` raises for an episode that is needed
        """
        name, content = uuid.uuid4().hex, job.pack()
        tasks: deque[Task] = deque()
        first, next_number = schedule.next_number, schedule.next_number
        n_failures = n_done = 0
        n_workers = self.count()
        try:
            while schedule.wants_more():
                while len(tasks) < 2 * n_workers:
                    n_pending = next_number - first - n_done
                    if (n_episodes := self._next_range(schedule, n_pending, n_workers)) == 0:
                        break
                    tasks.append(self._submit(name, content, next_number, n_episodes))
                    next_number += n_episodes
                task = tasks[0]
                try:
                    episodes = task.future.result()
                except BrokenExecutor as error:
                    n_failures += 1
                    if self._n_processes is None or n_failures == MAX_TRIES:
                        numbers = f"{task.first} to {task.first + task.n_episodes - 1}"
                        raise RuntimeError(
                            f"A worker has died {n_failures} times in a row while the episodes {numbers} were to run "
                            f"({type(error).__name__}: {error}). If their environment ends its process or needs more memory "
                            "than there is, that has to be mended"
                        ) from error
                    self._executor = self._start()
                    tasks = deque(
                        old if old.is_done else self._submit(name, content, old.first, old.n_episodes) for old in tasks
                    )
                    continue
                n_failures = 0
                tasks.popleft()
                if (n_left := task.n_episodes - len(episodes)) > 0:
                    tasks.appendleft(self._submit(name, content, task.first + len(episodes), n_left))
                for episode in episodes:
                    if not schedule.wants_more():
                        self.n_discarded += episode.n_steps
                        continue
                    schedule.n_started += 1
                    schedule.n_transitions += episode.n_steps
                    schedule.next_number += 1
                    n_done += 1
                    yield episode
            self.mean_steps = schedule.n_transitions / n_done
        finally:
            for task in tasks:
                if not task.future.cancel():
                    task.future.add_done_callback(self._discard)

    def _next_range(self, schedule: EpisodeSchedule, n_pending: int, n_workers: int) -> int:
        """How many episodes the next task has: none if those that run are likely to be enough."""
        n_done = schedule.n_started
        mean_steps = schedule.n_transitions / n_done if n_done else self.mean_steps
        n_missing = max(0, schedule.min_episodes - n_done - n_pending)
        if schedule.n_transitions < schedule.min_transitions:
            if mean_steps is None:
                # One for each worker shows how long they are
                n_missing = max(n_missing, n_workers - n_pending)
            else:
                n_steps = schedule.min_transitions - schedule.n_transitions
                n_missing = max(n_missing, int(np.ceil(n_steps / mean_steps)) - n_pending)
        # Few large tasks cost few calls, and single episodes at the end leave no worker long without one
        return int(np.ceil(n_missing / (2 * n_workers))) if mean_steps is not None else min(1, n_missing)

    def _submit(self, name: str, content: bytes, first: int, n_episodes: int) -> Task:
        try:
            return Task(first, n_episodes, self._executor.submit(run_episodes, name, content, first, n_episodes))
        except BrokenExecutor as error:
            future: Future = Future()
            future.set_exception(error)
            return Task(first, n_episodes, future)
        except RuntimeError as error:
            raise RuntimeError(
                f"The executor of the workers takes no more tasks ({error}): give one that is running"
            ) from error

    def _discard(self, future: Future) -> None:
        if not future.cancelled() and future.exception() is None:
            self.n_discarded += sum(episode.n_steps for episode in future.result())


def make_job(model: Any) -> Job:
    """What workers have to know of a model."""
    env = model.env
    return Job(
        env_name=env.unwrapped.name,
        env=env.unwrapped.maker,
        max_episode_steps=env.unwrapped.max_episode_steps,
        observation_space=env.observation_space,
        action_space=env.action_space,
        policy=model.policy,
        env_seed=model.seed,
        noise_seed=model.run_seed,
        sde_sample_freq=model.sde_sample_freq,
        n_threads=th.get_num_threads(),
        endless_steps=endless_steps(env.observation_space),
        episode_timeout=model.episode_timeout,
    )


def collect_from_workers(
    model: Any,
    callback: BaseCallback,
    rollout_buffer: EpisodeRolloutBuffer,
    schedule: EpisodeSchedule,
    workers: Workers,
    bootstrap_timeouts: bool,
) -> bool:
    """
    Fill a buffer with whole episodes that workers run, see :func:`~sb3_reinforce.episodes.rollout.collect_episodes`.

    The callback sees each step in its order, when the episode is over. What it changes of the policy acts from the next batch
    on.
    """
    model.policy.set_training_mode(False)
    rollout_buffer.reset()
    callback.on_rollout_start()
    known: dict[str, Any] = dict(model=model, env=model.env, rollout_buffer=rollout_buffer, schedule=schedule)
    known.update(active=np.ones(1, dtype=bool), n_steps=0)
    for episode in workers.episodes(make_job(model), schedule):
        rewards = episode.rewards.astype(np.float64)
        if bootstrap_timeouts:
            rewards[-1] += model.gamma * timeout_values(model.policy, episode.infos[-1:], schedule)[0]
        rollout_buffer.add_episode(episode.observations, episode.actions, rewards, episode.values)
        for step in _steps(episode):
            model.num_timesteps += 1
            known["n_steps"] += 1
            known.update(zip(_STEP, step, strict=True))
            callback.update_locals(known)
            if not callback.on_step():
                return False
        model._update_info_buffer(episode.infos[-1:], np.ones(1, dtype=bool))
    rollout_buffer.finish()
    log_rollout(model.logger, schedule, known["n_steps"])
    model.logger.record("time/discarded_steps", workers.n_discarded)
    return True


#: Local variables of ``collect_episodes`` that are others in each step
_STEP = ("obs", "actions", "clipped_actions", "new_obs", "rewards", "dones", "infos")


def _steps(episode: Episode) -> Iterator[tuple[Any, ...]]:
    """What these are in the steps of an episode. No observation follows the last one: it comes again."""

    def rows(array: Any, order: Any = slice(None)) -> Any:
        if isinstance(array, dict):
            return (dict(zip(array, row, strict=True)) for row in zip(*(rows(x, order) for x in array.values()), strict=True))
        # A first dimension for the environment: iterating is several times as fast as slicing
        return array[order, None]

    following = np.minimum(np.arange(episode.n_steps) + 1, episode.n_steps - 1)
    dones = np.arange(episode.n_steps) == episode.n_steps - 1
    return zip(
        rows(episode.observations),
        rows(episode.actions),
        rows(episode.clipped_actions),
        rows(episode.observations, following),
        rows(episode.rewards),
        rows(dones),
        ([info] for info in episode.infos),
        strict=True,
    )


@dataclass
class EnvFactory:
    """
    Makes an environment as SB3's ``make_vec_env`` does, with a monitor file of its own: ``REINFORCE(..., EnvFactory(...))``

    :param env_id: id of the environment
    :param env_kwargs: arguments for it
    :param wrapper_class: wrapper to put around it, with ``wrapper_kwargs``
    :param monitor_dir: folder for a monitor file of each environment that is made; SB3's ``load_results`` reads them together.
        Episodes beyond the end of a batch are in these files too
    :param monitor_kwargs: arguments for ``Monitor``
    """

    env_id: str | EnvSpec
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    wrapper_class: Callable[..., gym.Env] | None = None
    wrapper_kwargs: dict[str, Any] = field(default_factory=dict)
    monitor_dir: str | None = None
    monitor_kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> gym.Env:
        # Unlike the numbers of processes, these never come again
        filename = None if self.monitor_dir is None else os.path.join(self.monitor_dir, uuid.uuid4().hex)
        monitor_kwargs = {**self.monitor_kwargs, "override_existing": True}
        env: gym.Env = Monitor(gym.make(self.env_id, **self.env_kwargs), filename, **monitor_kwargs)
        return env if self.wrapper_class is None else self.wrapper_class(env, **self.wrapper_kwargs)
