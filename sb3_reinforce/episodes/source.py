"""Any ``VecEnv``, stepped through the episodes of a schedule."""

import math
import warnings
from time import perf_counter
from typing import Any

import numpy as np
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage

from sb3_reinforce.episodes.acting import Actor
from sb3_reinforce.episodes.buffer import all_finite
from sb3_reinforce.episodes.schedule import EpisodeSchedule, episode_seed
from sb3_reinforce.episodes.vec_env import EpisodeRunner, idle_info

#: Steps of an episode that never ends, unless max_episode_steps allows more, and seconds until a user asks whether it does
_LONG_EPISODE, _PATIENCE = 100_000, 30
_REMEDY = "set max_episode_steps (with a VecEnv: in its env_kwargs)"


class EpisodeSource:
    """Steps a ``VecEnv`` through the episodes of a schedule, for the model that is its ``user``."""

    def __init__(self, env: VecEnv, schedule: EpisodeSchedule, user: Any = None):
        self.env, self.schedule, self.user = env, schedule, user
        self.episode_env = env.unwrapped if isinstance(env.unwrapped, EpisodeRunner) else None
        self.skips_idle_envs = skips_idle_envs(env)
        self.patient_until = perf_counter() + _PATIENCE
        #: (n_envs,) whether the latest observations are the first of an episode, if idle sub-environments are stepped
        self.at_start = np.zeros(env.num_envs, dtype=bool)

    def begin(self, last_obs: Any, at_start: np.ndarray) -> Any:
        """Start the first episodes, from observations that may be the first of one, or None to reset. Return observations."""
        try:
            if self.episode_env is not None and self.skips_idle_envs:
                self.schedule.begin(np.ones_like(at_start))
                obs = self.episode_env.begin_episodes(self.schedule)
                last_obs = obs if self.env is self.episode_env else self.env.transpose_observations(obs)  # type: ignore[attr-defined]
            else:
                if last_obs is None:
                    seed_next_episodes(self.env, self.schedule)
                    last_obs, at_start = self.env.reset(), np.ones_like(at_start)
                elif self.episode_env is not None and self.episode_env.user is not self.user:
                    at_start = np.zeros_like(at_start)
                self.schedule.begin(at_start)
        except Exception as error:
            add_environment_note(error, self.env, "in reset()", self.schedule)
            raise
        if self.episode_env is not None:
            self.episode_env.user = self.user
        return last_obs

    def act(self, actor: Actor, obs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Sample actions, or raise an error that names the first observation that is NaN or infinite if PyTorch refuses to."""
        try:
            return actor(obs)
        except (ValueError, RuntimeError) as error:
            for key, entry in obs.items() if isinstance(obs, dict) else [("", obs)]:
                for env_idx, value in enumerate(entry):
                    if not all_finite(np.asarray(value)):
                        name = f"observation {key!r}" if key else "observation"
                        raise not_finite(f"Environment {env_idx}", name, value, self.schedule.where(env_idx)) from error
            raise

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step the environments. Idle sub-environments have a reward of 0, done False, and an :func:`idle_info`."""
        schedule, episode_env, active = self.schedule, self.episode_env, self.schedule.active
        schedule.begin_step()
        if episode_env is not None:
            if episode_env.user is not self.user:
                raise RuntimeError("A callback has stepped or reset the training environment during a rollout: use another")
            episode_env.schedule, episode_env.steps_idle_envs = schedule, not self.skips_idle_envs
        try:
            obs, rewards, dones, infos = self.env.step(actions)
        except Exception as error:
            add_environment_note(error, self.env, "in step()", schedule)
            raise
        finally:
            if episode_env is not None:
                episode_env.schedule = None
        if episode_env is not self.env:
            # Other VecEnvs may return any type
            dones = np.asarray(dones, dtype=bool)
            with np.errstate(over="ignore"):
                rewards = np.asarray(rewards, dtype=np.float32)
        if episode_env is None:
            for env_idx in dones.nonzero()[0].tolist():
                schedule.end_episode(env_idx)
        if not self.skips_idle_envs:
            self.at_start = dones
            if not active.all():
                rewards, dones = np.where(active, rewards, np.float32(0)), dones & active
                infos = [info if active[env_idx] else idle_info(info) for env_idx, info in enumerate(infos)]
        if schedule.n_steps % 100 == 0:
            n_steps = np.where(schedule.active | (not self.skips_idle_envs), schedule.n_steps - schedule.start_steps, 0)
            if n_steps.max() >= max(_LONG_EPISODE, getattr(episode_env, "max_episode_steps", None) or 0):
                raise RuntimeError(
                    f"The episode of environment {n_steps.argmax()} has not ended after {n_steps.max():,} steps. REINFORCE "
                    f"learns from whole episodes: {_REMEDY}"
                )
            if n_steps.max() == schedule.n_steps and perf_counter() > self.patient_until:
                self.patient_until = math.inf
                warnings.warn(f"An episode has not ended after {_PATIENCE} s: if it never ends, {_REMEDY}", stacklevel=2)
        return obs, rewards, dones, infos


def skips_idle_envs(env: VecEnv) -> bool:
    """Whether idle sub-environments are not stepped, because no wrapper would count that as a step."""
    return isinstance(env.venv if type(env) is VecTransposeImage else env, EpisodeRunner)


def reasons_not_reproducible(env: VecEnv) -> list[str]:
    """Why episodes on a ``VecEnv`` do not depend on the weights, the seed and their number alone."""
    if not getattr(env.unwrapped, "seeds_episodes", False):
        return [f"a {type(env.unwrapped).__name__} does not seed each episode"]
    stateful = [cls.__name__ for cls in (NormalizeObservation, NormalizeReward) if any(env.env_is_wrapped(cls))]
    reasons = [f"each {name}, also those of workers, begins with statistics of its own" for name in stateful]
    if env.num_envs > 1 and not skips_idle_envs(env):
        reasons.append(f"a {type(env).__name__} steps idle environments")
    return reasons


def seed_next_episodes(env: VecEnv, schedule: EpisodeSchedule) -> None:
    """Seed the next ``reset()`` of the environments for the next episodes of a schedule, if it has a seed."""
    if isinstance(env.unwrapped, EpisodeRunner) and schedule.seed is not None:
        numbers = range(schedule.next_number, schedule.next_number + env.num_envs)
        env.unwrapped.seed_episodes([episode_seed(schedule.seed, number) for number in numbers])


def add_environment_note(error: Exception, env: VecEnv, where: str, schedule: EpisodeSchedule | None = None) -> None:
    """Note in an error of an environment which sub-environment raised it, and in which episode and step."""
    env_idx = getattr(env.unwrapped, "current_env", None) if env.num_envs > 1 else 0
    who = f"Environment {env_idx}" if env_idx is not None else f"One of the {env.num_envs} environments"
    if schedule is not None and env_idx is not None and schedule.n_started:
        where = schedule.where(env_idx)
    error.add_note(f"{who} raised this {where}")


def not_finite(who: str, name: str, value: Any, where: str) -> ValueError:
    """The error for a value that is NaN or infinite."""
    value = np.asarray(value)
    is_bad = ~(np.abs(value) <= np.finfo(np.float32).max)
    bad = tuple(map(int, np.argwhere(is_bad)[0])) if is_bad.any() else ()
    what = value.tolist() if value.size <= 10 else f"with {value[bad]} at {bad}"
    return ValueError(
        f"{who} returned the {name} {what} {where}: NaN, infinite, or too large for float32 (3.4e38). Nothing was learned "
        "from this rollout. Fix the environment, or scale or replace such values in a wrapper"
    )
