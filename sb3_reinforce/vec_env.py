"""A ``DummyVecEnv`` that is cheap to step and can leave some of its members alone."""

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

#: Types that a deep copy would return as they are
_ATOMIC = frozenset({bool, int, float, str, type(None), np.bool_, np.float32, np.float64, np.int32, np.int64})


class EpisodeVecEnv(DummyVecEnv):
    """
    SB3's ``DummyVecEnv`` in about half its time, with the same results. Pass it to ``make_vec_env(..., vec_env_cls=...)``.

    ``DummyVecEnv`` makes deep copies of observations and infos at every step; here, arrays are copied as arrays, and only
    what is not a plain number or string is copied deeply. On top of that, REINFORCE tells it which members have still an
    episode to finish, and the others are not stepped.

    :param env_fns: functions that make one environment each
    """

    def __init__(self, env_fns: list[Callable[[], gym.Env]]):
        super().__init__(env_fns)
        #: (n_envs,) members that ``step`` steps, None for all; the others return their last observation, a reward of 0, and
        #: empty infos
        self.active: np.ndarray | None = None
        #: The buffer of observations that are a single array, which needs no look at keys
        self._array: np.ndarray | None = self.buf_obs[None] if self.keys == [None] else None  # type: ignore[index]

    def step_wait(self) -> VecEnvStepReturn:
        """
        :return: observations, rewards, dones and infos of all members, independent of what the environments do next
        """
        infos: list[dict[str, Any]] = []
        # The name env_idx is DummyVecEnv's: an error that an environment raises is traced to it by that
        for env_idx, env in enumerate(self.envs):
            if self.active is not None and not self.active[env_idx]:
                self.buf_rews[env_idx], self.buf_dones[env_idx] = 0.0, False
                infos.append({})
                continue
            obs, self.buf_rews[env_idx], terminated, truncated, info = env.step(self.actions[env_idx])
            done = bool(terminated or truncated)
            self.buf_dones[env_idx] = done
            info["TimeLimit.truncated"] = truncated and not terminated
            if done:
                info["terminal_observation"] = obs
                obs, self.reset_infos[env_idx] = env.reset()
            if self._array is not None:
                self._array[env_idx] = obs
            else:
                self._save_obs(env_idx, obs)
            infos.append({key: value if type(value) in _ATOMIC else deepcopy(value) for key, value in info.items()})
        return self._obs_from_buf(), self.buf_rews.copy(), self.buf_dones.copy(), infos

    def _obs_from_buf(self) -> VecEnvObs:
        if self._array is not None:
            return self._array.copy()
        return dict_to_obs(self.observation_space, OrderedDict((key, self.buf_obs[key].copy()) for key in self.keys))
