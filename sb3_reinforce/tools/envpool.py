"""
EnvPool's C++ simulators as a ``VecEnv`` (Weng et al., 2022, https://arxiv.org/abs/2206.10558), for any algorithm of SB3.
"""

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_reinforce.episodes.checks import check_integer
from sb3_reinforce.episodes.schedule import EpisodeSchedule, episode_seed
from sb3_reinforce.episodes.vec_env import EpisodeRunner

#: Options of ``envpool.make`` that are set here: with others, a pool is asynchronous or not one of Gymnasium's environments.
_RESERVED = ("num_envs", "env_seed", "env_type", "batch_size", "max_num_players", "gym_reset_return_info")


class EnvPoolVecEnv(EpisodeRunner):
    """
    Environments of EnvPool, stepped together in C++.

    Terminal observations, time-outs and the statistics of episodes (those of ``Monitor``) are where SB3 has them. With
    ``REINFORCE``, environments without an episode to finish are left alone.

    .. warning::
        EnvPool cannot seed an episode. Training follows from ``seed`` if it is not interrupted, but no episode can be repeated
        by its number, and a run that is resumed from a file goes on with other episodes.

    .. warning::
        EnvPool's environments are not always Gymnasium's. An episode that terminates with the last step of its time limit
        counts as timed out only. The pendulum of ``Pendulum-v1`` turns by its velocity before that is limited to 8, not after.

    :param task_id: environment, one of ``envpool.list_all_envs()`` with one player and observations that are no dictionary
    :param n_envs: number of environments, at least 1
    :param seed: of the pool, in [0, 2**31). Each environment has a seed of its own that is derived from it
    :param num_threads: threads that step the environments, 0 to let EnvPool choose
    :param kwargs: other options for ``envpool.make``, ``max_episode_steps`` for instance
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if an argument is out of its range, or the environment is not supported
    """

    seeds_episodes = False

    def __init__(self, task_id: str, n_envs: int, seed: int = 0, num_threads: int = 1, **kwargs: Any):
        # What is out of range may end the process
        check_integer("n_envs", n_envs, 1)
        check_integer("seed", seed, 0, 2**31)
        check_integer("num_threads", num_threads, 0)
        for name in _RESERVED:
            if name in kwargs:
                raise ValueError(f"{name} is not an option of EnvPoolVecEnv: it sets {', '.join(_RESERVED)} itself")
        try:
            import envpool
        except ImportError as error:
            raise ImportError(f"{error}. EnvPool needs: pip install 'sb3-reinforce[envpool]'") from error
        self.task_id = task_id
        self.render_mode = None
        # EnvPool would add the index of the environment to a single seed: pools of seeds 0, 1, ... would share most of theirs
        seeds = [episode_seed(int(seed), env_idx) for env_idx in range(n_envs)]
        self.pool = envpool.make(
            task_id, env_type="gymnasium", num_envs=int(n_envs), seed=seeds, num_threads=int(num_threads), **kwargs
        )
        observation_space, action_space = _spaces(task_id, self.pool)
        super().__init__(n_envs, observation_space, action_space)
        self._init_episodes()
        self._obs: np.ndarray = np.zeros((n_envs, *observation_space.shape), observation_space.dtype)  # type: ignore[misc]
        self._returns, self._lengths = np.zeros(n_envs), np.zeros(n_envs, dtype=int)
        self._started = time.time()

    def _begin(self, env_ids: np.ndarray) -> None:
        """Reset some environments."""
        if len(env_ids):
            obs, info = self.pool.reset(env_ids.astype(np.int32))
            self._obs[info["env_id"]] = obs
            self._returns[env_ids], self._lengths[env_ids] = 0.0, 0
            for env_idx in env_ids.tolist():
                self._at_start[env_idx] = None
                self._at_end.discard(env_idx)

    def reset(self) -> VecEnvObs:
        self.owner = None
        self._begin(np.arange(self.num_envs))
        self._reset_seeds()
        self._reset_options()
        return self._obs.copy()

    def begin_episodes(self, schedule: EpisodeSchedule) -> VecEnvObs:
        begin = [env_idx for env_idx in schedule.active.nonzero()[0].tolist() if env_idx not in self._at_start]
        self._begin(np.array(begin, dtype=int))
        return self._obs.copy()

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        schedule, n_envs = self.schedule, self.num_envs
        env_ids = np.arange(n_envs)
        if schedule is None:
            self.owner = None
            self._begin(np.array(sorted(self._at_end), dtype=int))
        elif not self.steps_idle_envs:
            env_ids = schedule.active.nonzero()[0]
        self._at_start.clear()
        obs, some_rewards, terminated, truncated, info = self.pool.step(self.actions[env_ids], env_ids.astype(np.int32))
        env_ids = info["env_id"]
        self._obs[env_ids] = obs
        rewards, dones = np.zeros(n_envs, dtype=np.float32), np.zeros(n_envs, dtype=bool)
        rewards[env_ids], dones[env_ids] = some_rewards, terminated | truncated
        self._returns[env_ids] += some_rewards
        self._lengths[env_ids] += 1
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(n_envs)]
        if dones.any():
            timed_out = np.zeros(n_envs, dtype=bool)
            timed_out[env_ids] = truncated & ~terminated
            begin = []
            for env_idx in dones.nonzero()[0].tolist():
                seconds = time.time() - self._started
                infos[env_idx] = {
                    "TimeLimit.truncated": bool(timed_out[env_idx]),
                    "terminal_observation": self._obs[env_idx].copy(),
                    "episode": dict(
                        r=round(float(self._returns[env_idx]), 6), l=int(self._lengths[env_idx]), t=round(seconds, 6)
                    ),
                }
                if schedule is None or schedule.end_episode(env_idx) or self.steps_idle_envs:
                    begin.append(env_idx)
                else:
                    self._at_end.add(env_idx)
            self._begin(np.array(begin, dtype=int))
        return self._obs.copy(), rewards, dones, infos

    def close(self) -> None:
        self.pool.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Of the pool, which all environments share: its ``spec``, for instance."""
        value = self.render_mode if attr_name == "render_mode" else getattr(self.pool, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise NotImplementedError("EnvPool has no environments whose attributes could be set")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("EnvPool has no environments whose methods could be called")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        # With the statistics of Monitor
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Does nothing: a pool is seeded when it is made."""
        return [None] * self.num_envs


def _spaces(task_id: str, pool: Any) -> tuple[spaces.Space, spaces.Space]:
    """
    Observation and action space of a pool, or those of Gymnasium's environment of the same name.

    :raises ValueError: if they are not supported
    """
    own = pool.observation_space, pool.action_space
    for kind, space in zip(("observation", "action"), own, strict=True):
        # Others have no shape
        if not isinstance(space, spaces.Space) or space.shape is None:
            raise ValueError(
                f"EnvPoolVecEnv supports {kind}s that are a single array, but {task_id} has the {kind} space {space}"
            )
    if pool.config["max_num_players"] != 1:
        raise ValueError(f"EnvPoolVecEnv supports one player, but {task_id} has {pool.config['max_num_players']}")
    if task_id not in gym.registry:
        return own
    # EnvPool's bounds are not always right: 1e-38 is the lower one of the lander
    try:
        env = gym.make(task_id)
    except gym.error.DependencyNotInstalled:
        return own
    theirs = env.observation_space, env.action_space
    env.close()
    # Options may change the shape
    return own if any(one.shape != other.shape for one, other in zip(own, theirs, strict=True)) else theirs
