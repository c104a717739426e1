"""What a worker runs: whole episodes, as a function of the weights, the seed and their numbers alone."""

import atexit
import os
import signal
import threading
import time
import traceback
from contextlib import suppress
from copy import copy
from types import SimpleNamespace
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_reinforce.episodes.acting import Actor, EpisodeNoise, make_actor
from sb3_reinforce.episodes.schedule import EpisodeSchedule
from sb3_reinforce.episodes.source import EpisodeSource
from sb3_reinforce.episodes.vec_env import wrap_env


class Episode(NamedTuple):
    """One episode of T steps of a single environment: observations are (T, ...), or a dictionary of these."""

    observations: Any
    actions: np.ndarray
    clipped_actions: np.ndarray
    rewards: np.ndarray
    infos: list[dict[str, Any]]


def pack_config(model: Any) -> bytes:
    """Pickle what workers need of a model to run the episodes of one batch, with the policy on the CPU."""
    env, policy = model.env.unwrapped, copy(getattr(model.policy, "_orig_mod", model.policy))
    policy.__dict__.pop("optimizer", None)
    config = SimpleNamespace(policy=policy, env_seed=model.seed, noise_seed=model.run_seed, torch_settings=_torch_settings())
    config.sde_sample_freq, config.seed_episodes = model.sde_sample_freq, model.seed_episodes
    # A worker keeps its environment until this name changes
    config.env_name, config.env, config.max_episode_steps = env.name, env.maker, env.max_episode_steps
    config.observation_space, config.action_space = model.env.observation_space, model.env.action_space
    try:
        if policy.device.type != "cpu":
            config.policy = cloudpickle.loads(cloudpickle.dumps(policy)).to("cpu")
        return cloudpickle.dumps(config)
    except Exception as error:
        raise ValueError(
            f"The environment or the policy cannot be sent to workers: {error}. Give the environment as an id, or as a "
            "function that makes it"
        ) from error


def _torch_settings() -> tuple[int, str, bool]:
    """Settings of PyTorch on which rounding depends."""
    return th.get_num_threads(), th.get_float32_matmul_precision(), bool(th.backends.mkldnn.enabled)


#: Configuration and environment that this thread used last, with their names
_LATEST = threading.local()
_STOP = threading.Event()  # set when episodes must end


def run_episodes(config_name: str, content: bytes, numbers: range) -> tuple[list[Episode], Exception | None]:
    """Run consecutive episodes, with what :func:`pack_config` returned. Return them, and the error that ended them."""
    episodes: list[Episode] = []
    try:
        latest = vars(_LATEST)
        if latest.get("config_name") != config_name:
            latest.update(config=cloudpickle.loads(content), config_name=config_name)
        config = latest["config"]
        env = _make_env(config)
        act = make_actor(config.policy, EpisodeNoise(1, config.noise_seed, config.sde_sample_freq))
        if _torch_settings() != config.torch_settings:
            n_threads, precision, th.backends.mkldnn.enabled = config.torch_settings
            th.set_num_threads(n_threads)
            th.set_float32_matmul_precision(precision)
        for number in numbers:
            episodes.append(_run_episode(config, env, act, number))
    except (Exception, SystemExit) as error:
        error.add_note(f"A worker raised this before the end of episode {numbers[len(episodes)]}:\n{traceback.format_exc()}")
        return episodes, _portable(error)
    return episodes, None


def _portable(error: BaseException) -> Exception:
    """An error that can be sent: itself, or a RuntimeError if it cannot be pickled or would end a process or generator."""
    with suppress(Exception):
        copied = cloudpickle.loads(cloudpickle.dumps(error))
        if isinstance(copied, Exception) and not isinstance(copied, StopIteration):
            return copied
    return RuntimeError("\n".join([f"{type(error).__name__}: {error}", *error.__notes__]))


def _make_env(config: SimpleNamespace) -> VecEnv:
    """Make the environment, or return the one that is kept under its name."""
    latest = vars(_LATEST)
    if latest.get("env_name") != config.env_name:
        latest["env_name"] = None
        if "env" in latest:
            latest.pop("env").close()
        env = wrap_env(config.env, config.max_episode_steps)
        for own, expected in ((env.observation_space, config.observation_space), (env.action_space, config.action_space)):
            if own != expected:
                raise ValueError(f"A function for workers must always make the same environment: {own} is not {expected}")
        latest.update(env=env, env_name=config.env_name)
    return latest["env"]


def _run_episode(config: SimpleNamespace, env: VecEnv, act: Actor, number: int) -> Episode:
    is_seeded = config.seed_episodes or env.unwrapped.user is None  # type: ignore[attr-defined]
    schedule = EpisodeSchedule(1, 0, 1, number, config.env_seed if is_seeded else None)
    source = EpisodeSource(env, schedule, config)
    obs = source.begin(None, np.ones(1, dtype=bool))
    act.noise.begin([0], schedule.numbers)
    steps: list[Any] = []
    while schedule.n_active:
        if _STOP.is_set():
            raise InterruptedError("The process was asked to end")
        actions, clipped_actions = source.act(act, obs)
        new_obs, rewards, _, infos = source.step(clipped_actions)
        steps.append((obs, actions[0], clipped_actions[0], rewards[0], infos[0]))
        obs = new_obs
    all_obs, *columns, all_infos = zip(*steps, strict=True)
    is_dict = isinstance(all_obs[0], dict)
    stacked = {key: np.concatenate([obs[key] for obs in all_obs]) for key in obs} if is_dict else np.concatenate(all_obs)
    return Episode._make([stacked, *map(np.array, columns), list(all_infos)])


def start_process(main_process: int) -> None:
    """Prepare a process that runs episodes until SIGTERM, or the end of the process with the id ``main_process``."""
    # A terminal sends Ctrl-C to all processes: only the main one handles it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _STOP.set())
    atexit.register(lambda: "env" in vars(_LATEST) and _LATEST.env.close())

    def watch() -> None:
        while os.getppid() == main_process:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
