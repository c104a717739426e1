"""Picklable function that makes a monitored environment, for example in workers."""

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import Monitor


@dataclass
class EnvFactory:
    """
    Make an environment like SB3's ``make_vec_env``: ``REINFORCE("MlpPolicy", EnvFactory(...), workers=4)``.

    :param env_id: Id of the environment
    :param env_kwargs: Keyword arguments of the environment
    :param wrapper_class: Wrapper around the environment, with ``wrapper_kwargs``
    :param monitor_dir: Folder of the monitor files, one per environment (read them with SB3's ``load_results``). With workers,
        they include discarded episodes
    :param monitor_kwargs: Keyword arguments of ``Monitor``
    """

    env_id: str | EnvSpec
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    wrapper_class: Callable[..., gym.Env] | None = None
    wrapper_kwargs: dict[str, Any] = field(default_factory=dict)
    monitor_dir: str | None = None
    monitor_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Other processes may not know the id
        if isinstance(self.env_id, str) and self.env_id in gym.registry:
            self.env_id = gym.spec(self.env_id)

    def __call__(self) -> gym.Env:
        # Process ids are not unique across machines
        filename = None if self.monitor_dir is None else os.path.join(self.monitor_dir, uuid.uuid4().hex)
        monitor_kwargs = {**self.monitor_kwargs, "override_existing": True}
        env: gym.Env = Monitor(gym.make(self.env_id, **self.env_kwargs), filename, **monitor_kwargs)
        return env if self.wrapper_class is None else self.wrapper_class(env, **self.wrapper_kwargs)
