"""``VecEnv`` of EnvPool's C++ environments (Weng et al., 2022, https://arxiv.org/abs/2206.10558), for any SB3 algorithm."""

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_reinforce.episodes.checks import is_integer
from sb3_reinforce.episodes.schedule import EpisodeSchedule, episode_seed
from sb3_reinforce.episodes.vec_env import EpisodeRunner

#: Options of ``envpool.make`` set by ``EnvPoolVecEnv``, which needs a synchronous pool of Gymnasium environments
_RESERVED = ("num_envs", "env_seed", "env_type", "batch_size", "max_num_players", "gym_reset_return_info")


class EnvPoolVecEnv(EpisodeRunner):
    """
    Vectorized EnvPool environment: all sub-environments are stepped together in C++.

    The ``infos`` contain terminal observations, timeouts and episode statistics, as with SB3's ``VecEnv`` and ``Monitor``.
    With ``REINFORCE``, idle sub-environments are not stepped.

    .. warning::
        EnvPool cannot seed individual episodes. An uninterrupted run is reproducible with ``seed``, but single episodes are
        not, and a resumed run continues with other episodes.

    .. warning::
        EnvPool's environments can differ from Gymnasium's. An episode that terminates in the last step of its time limit is
        only reported as truncated. ``Pendulum-v1`` updates the angle before it clips the velocity to 8, not after.

    :param task_id: id of the environment, one of ``envpool.list_all_envs()``, with one player and array observations
    :param n_envs: number of sub-environments
    :param seed: seed of the pool, in [0, 2**31). Each sub-environment has its own seed, derived from it
    :param num_threads: number of threads that step the sub-environments, 0 to let EnvPool choose
    :param kwargs: additional options of ``envpool.make``, for example ``max_episode_steps``
    :raises ImportError: if EnvPool is not installed
    :raises ValueError: if an argument is out of range, or the environment is not supported
    """

    seeds_episodes = False

    def __init__(self, task_id: str, n_envs: int, seed: int = 0, num_threads: int = 1, **kwargs: Any):
        # EnvPool can abort the process if an argument is out of range
        for name, value, minimum in (("n_envs", n_envs, 1), ("seed", seed, 0), ("num_threads", num_threads, 0)):
            if not is_integer(value, minimum, 2**31):
                raise ValueError(f"{name} must be an integer in [{minimum}, 2**31), got {name}={value!r}")
        for name in _RESERVED:
            if name in kwargs:
                raise ValueError(f"{name} is not an option of EnvPoolVecEnv, which sets {', '.join(_RESERVED)} itself")
        try:
            import envpool
        except ImportError as error:
            raise ImportError(f"{error}. EnvPool needs: pip install 'sb3-reinforce[envpool]'") from error
        self.task_id = task_id
        self.render_mode = None
        # From a single seed, EnvPool derives consecutive seeds: pools with seeds 0, 1, ... would share most of them
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
        """Reset some sub-environments."""
        if len(env_ids):
            obs, info = self.pool.reset(env_ids.astype(np.int32))
            self._obs[info["env_id"]] = obs
            self._returns[env_ids], self._lengths[env_ids] = 0.0, 0
            for env_idx in env_ids.tolist():
                self._at_start[env_idx] = None
                self._at_end.discard(env_idx)

    def reset(self) -> VecEnvObs:
        self.user = None
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
            self.user = None
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
        """Return an attribute of the pool, for example its ``spec``."""
        value = self.render_mode if attr_name == "render_mode" else getattr(self.pool, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise NotImplementedError("EnvPool does not support setting attributes of sub-environments")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("EnvPool does not support calling methods of sub-environments")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        # The infos have the statistics of Monitor
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Do nothing: the pool is seeded in the constructor."""
        return [None] * self.num_envs


def _spaces(task_id: str, pool: Any) -> tuple[spaces.Space, spaces.Space]:
    """
    Return the observation and action space of the pool, or of Gymnasium's environment with the same id.

    :raises ValueError: if a space or the number of players is not supported
    """
    own = pool.observation_space, pool.action_space
    for kind, space in zip(("observation", "action"), own, strict=True):
        # Only a single array has a shape
        if not isinstance(space, spaces.Space) or space.shape is None:
            raise ValueError(
                f"EnvPoolVecEnv supports {kind}s that are a single array, but {task_id} has the {kind} space {space}"
            )
    if pool.config["max_num_players"] != 1:
        raise ValueError(f"EnvPoolVecEnv supports one player, but {task_id} has {pool.config['max_num_players']}")
    if task_id not in gym.registry:
        return own
    # Some of EnvPool's bounds are wrong (1e-38 as the lower bound of the lander)
    try:
        env = gym.make(task_id)
    except gym.error.DependencyNotInstalled:
        return own
    theirs = env.observation_space, env.action_space
    env.close()
    # Options can change the shape
    return own if any(one.shape != other.shape for one, other in zip(own, theirs, strict=True)) else theirs
