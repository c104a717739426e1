"""The ``VecEnv`` that runs numbered episodes: one reset per episode, and idle environments left alone."""

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
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecTransposeImage
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_reinforce.episodes.checks import check_count
from sb3_reinforce.episodes.schedule import EpisodeSchedule

#: What an environment can be made of
EnvSource = GymEnv | str | EnvSpec | Callable[[], GymEnv]

_LARGEST_REWARD = float(np.finfo(np.float32).max)
#: Types that a deep copy returns as they are.
_ATOMIC = frozenset({bool, int, float, str, type(None), np.bool_, np.float32, np.float64, np.int32, np.int64})


class EpisodeRunner(VecEnv):
    """What REINFORCE needs of a ``VecEnv`` to run the episodes of an :class:`EpisodeSchedule` and leave idle ones alone."""

    #: Whether each episode is seeded by its number
    seeds_episodes = True

    def _init_episodes(self) -> None:
        #: What REINFORCE has the environments do; None while others step them
        self.schedule: EpisodeSchedule | None = None
        #: Whether environments without an episode are stepped along, because a wrapper counts the steps
        self.steps_idle_envs = False
        #: The model that was the last to step or reset the environments, None for anything else
        self.owner: Any = None
        #: Index of the environment that raised
        self.failed_env: int | None = None
        #: What :func:`wrap_env` has made the environment of, and the ``TimeLimit`` around it
        self.maker: str | EnvSpec | Callable[[], GymEnv] | None = None
        self.max_episode_steps: int | None = None
        #: Whether workers make environments of their own in this one's place, and the name under which they keep them
        self.has_workers = False
        self.name = uuid.uuid4().hex
        # Environments at the start of an episode, and the seeds they were reset with; idle ones at the end of their last
        self._at_start: dict[int, int | None] = {}
        self._at_end: set[int] = set()

    def seed_episodes(self, seeds: Sequence[int | None]) -> None:
        """Seed each environment at the next ``reset()``."""
        self._seeds = list(seeds)

    def forget_starts(self) -> None:
        """Reset environments for their next episodes even if they are at the start of one."""
        self._at_start.clear()

    def begin_episodes(self, schedule: EpisodeSchedule) -> VecEnvObs:
        """Reset the environments that begin an episode, except those that ``reset()`` has just reset for it."""
        raise NotImplementedError()


class EpisodeVecEnv(EpisodeRunner, DummyVecEnv):
    """
    SB3's ``DummyVecEnv``, which also runs numbered episodes for REINFORCE.

    Stepped by others (an evaluation, A2C) it returns what ``DummyVecEnv`` returns, in about half the time: what is a plain
    number or string is not copied deeply. Stepped by REINFORCE it follows an :class:`EpisodeSchedule`: an environment is reset
    once for each of its episodes, with the seed of that episode, and is not stepped while it has no episode to finish.

    :param env_fns: functions that make one environment each
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]]):
        super().__init__(env_fns)
        self._init_episodes()

    @classmethod
    def take_over(cls, env: DummyVecEnv) -> "EpisodeVecEnv":
        """Make a plain ``DummyVecEnv`` an ``EpisodeVecEnv``: the same object, so that whoever else has it is noticed."""
        env.__class__ = cls
        assert isinstance(env, EpisodeVecEnv)
        env._init_episodes()
        return env

    def _init_episodes(self) -> None:
        super()._init_episodes()
        # The buffer of observations that are a single array, which needs no look at keys
        self._array: np.ndarray | None = self.buf_obs[None] if self.keys == [None] else None  # type: ignore[index]

    def step(self, actions: np.ndarray) -> VecEnvStepReturn:
        self.actions = actions
        return self.step_wait()

    def step_wait(self) -> VecEnvStepReturn:
        """As ``DummyVecEnv``; idle environments have the last observation, a reward of 0, done False, an :func:`idle_info`."""
        schedule = self.schedule
        active = None
        if schedule is None:
            self.owner = None
            for env_idx in tuple(self._at_end):
                self._reset_env(env_idx)
        elif schedule.n_active < self.num_envs and not self.steps_idle_envs:
            active = schedule.active
        self._at_start.clear()
        infos = []
        try:
            for env_idx, env in enumerate(self.envs):
                if active is not None and not active[env_idx]:
                    self.buf_rews[env_idx], self.buf_dones[env_idx] = 0.0, False
                    infos.append(idle_info(_copy(self.buf_infos[env_idx])))
                    continue
                reward: Any
                obs, reward, terminated, truncated, info = env.step(self.actions[env_idx])
                # What is too large for float32 becomes infinite without NumPy's warning
                self.buf_rews[env_idx] = reward * np.inf if abs(float(reward)) > _LARGEST_REWARD else reward
                self.buf_infos[env_idx] = info
                self.buf_dones[env_idx] = terminated or truncated
                info["TimeLimit.truncated"] = truncated and not terminated
                if terminated or truncated:
                    # An environment may use its memory again when it is reset; DummyVecEnv lets it
                    info["terminal_observation"] = obs if self.schedule is None else deepcopy(obs)
                    obs = self._end_episode(env_idx, obs)
                if self._array is not None:
                    self._array[env_idx] = obs
                else:
                    self._save_obs(env_idx, obs)
                infos.append(_copy(info))
        except Exception:
            self.failed_env = env_idx
            raise
        return self._obs_from_buf(), self.buf_rews.copy(), self.buf_dones.copy(), infos

    def _end_episode(self, env_idx: int, obs: VecEnvObs) -> VecEnvObs:
        """Reset an environment unless it goes idle; return the observation that it is left with."""
        if self.schedule is None:
            return self._reset_env(env_idx)
        if self.schedule.end_episode(env_idx) or self.steps_idle_envs:
            seed = self.schedule.seeds[env_idx]
            return self._reset_env(env_idx) if seed is None else self._reset_env(env_idx, seed=seed)
        self._at_end.add(env_idx)
        return obs

    def _reset_env(self, env_idx: int, **kwargs: Any) -> VecEnvObs:
        obs, self.reset_infos[env_idx] = self.envs[env_idx].reset(**kwargs)
        self._at_start[env_idx] = kwargs.get("seed")
        self._at_end.discard(env_idx)
        return obs

    def _begin_env(self, env_idx: int, seed: int | None) -> None:
        """Reset an environment as ``DummyVecEnv.reset()`` does: options are used once."""
        options = self._options[env_idx]
        try:
            obs = self._reset_env(env_idx, seed=seed, **({"options": options} if options else {}))
        except Exception:
            self.failed_env = env_idx
            raise
        self._options[env_idx] = {}
        self._save_obs(env_idx, obs)

    def reset(self) -> VecEnvObs:
        self.owner = None
        for env_idx, seed in enumerate(self._seeds):
            self._begin_env(env_idx, seed)
        self._reset_seeds()
        return self._obs_from_buf()

    def begin_episodes(self, schedule: EpisodeSchedule) -> VecEnvObs:
        for env_idx in schedule.active.nonzero()[0].tolist():
            seed = schedule.seeds[env_idx]
            if env_idx not in self._at_start or seed not in (None, self._at_start[env_idx]):
                self._begin_env(env_idx, seed)
        return self._obs_from_buf()

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._check_here("set_attr")
        super().set_attr(attr_name, value, indices)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        self._check_here("env_method")
        return super().env_method(method_name, *args, indices=indices, **kwargs)

    def set_options(self, options: list[dict] | dict | None = None) -> None:
        self._check_here("set_options")
        super().set_options(options)

    def _check_here(self, method_name: str) -> None:
        if self.has_workers:
            raise RuntimeError(
                f"{method_name}() would change nothing: the episodes run in workers, in environments of their own. Give "
                "model.set_env() a function that makes the environment as it is to be"
            )

    def _obs_from_buf(self) -> VecEnvObs:
        if self._array is not None:
            return self._array.copy()
        return dict_to_obs(self.observation_space, OrderedDict((key, self.buf_obs[key].copy()) for key in self.keys))


def _copy(info: dict[str, Any]) -> dict[str, Any]:
    copied = info.copy()
    for key, value in info.items():
        if type(value) not in _ATOMIC:
            copied[key] = deepcopy(value)
    return copied


def idle_info(info: dict[str, Any]) -> dict[str, Any]:
    """The info of an environment without an episode: nothing in it marks an end, and ``TimeLimit.truncated`` is False."""
    info = {key: value for key, value in info.items() if key not in ("episode", "terminal_observation")}
    return {**info, "TimeLimit.truncated": False} if "TimeLimit.truncated" in info else info


def wrap_env(env: EnvSource, max_episode_steps: int | None = None, verbose: int = 0) -> VecEnv:
    """
    Make the environment that REINFORCE steps.

    SB3 wraps it as for its own algorithms, and an :class:`EpisodeVecEnv` takes over the ``DummyVecEnv`` that it makes, or a
    plain one that is given. What is made from an id has no render mode, with which many environments draw every frame.

    :param env: an id, a callable, an environment or a ``VecEnv``
    :param max_episode_steps: put a ``TimeLimit`` of so many steps around the environment, inside of its ``Monitor``
    :param verbose: 1 to print what is wrapped
    :raises ValueError: if there is a ``max_episode_steps`` for a ``VecEnv``
    """
    check_count("max_episode_steps", max_episode_steps)
    maker: Any = None
    if isinstance(env, (str, EnvSpec)):
        maker, env = env, gym.make(env)
    elif callable(env) and not isinstance(env, (gym.Env, VecEnv)):
        maker, env = env, env()
    is_ours = type(env) is DummyVecEnv or not isinstance(env, VecEnv)
    if isinstance(env, VecEnv):
        if max_episode_steps not in (None, getattr(env.unwrapped, "max_episode_steps", None)):
            raise ValueError(
                f"max_episode_steps={max_episode_steps} cannot be put around the environments of a {type(env).__name__}: make "
                'them with make_vec_env(..., env_kwargs={"max_episode_steps": ...}), and leave max_episode_steps at None'
            )
    elif max_episode_steps is not None:
        if isinstance(env, Monitor):
            # A copy: that of the user keeps its own limit
            env, inner_env = copy(env), env.env
            env.env = TimeLimit(inner_env, max_episode_steps)
        else:
            # A Monitor further inside would not see the limit
            env = Monitor(TimeLimit(env, max_episode_steps))
    vec_env = OnPolicyAlgorithm._wrap_env(env, verbose)
    if not is_ours:
        return vec_env
    inner = vec_env.unwrapped
    assert isinstance(inner, DummyVecEnv)
    episode_env = EpisodeVecEnv.take_over(inner)
    episode_env.maker, episode_env.max_episode_steps = maker, max_episode_steps
    if vec_env is inner:
        return episode_env
    assert isinstance(vec_env, VecTransposeImage)
    vec_env.venv = episode_env
    return vec_env
