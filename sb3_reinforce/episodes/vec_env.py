"""A ``VecEnv`` for numbered episodes: one reset per episode, and idle sub-environments are not stepped."""

import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.patch_gym import _patch_env
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_reinforce.episodes.checks import check_count, check_space
from sb3_reinforce.episodes.schedule import EpisodeSchedule

EnvSource = GymEnv | str | EnvSpec | Callable[[], GymEnv]
_ATOMIC = frozenset({bool, int, float, str, type(None), np.bool_, np.float32, np.float64, np.int32, np.int64})


class EpisodeRunner(VecEnv):
    """Interface of a ``VecEnv`` that runs the episodes of an :class:`EpisodeSchedule` and can leave sub-environments idle."""

    seeds_episodes = True

    def _init_episodes(self) -> None:
        #: Episodes that REINFORCE runs, None while others step the environments
        self.schedule: EpisodeSchedule | None = None
        #: Whether idle sub-environments are stepped, because a wrapper counts the steps
        self.steps_idle_envs = False
        #: The model that stepped or reset the environments last (None: others), and the sub-environment that is stepped
        self.user: Any = None
        self.current_env: int | None = None
        #: Arguments of :func:`wrap_env`, and the name under which workers keep their environments
        self.maker: EnvSpec | Callable[[], GymEnv] | None = None
        self.max_episode_steps: int | None = None
        self.name = uuid.uuid4().hex
        # Sub-environments at the start of an episode, with the seed of their reset; idle ones at the end of an episode
        self._at_start: dict[int, int | None] = {}
        self._at_end: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"user": None}

    def seed_episodes(self, seeds: Sequence[int | None]) -> None:
        """Seed each environment at the next ``reset()``."""
        self._seeds = list(seeds)

    def begin_episodes(self, schedule: EpisodeSchedule) -> VecEnvObs:
        """Reset the sub-environments that start an episode, except those that ``reset()`` has just reset for it."""
        raise NotImplementedError()


class EpisodeVecEnv(EpisodeRunner, DummyVecEnv):
    """
    SB3's ``DummyVecEnv`` with numbered episodes: stepped by REINFORCE, a sub-environment is reset once per episode, with the
    seed of that episode, and is not stepped while it is idle. Stepped by anything else, it behaves like ``DummyVecEnv``.

    :param env_fns: functions that make one environment each
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]]):
        super().__init__(env_fns)
        self._init_episodes()

    @classmethod
    def convert(cls, env: Any) -> "EpisodeVecEnv":
        """Convert a ``DummyVecEnv`` in place, so that its use by others is noticed."""
        env.__class__ = cls
        env._init_episodes()
        return env

    def _init_episodes(self) -> None:
        super()._init_episodes()
        self._array: np.ndarray | None = self.buf_obs[None] if self.keys == [None] else None  # type: ignore[index]

    def step_wait(self) -> VecEnvStepReturn:
        """Step like ``DummyVecEnv``. Idle sub-environments repeat their observation, see :func:`idle_info`."""
        schedule, active, infos = self.schedule, None, []
        if schedule is None:
            self.user = None
            for env_idx in tuple(self._at_end):
                self._reset_env(env_idx)
        elif schedule.n_active < self.num_envs and not self.steps_idle_envs:
            active = schedule.active
        self._at_start.clear()
        for env_idx, env in enumerate(self.envs):
            if active is not None and not active[env_idx]:
                self.buf_rews[env_idx], self.buf_dones[env_idx] = 0.0, False
                infos.append(idle_info(_copy(self.buf_infos[env_idx])))
                continue
            self.current_env = env_idx
            obs, self.buf_rews[env_idx], terminated, truncated, info = env.step(self.actions[env_idx])
            self.buf_infos[env_idx] = info
            self.buf_dones[env_idx] = terminated or truncated
            info["TimeLimit.truncated"] = truncated and not terminated
            if terminated or truncated:
                # reset() may reuse the memory of the observation
                info["terminal_observation"] = obs if schedule is None else _copy(obs)
                if schedule is None:
                    obs = self._reset_env(env_idx)
                elif schedule.end_episode(env_idx) or self.steps_idle_envs:
                    obs = self._reset_env(env_idx, schedule.seeds[env_idx])
                else:
                    self._at_end.add(env_idx)
            self._save_obs(env_idx, obs)
            infos.append(_copy(info))
        self.current_env = None
        return self._obs_from_buf(), self.buf_rews.copy(), self.buf_dones.copy(), infos

    def _reset_env(self, env_idx: int, seed: int | None = None) -> VecEnvObs:
        self.current_env = env_idx
        obs, self.reset_infos[env_idx] = self.envs[env_idx].reset() if seed is None else self.envs[env_idx].reset(seed=seed)
        self._at_start[env_idx] = seed
        self._at_end.discard(env_idx)
        return obs

    def reset(self) -> VecEnvObs:
        self.user, self.current_env, self._at_start, self._at_end = None, None, dict(enumerate(self._seeds)), set()
        return super().reset()

    def begin_episodes(self, schedule: EpisodeSchedule) -> VecEnvObs:
        for env_idx in schedule.active.nonzero()[0].tolist():
            seed = schedule.seeds[env_idx]
            if env_idx not in self._at_start or seed not in (None, self._at_start[env_idx]):
                self._save_obs(env_idx, self._reset_env(env_idx, seed))
        return self._obs_from_buf()

    def _get_target_envs(self, indices: Any) -> list[gym.Env]:
        if getattr(vars(self).get("user"), "_running_workers", None) is not None:  # none in DummyVecEnv.__init__()
            raise RuntimeError("Workers have their own environments, which attributes and methods do not reach: use infos")
        return super()._get_target_envs(indices)

    def _save_obs(self, env_idx: int, obs: Any) -> None:
        if self._array is not None and getattr(obs, "shape", None) == self.observation_space.shape:
            self._array[env_idx] = obs
            return
        try:
            for key, rows in self.buf_obs.items():
                value = np.asarray(obs if key is None else obs[key])
                if value.size != rows[env_idx].size:
                    raise ValueError(f"An observation has the shape {value.shape} instead of {rows.shape[1:]}")
                rows[env_idx] = value
        except (ValueError, TypeError, KeyError) as error:
            error.add_note("The observation does not fit its space: see check_env of gymnasium.utils.env_checker")
            raise

    def _obs_from_buf(self) -> VecEnvObs:
        if self._array is not None:
            return self._array.copy()
        return dict_to_obs(self.observation_space, OrderedDict((key, self.buf_obs[key].copy()) for key in self.keys))


def _copy(value: Any) -> Any:
    """Copy like deepcopy(), which is slow."""
    if (kind := type(value)) is dict:
        return {key: item if type(item) in _ATOMIC else _copy(item) for key, item in value.items()}
    return value.copy() if kind is np.ndarray and value.dtype.kind != "O" else deepcopy(value)


def idle_info(info: dict[str, Any]) -> dict[str, Any]:
    """The info of an idle sub-environment: the latest one with flags False, numbers 0, and no marks of an end."""
    numbers = (bool, int, float, np.number, np.bool_, np.ndarray)
    kept = {key: value for key, value in info.items() if key not in ("episode", "terminal_observation")}
    return {key: np.zeros_like(value)[()] if isinstance(value, numbers) else value for key, value in kept.items()}


def wrap_env(env: EnvSource, max_episode_steps: int | None = None, verbose: int = 0) -> VecEnv:
    """
    Wrap an environment as SB3 does, with an :class:`EpisodeVecEnv` instead of a ``DummyVecEnv``.

    :param env: id (made without render mode: many environments draw each frame), callable, environment or ``VecEnv``
    :param max_episode_steps: number of steps of a ``TimeLimit`` around the environment, inside its ``Monitor``
    :param verbose: 1 to print the wrappers
    :raises ValueError: if ``max_episode_steps`` is given for a ``VecEnv``
    """
    check_count("max_episode_steps", max_episode_steps)
    maker: Any = None
    if isinstance(env, (str, EnvSpec)):
        env = gym.make(env)
        # Other processes may not know the id
        maker = env.spec
    elif callable(env) and not isinstance(env, (gym.Env, VecEnv)):
        maker, env = env, env()
    is_plain = type(env) is DummyVecEnv or not isinstance(env, VecEnv)
    env = env if isinstance(env, VecEnv) else _patch_env(env)
    check_space("observation", env.observation_space)
    check_space("action", env.action_space)
    if isinstance(env, VecEnv):
        if max_episode_steps not in (None, getattr(env.unwrapped, "max_episode_steps", None)):
            raise ValueError(
                f"{max_episode_steps=} cannot be applied to a {type(env).__name__}: make its environments with "
                'make_vec_env(..., env_kwargs={"max_episode_steps": ...}), and leave max_episode_steps at None'
            )
    elif max_episode_steps is not None:
        if isinstance(env, Monitor):
            # Leave the limit of the user's environment alone
            env, inner_env = copy(env), env.env
            env.env = TimeLimit(inner_env, max_episode_steps)
        else:
            # A Monitor below the limit would not see it
            env = Monitor(TimeLimit(env, max_episode_steps))
    vec_env = OnPolicyAlgorithm._wrap_env(env, verbose)
    if is_plain:
        episode_env = EpisodeVecEnv.convert(vec_env.unwrapped)
        episode_env.maker, episode_env.max_episode_steps = maker, max_episode_steps
    return vec_env
