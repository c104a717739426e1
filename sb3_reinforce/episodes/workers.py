"""A batch of whole episodes from an executor: processes of this machine, or of a cluster."""

import multiprocessing
import numbers
import os
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer, copy_obs
from sb3_reinforce.episodes.checks import check_count
from sb3_reinforce.episodes.rollout import finish_rollout, observes_steps, timeout_values
from sb3_reinforce.episodes.schedule import EpisodeSchedule
from sb3_reinforce.episodes.source import skips_idle_envs
from sb3_reinforce.episodes.tasks import Episode, pack_config, run_episodes, start_process


def check_workers(workers: Any, env: VecEnv) -> None:
    """Raise a ValueError if workers cannot make an environment."""
    if workers is None:
        return
    if not isinstance(workers, Executor):
        check_count("workers", workers)
        if multiprocessing.current_process().daemon:
            raise ValueError(f"{workers=} cannot start processes in a daemonic one, as of a Pool: use workers=None")
    if (context := getattr(workers, "_mp_context", None)) is not None and context.get_start_method() == "fork":
        raise ValueError(f'{workers=} forks this process, where PyTorch may hang: give it mp_context=get_context("spawn")')
    if not skips_idle_envs(env) or env.num_envs > 1 or env.unwrapped.maker is None:  # type: ignore[attr-defined]
        raise ValueError(
            f"{workers=} cannot use the environment {env}, because each worker makes its own. Give its id, an EnvSpec, or a "
            "function that makes it with all its wrappers (instead of VecNormalize: normalize_observations=True)"
        )


class Workers:
    """Runs episodes on an executor, or on a number of processes started with loky."""

    def __init__(self, workers: int | Executor):
        self._n_processes: int | None = None
        self._executor: Any = workers
        if isinstance(workers, numbers.Integral):
            try:
                import loky
            except ImportError as error:
                raise ImportError(f"{error}. A number of workers needs: pip install 'sb3-reinforce[workers]'") from error
            # loky's reusable executor may be shared with others
            self._n_processes, start = int(workers), dict(initializer=start_process, initargs=(os.getpid(),))
            self._executor = loky.ProcessPoolExecutor(self._n_processes, timeout=300, **start)
        #: Mean steps of an episode of the latest batch, None before, and steps of unused episodes
        self.mean_steps: float | None = None
        self.n_discarded = 0

    def count(self) -> int:
        """Number of tasks that run at a time, as far as the executor says, and at least 1."""
        for name in ("_max_workers", "num_workers"):
            if isinstance(n_workers := getattr(self._executor, name, self._n_processes), int):
                return n_workers
        client = getattr(self._executor, "_client", None)
        return max(1, sum(client.ncores().values())) if client is not None else os.cpu_count() or 1

    def close(self) -> None:
        """Stop the processes, which close their environments if a step ends in time. A given executor keeps running."""
        if self._n_processes is not None:
            processes, deadline = [*(self._executor._processes or {}).values()], time.monotonic() + 1
            self._executor.shutdown(wait=False)
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(max(0, deadline - time.monotonic()))
            self._executor.shutdown(wait=True, kill_workers=True)

    def episodes(self, config: bytes, schedule: EpisodeSchedule) -> Iterator[Episode]:
        """Run the episodes of a batch, in the order of their numbers, and count them in its schedule."""
        name = uuid.uuid4().hex
        tasks: deque[tuple[range, Future]] = deque()
        next_number, n_workers = schedule.next_number, self.count()
        try:
            while schedule.wants_more():
                numbered = range(next_number, next_number + 1)
                try:
                    while len(tasks) < 2 * n_workers and (n := self._next_range(schedule, next_number, n_workers)) > 0:
                        numbered = range(next_number, next_number + n)
                        tasks.append((numbered, self._executor.submit(run_episodes, name, config, numbered)))
                        next_number += n
                    numbered, future = tasks.popleft()
                    episodes, failure = future.result()
                except RuntimeError as error:
                    raise RuntimeError(
                        f"The episodes {numbered[0]} to {numbered[-1]} could not run ({error}): a worker died, or the "
                        "executor of workers=... is shut down. Does the environment end its process, or need too much memory?"
                    ) from error
                for episode in episodes:
                    if not schedule.wants_more():
                        self.n_discarded += len(episode.rewards)
                        continue
                    schedule.begin(np.ones(1, dtype=bool))
                    schedule.n_transitions += len(episode.rewards)
                    yield episode
                if failure is not None and schedule.wants_more():
                    raise failure
            self.mean_steps = schedule.n_transitions / schedule.n_started
        finally:
            for _, future in tasks:
                if not future.cancel():
                    future.add_done_callback(self._discard)

    def _discard(self, task: Future) -> None:
        """Count the steps of a task that could not be canceled when its batch was complete."""
        self.n_discarded += 0 if task.exception() else sum(len(episode.rewards) for episode in task.result()[0])

    def _next_range(self, schedule: EpisodeSchedule, next_number: int, n_workers: int) -> int:
        """Number of episodes of the next task, 0 if the running ones are likely to be enough."""
        n_done, n_pending = schedule.n_started, next_number - schedule.next_number
        mean_steps = schedule.n_transitions / n_done if n_done else self.mean_steps
        n_missing = max(0, schedule.min_episodes - n_done - n_pending)
        if schedule.n_transitions < schedule.min_transitions:
            if mean_steps is None:
                # One episode per worker shows how long they are
                n_missing = max(n_missing, n_workers - n_pending)
            else:
                n_steps = schedule.min_transitions - schedule.n_transitions
                n_missing = max(n_missing, int(np.ceil(n_steps / mean_steps)) - n_pending)
        # Large tasks need few calls; single episodes at the end keep all workers busy
        return int(np.ceil(n_missing / (2 * n_workers))) if mean_steps is not None else min(1, n_missing)


def collect_from_workers(
    model: Any,
    callback: BaseCallback,
    rollout_buffer: EpisodeRolloutBuffer,
    n_rollout_steps: int | None,
    schedule: EpisodeSchedule,
    workers: Workers,
) -> bool:
    """Fill a buffer with episodes that workers run. The callback sees the steps in order, once their episode is complete."""
    model.policy.set_training_mode(False)
    rollout_buffer.reset()
    callback.on_rollout_start()
    check_workers(model.workers, model.env)
    known: dict[str, Any] = dict(model=model, env=model.env, callback=callback, rollout_buffer=rollout_buffer)
    known |= dict(schedule=schedule, active=np.ones(1, dtype=bool), n_rollout_steps=n_rollout_steps)
    for episode in workers.episodes(pack_config(model), schedule):
        at_end = np.arange(len(episode.rewards)) == len(episode.rewards) - 1
        if observes_steps(callback):
            for n_steps, step in enumerate(_steps(episode, at_end), rollout_buffer.pos + 1):
                model.num_timesteps += 1
                callback.update_locals({**known, **step, "n_steps": n_steps})
                if not callback.on_step():
                    return False
        else:
            model.num_timesteps += len(at_end)
        model._update_info_buffer(episode.infos[-1:], at_end[-1:])
        # Callbacks may have changed them
        rewards, starts = episode.rewards.astype(np.float64), np.roll(at_end, 1)
        if model.bootstrap_timeouts:
            rewards[-1] += model.gamma * timeout_values(model.policy, episode.infos[-1:], np.array([len(rewards)]))[0]
        rollout_buffer.add(copy_obs(episode.observations), episode.actions, rewards, starts, np.ones_like(starts))
    finish_rollout(model, rollout_buffer, schedule)
    model.logger.record("time/discarded_steps", workers.n_discarded)
    return True


def _steps(episode: Episode, at_end: np.ndarray) -> Iterator[dict[str, Any]]:
    """Local variables of ``collect_episodes`` in each step. No observation follows the last one, which is repeated."""

    def row(array: Any, step: int) -> Any:
        return {key: entry[step, None] for key, entry in array.items()} if isinstance(array, dict) else array[step, None]

    for step, info in enumerate(episode.infos):
        yield dict(
            obs=row(episode.observations, step),
            new_obs=row(episode.observations, min(step + 1, len(episode.rewards) - 1)),
            actions=episode.actions[step, None],
            clipped_actions=episode.clipped_actions[step, None],
            rewards=episode.rewards[step, None],
            dones=at_end[step, None],
            infos=[info],
        )
