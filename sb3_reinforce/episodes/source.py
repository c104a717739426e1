"""Any ``VecEnv``, stepped through the episodes of a schedule, with what it returns checked."""

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage, unwrap_vec_normalize

from sb3_reinforce.episodes.acting import all_finite
from sb3_reinforce.episodes.schedule import EpisodeSchedule, episode_seed
from sb3_reinforce.episodes.vec_env import EpisodeRunner, idle_info

#: An episode of more steps never ends, nor does one of more than 1,000 steps with so many bytes of observations.
ENDLESS_STEPS = 100_000
ENDLESS_BYTES = 2**32


def endless_steps(observation_space: spaces.Space) -> int:
    """Number of steps after which an episode counts as one that never ends, before it fills the memory."""
    is_dict = isinstance(observation_space, spaces.Dict)
    entries: Any = observation_space.spaces.values() if is_dict else [observation_space]  # type: ignore[attr-defined]
    n_bytes = sum(int(np.prod(entry.shape)) * entry.dtype.itemsize for entry in entries)
    return min(ENDLESS_STEPS, max(1000, ENDLESS_BYTES // max(1, n_bytes)))


class EpisodeSource:
    """
    Steps a ``VecEnv`` through the episodes of a schedule.

    :param env: the environments
    :param schedule: which episodes they run
    :param owner: the model
    :param max_steps: an episode of more steps never ends, None for :func:`endless_steps`
    """

    def __init__(self, env: VecEnv, schedule: EpisodeSchedule, owner: Any = None, max_steps: int | None = None):
        self.env = env
        self.owner = owner
        self.schedule = schedule
        inner = env.unwrapped
        self.episode_env = inner if isinstance(inner, EpisodeRunner) else None
        self.skips_idle_envs = skips_idle_envs(env)
        #: (n_envs,) whether the latest observations are the first of an episode; of use where idle environments are stepped
        self.at_start = np.zeros(env.num_envs, dtype=bool)
        self._endless_steps = max_steps or endless_steps(env.observation_space)

    def begin(self, last_obs: Any, at_start: np.ndarray) -> Any:
        """
        Start the first episodes.

        :param last_obs: latest observations, None to reset the environments
        :param at_start: (n_envs,) whether these are the first of an episode
        """
        try:
            if self.episode_env is not None and self.skips_idle_envs:
                self.schedule.begin(np.ones_like(at_start))
                obs = self.episode_env.begin_episodes(self.schedule)
                last_obs = obs if self.env is self.episode_env else self.env.transpose_observations(obs)  # type: ignore[attr-defined]
            else:
                if last_obs is None:
                    seed_next_episodes(self.env, self.schedule)
                    last_obs, at_start = self.env.reset(), np.ones_like(at_start)
                elif self.episode_env is not None and self.episode_env.owner is not self.owner:
                    at_start = np.zeros_like(at_start)
                self.schedule.begin(at_start)
            if self.episode_env is not None:
                self.episode_env.owner = self.owner
        except Exception as error:
            raise environment_error(self.env, error, "in reset()", self.schedule) from error
        try:
            self.check_finite("observation", last_obs)
        except ValueError:
            if self.episode_env is not None:
                # It is not to be the first one of an episode when it comes to that again
                self.episode_env.forget_starts()
            raise
        return last_obs

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """
        ``env.step(actions)``, checked, where idle environments have a reward of 0, done False, and an :func:`idle_info`.

        :raises ValueError: if a reward or an observation is NaN or infinite
        :raises RuntimeError: if an environment raises, an episode does not end, or a callback steps the environments
        """
        schedule, episode_env = self.schedule, self.episode_env
        active = schedule.active
        schedule.begin_step()
        if episode_env is not None:
            if episode_env.owner is not self.owner:
                raise RuntimeError(
                    "A callback has stepped or reset the training environment in the middle of a rollout: what follows would "
                    "be parts of episodes. Give the callback an environment of its own"
                )
            episode_env.schedule, episode_env.steps_idle_envs = schedule, not self.skips_idle_envs
        try:
            obs, rewards, dones, infos = self.env.step(actions)
        except Exception as error:
            raise environment_error(self.env, error, "in step()", schedule) from error
        finally:
            if episode_env is not None:
                episode_env.schedule = None
        if episode_env is not self.env:
            # Others may return any type: learning must not depend on it
            dones = np.asarray(dones, dtype=bool)
            with np.errstate(over="ignore"):
                rewards = np.asarray(rewards, dtype=np.float32)
        # A finite sum means that all rewards are finite; a handful of them is summed fastest as a list
        if not math.isfinite(sum(rewards.tolist())) or isinstance(obs, dict) or not all_finite(obs):  # type: ignore[arg-type]
            normalize = unwrap_vec_normalize(self.env)
            if normalize is not None:
                # It spreads what is not finite over all environments
                self.check_finite("reward", normalize.get_original_reward())
                self.check_finite("observation", normalize.get_original_obs())
            self.check_finite("reward", rewards)
            self.check_finite("observation", obs)
        for env_idx in dones.nonzero()[0].tolist():
            if active[env_idx]:
                self.check_finite("terminal observation", infos[env_idx].get("terminal_observation"), env_idx)
            if episode_env is None:
                schedule.end_episode(env_idx)
        if not self.skips_idle_envs:
            self.at_start = dones
            if not active.all():
                rewards, dones = np.where(active, rewards, np.float32(0)), dones & active
                infos = [info if active[env_idx] else idle_info(info) for env_idx, info in enumerate(infos)]
        # Now and then: it costs as much as acting
        if schedule.n_steps % 512 == 0:
            self._check_endless()
        return obs, rewards, dones, infos

    def _check_endless(self) -> None:
        running = self.schedule.active if self.skips_idle_envs else np.ones_like(self.schedule.active)
        steps = np.where(running, self.schedule.n_steps - self.schedule.began, 0)
        if steps.max() >= self._endless_steps:
            raise RuntimeError(
                f"The episode of environment {steps.argmax()} has not ended after {steps.max():,} steps. REINFORCE learns "
                "from whole episodes: limit them with max_episode_steps (with a VecEnv: in its env_kwargs, or by gymnasium's "
                "TimeLimit). If they are meant to be so long, raise ENDLESS_STEPS or ENDLESS_BYTES of sb3_reinforce.rollout"
            )

    def check_finite(self, name: str, values: Any, env_idx: int | None = None) -> None:
        """Raise a ValueError if something in what all environments have returned, or one of them, is NaN or infinite."""
        if isinstance(values, dict):
            for key, entry in values.items():
                self.check_finite(f"{name} under {key!r}", entry, env_idx)
            return
        # A terminal observation may be a number, a list, or missing
        values = np.zeros(()) if values is None else np.asarray(values)
        if not all_finite(values):
            for idx, value in enumerate(values) if env_idx is None else [(env_idx, values)]:
                if not np.isfinite(value).all():
                    raise ValueError(
                        f"Environment {idx} returned the {name} {np.asarray(value).tolist()} {self.schedule.where(idx)}: it "
                        "is NaN, infinite, or too large for float32 (3.4e38). Nothing was learned from this rollout. Mend the "
                        "environment, or scale or replace such values in a wrapper"
                    )


def skips_idle_envs(env: VecEnv) -> bool:
    """Whether environments without an episode are not stepped: no wrapper may mistake that for steps."""
    return isinstance(env.venv if type(env) is VecTransposeImage else env, EpisodeRunner)


def seeds_episodes(env: VecEnv) -> bool:
    """Whether each episode is seeded by its number."""
    inner = env.unwrapped
    return isinstance(inner, EpisodeRunner) and inner.seeds_episodes


def seed_next_episodes(env: VecEnv, schedule: EpisodeSchedule) -> None:
    """Let the next ``reset()`` of the environments begin the next episodes of a schedule, if they can and it has a seed."""
    if isinstance(env.unwrapped, EpisodeRunner) and schedule.seed is not None:
        numbers = range(schedule.next_number, schedule.next_number + env.num_envs)
        env.unwrapped.seed_episodes([episode_seed(schedule.seed, number) for number in numbers])


def environment_error(env: VecEnv, error: Exception, doing: str, schedule: EpisodeSchedule | None = None) -> RuntimeError:
    """The error to raise from one of an environment: it says which one raised, doing what, and where in its episode."""
    env_idx = _failed_env(env)
    who = f"Environment {env_idx}" if env_idx is not None else f"One of the {env.num_envs} environments"
    if schedule is not None and env_idx is not None:
        # At the end of an episode, step() resets
        if env_idx in schedule.started:
            doing = f"in reset() of {schedule.name(int(schedule.numbers[env_idx]))}"
        else:
            doing = f"{doing} {schedule.where(env_idx)}"
    return RuntimeError(f"{who} raised {type(error).__name__} {doing}: {error}")


def _failed_env(env: VecEnv) -> int | None:
    """Index of the environment that raised, as far as one can tell from outside of the ``VecEnv``."""
    if isinstance(env.unwrapped, EpisodeRunner):
        # None if a wrapper has raised
        env.unwrapped.failed_env, env_idx = None, env.unwrapped.failed_env
        return env_idx
    if env.num_envs == 1:
        return 0
    # SubprocVecEnv: the process of the environment has died
    for env_idx, process in enumerate(getattr(env.unwrapped, "processes", [])):
        process.join(timeout=0.1)
        if not process.is_alive():
            return env_idx
    return None
