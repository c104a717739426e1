"""
What a worker runs: whole episodes, as a function of the weights, the seed and their numbers.

Where and when an episode runs, or runs again after a worker has died, changes nothing of it.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from sb3_reinforce.episodes.acting import Actor, EpisodeNoise, make_actor
from sb3_reinforce.episodes.schedule import EpisodeSchedule
from sb3_reinforce.episodes.source import EpisodeSource
from sb3_reinforce.episodes.vec_env import wrap_env


class Episode(NamedTuple):
    """One episode as a ``VecEnv`` of one environment has returned it, with T rows in each array."""

    number: int
    #: (T, ...) or a dictionary of these
    observations: Any
    #: (T, ...) as they were sampled, and what the environment got for them
    actions: np.ndarray
    clipped_actions: np.ndarray
    #: (T,)
    rewards: np.ndarray
    #: (T,) the baseline's values, NaN where they are not known
    values: np.ndarray
    infos: list[dict[str, Any]]

    @property
    def n_steps(self) -> int:
        return len(self.rewards)


@dataclass
class Job:
    """
    What a worker has to know to run episodes. It does not change while a policy does not.

    :param env_name: a worker makes another environment for another name only
    :param env: an id, a callable or an ``EnvSpec``
    :param max_episode_steps: see ``REINFORCE``, as ``sde_sample_freq`` and ``episode_timeout``
    :param policy: acts; without its optimizer, on the CPU
    :param env_seed: seed of the environments, None to leave them unseeded
    :param noise_seed: seed of the noise of the actions
    :param n_threads: of PyTorch, on whose number the last bits of what it computes may depend
    :param endless_steps: an episode of more steps never ends
    """

    env_name: str
    env: Any
    max_episode_steps: int | None
    observation_space: spaces.Space
    action_space: spaces.Space
    policy: ActorCriticPolicy
    env_seed: int | None
    noise_seed: int
    sde_sample_freq: int
    n_threads: int
    endless_steps: int
    episode_timeout: float | None = None

    def pack(self) -> bytes:
        """:raises ValueError: if it cannot be pickled"""
        policy: Any = copy(getattr(self.policy, "_orig_mod", self.policy))
        policy.__dict__.pop("optimizer", None)
        try:
            content = cloudpickle.dumps(replace(self, policy=policy))
            if policy.device.type != "cpu":
                policy = cloudpickle.loads(cloudpickle.dumps(policy)).to("cpu")
                content = cloudpickle.dumps(replace(self, policy=policy))
            return content
        except Exception as error:
            raise ValueError(
                f"The environment or the policy cannot be sent to workers: {error}. Give an environment by its id, or by a "
                "function that makes it"
            ) from error


#: What this process (each thread of it) has last run: a job and its environment, and their names.
_LATEST = threading.local()


def run_episodes(job_name: str, content: bytes, first: int, n_episodes: int) -> list[Episode]:
    """
    Run consecutive episodes, in a worker.

    :param job_name: another one for each job
    :param content: the job, as :meth:`Job.pack` makes it
    :param first: number of the first episode
    :param n_episodes: how many
    :return: the episodes, those before the first that has failed if it was not the first of all: the batch may not need that
        one, and asks for it again if it does
    :raises ValueError: if something is NaN or infinite, see :class:`~sb3_reinforce.episodes.source.EpisodeSource`
    :raises RuntimeError: for everything else. Others may not survive being sent
    """
    episodes: list[Episode] = []
    name = f"episode {first}"
    try:
        job = _unpack(job_name, content)
        name = EpisodeSchedule(1, 0, 1, seed=job.env_seed).name(first)
        _run_in_time(job, _make_env(job), range(first, first + n_episodes), episodes)
    except (Exception, SystemExit) as error:
        if not episodes:
            if type(error) in (ValueError, RuntimeError):
                raise
            raise RuntimeError(f"A worker failed before or in {name}: {type(error).__name__}: {error}") from error
    return list(episodes)


def _unpack(name: str, content: bytes) -> Job:
    """Unpack a job, once for all of its tasks."""
    latest = vars(_LATEST)
    if latest.get("job_name") != name:
        latest.update(job=cloudpickle.loads(content), job_name=name)
    return latest["job"]


def _make_env(job: Job) -> VecEnv:
    """The environment of a job, which is kept for all jobs that name it."""
    latest = vars(_LATEST)
    if latest.get("env_name") != job.env_name:
        latest["env_name"] = None
        if "env" in latest:
            latest.pop("env").close()
        env = wrap_env(job.env, job.max_episode_steps)
        for kind in ("observation_space", "action_space"):
            if getattr(env, kind) != getattr(job, kind):
                raise ValueError(
                    f"The environment made in a worker has the {kind} {getattr(env, kind)}, that of the model is "
                    f"{getattr(job, kind)}: a function that makes it must always make the same"
                )
        latest.update(env=env, env_name=job.env_name)
    return latest["env"]


def _run_in_time(job: Job, env: VecEnv, numbers: range, episodes: list[Episode]) -> None:
    """Run episodes and append them, in a thread of their own if one may take too long: it cannot be stopped, only left."""
    if job.episode_timeout is None:
        return _run(job, env, numbers, episodes)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _run(job, env, numbers, episodes)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    n_before = -1
    while thread.is_alive():
        if len(episodes) == n_before:
            vars(_LATEST).clear()
            name = EpisodeSchedule(1, 0, 1, seed=job.env_seed).name(numbers[n_before])
            raise RuntimeError(
                f"The {name} has not ended within episode_timeout={job.episode_timeout} seconds. Mend what it waits for, or "
                "allow it more time"
            )
        n_before = len(episodes)
        thread.join(job.episode_timeout)
    if errors:
        raise errors[0]


def _run(job: Job, env: VecEnv, numbers: range, episodes: list[Episode]) -> None:
    act = make_actor(job.policy, EpisodeNoise(1, job.noise_seed, job.sde_sample_freq))
    with _torch_threads(job.n_threads):
        for number in numbers:
            episodes.append(_run_episode(job, env, act, number))


def _run_episode(job: Job, env: VecEnv, act: Actor, number: int) -> Episode:
    schedule = EpisodeSchedule(1, 0, 1, number, job.env_seed)
    source = EpisodeSource(env, schedule, job, job.endless_steps)
    obs = source.begin(None, np.ones(1, dtype=bool))
    act.noise.begin([0], schedule.numbers)
    steps: list[Any] = []
    while schedule.n_active:
        actions, clipped_actions = act(obs)
        new_obs, rewards, _, infos = source.step(clipped_actions)
        steps.append((obs, actions[0], clipped_actions[0], rewards[0], np.ravel(act.values)[0], infos[0]))
        obs = new_obs
    columns: list[Any] = list(zip(*steps, strict=True))
    return Episode._make([number, _stack(columns[0]), *map(np.array, columns[1:-1]), list(columns[-1])])


def _stack(observations: Any) -> Any:
    if isinstance(observations[0], dict):
        return {key: np.concatenate([obs[key] for obs in observations]) for key in observations[0]}
    return np.concatenate(observations)


@contextmanager
def _torch_threads(n_threads: int) -> Iterator[None]:
    before = th.get_num_threads()
    if before != n_threads:
        th.set_num_threads(n_threads)
    try:
        yield
    finally:
        if before != n_threads:
            th.set_num_threads(before)


def start_process(main_process: int) -> None:
    """
    Prepare a process that only runs episodes.

    :param main_process: the process that has started it, without which it ends
    """
    # Ctrl-C in a terminal reaches all processes, and it is the main one that decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == main_process:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
