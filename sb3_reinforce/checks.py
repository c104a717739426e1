"""What REINFORCE refuses: arguments out of their range, spaces it cannot act in, files that are none of its models."""

import inspect
import io
import json
import math
import pathlib
import zipfile
import zlib
from typing import Any, get_args

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import open_path

from sb3_reinforce.baselines import FEATURE_MAPS
from sb3_reinforce.buffers import EpisodeRolloutBuffer
from sb3_reinforce.policies import MlpPolicy
from sb3_reinforce.returns import AdvantageName

#: What a model file says of itself, under the name ``file_format``. The number grows when older files cannot be loaded.
FILE_FORMAT = "sb3_reinforce.REINFORCE 2"

_RESHAPE = "wrap the environment, with TransformObservation or TransformAction of gymnasium.wrappers for instance"
_ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def _is_integer(value: Any, minimum: int, end: float = math.inf) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(minimum <= value < end)


def _is_count(value: Any) -> bool:
    return _is_integer(value, 1)


def _is_real(value: Any, minimum: float = -math.inf) -> bool:
    return isinstance(value, (int, float, np.number)) and math.isfinite(value) and bool(value >= minimum)


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError if a value is neither None nor an integer of at least 1."""
    if value is not None and not _is_count(value):
        raise ValueError(f"{name} must be an integer of at least 1, or None, got {name}={value!r}")


def check_integer(name: str, value: Any, minimum: int, end: float = math.inf) -> None:
    """Raise a ValueError if a value is no integer in [minimum, end)."""
    if not _is_integer(value, minimum, end):
        expected = f"of at least {minimum}" if end == math.inf else f"in [{minimum}, {end})"
        raise ValueError(f"{name} must be an integer {expected}, got {name}={value!r}")


def check_hyperparameters(model: Any) -> None:
    """
    :param model: the algorithm: its hyperparameters as attributes, its policy not yet made
    :raises ValueError: naming the first argument that is out of its range, and its value
    """

    def check(name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ValueError(f"{name.lstrip('_')} must be {expected}, got {name.lstrip('_')}={getattr(model, name)!r}")

    if (model.n_steps is None) == (model.n_episodes is None):
        raise ValueError(
            "Exactly one of n_steps and n_episodes says how much to collect for an update, the other is None; "
            f"got n_steps={model.n_steps}, n_episodes={model.n_episodes}"
        )
    for name in ("n_steps", "n_episodes", "max_episode_steps"):
        check_count(name, getattr(model, name))
    check("_stats_window_size", _is_count(model._stats_window_size), "an integer of at least 1")
    check("gamma", _is_real(model.gamma) and 0 < model.gamma <= 1, "in (0, 1]")
    check("ent_coef", _is_real(model.ent_coef, minimum=0), "finite and at least 0")
    timeout = model.episode_timeout
    is_time = timeout is None or (_is_real(timeout) and not isinstance(timeout, bool) and timeout > 0)
    check("episode_timeout", is_time, "a finite number above 0, or None")
    rate, target_kl = model.learning_rate, model.target_kl
    check("learning_rate", callable(rate) or _is_real(rate, minimum=0), "a schedule, or finite and at least 0")
    is_step = target_kl is None or callable(target_kl) or (_is_real(target_kl) and target_kl > 0)
    check("target_kl", is_step, "a schedule, or finite and above 0, or None for the optimizer's step")
    check("cg_max_steps", _is_count(model.cg_max_steps), "an integer of at least 1")
    check("cg_damping", _is_real(model.cg_damping) and model.cg_damping > 0, "finite and above 0")
    check("baseline", model.baseline is None or model.baseline in FEATURE_MAPS, f"None or one of {sorted(FEATURE_MAPS)}")
    check("advantage", model.advantage in get_args(AdvantageName), f"one of {sorted(get_args(AdvantageName))}")
    if model.baseline is None:
        check("advantage", model.advantage == "monte_carlo", "'monte_carlo' with baseline=None: all others need a critic")
    check("baseline_memory", _is_real(model.baseline_memory, 0) and model.baseline_memory < 1, "in [0, 1)")
    allowed = {None: set(), "random_features": {"ridge", "n_units"}}.get(model.baseline, {"ridge"})
    check("baseline_kwargs", model.baseline_kwargs.keys() <= allowed, f"a dictionary of {sorted(allowed)} with this baseline")
    is_valid = _is_real(model.baseline_kwargs.get("ridge", 0), 0) and _is_count(model.baseline_kwargs.get("n_units", 1))
    check("baseline_kwargs", is_valid, "a ridge that is finite and at least 0, and n_units that are an integer of at least 1")
    buffer = model.rollout_buffer_class
    is_buffer = buffer is None or (isinstance(buffer, type) and issubclass(buffer, EpisodeRolloutBuffer))
    check("rollout_buffer_class", is_buffer, "a subclass of sb3_reinforce.buffers.EpisodeRolloutBuffer")
    if not issubclass(model.policy_class, MlpPolicy):
        policy = f"{model.policy_class.__name__}: a policy of sb3_reinforce (or a subclass) is needed for anything else"
        check("baseline", model.baseline != "quadratic", f"'linear', 'random_features' or None with {policy}")
        check("baseline_kwargs", "n_units" not in model.baseline_kwargs, f"without n_units with {policy}")
        check("normalize_observations", not model.normalize_observations, f"False with {policy}")


def check_policy_class(policy_class: type[BasePolicy]) -> None:
    """Raise a ValueError if a class is that of no actor-critic policy, or of a recurrent one."""
    is_actor_critic = isinstance(policy_class, type) and issubclass(policy_class, ActorCriticPolicy)
    if not is_actor_critic or "lstm_states" in inspect.signature(policy_class.forward).parameters:
        raise ValueError(f"policy must be a subclass of SB3's ActorCriticPolicy that is not recurrent, got {policy_class}")


def check_scheduled(name: str, value: float, progress_remaining: float) -> None:
    """Raise a ValueError if what the schedule of an argument gives at some progress (from 1 to 0) is not allowed."""
    # Adam refuses rates that float32 cannot hold in other words
    if not _is_real(value, minimum=0) or (name == "learning_rate" and value > float(np.finfo(np.float32).max)):
        raise ValueError(
            f"{name} must be finite and at least 0, but its schedule gives {value} at progress_remaining={progress_remaining}"
        )


def check_spaces(model: Any, policy: str | type[BasePolicy]) -> None:
    """Raise a ValueError that names the space of the model which it does not support, or not with the policy given."""
    action_space = model.action_space
    if not isinstance(action_space, _ACTION_SPACES):
        raise ValueError(
            f"REINFORCE supports the action spaces {', '.join(space.__name__ for space in _ACTION_SPACES)}, "
            f"but the environment has {action_space}"
        )
    is_dict = isinstance(model.observation_space, spaces.Dict)
    if policy in ("MlpPolicy", "CnnPolicy") and is_dict:
        raise ValueError(f"You must use `MultiInputPolicy` with a dictionary observation space, not {policy}")
    if policy == "MultiInputPolicy" and not is_dict:
        raise ValueError(f"MultiInputPolicy needs a dictionary observation space, but there is {model.observation_space}")
    for space in model.observation_space.spaces.values() if is_dict else [model.observation_space]:
        _check_space(space, "observation")
        if isinstance(space, spaces.Box) and space.shape == ():
            raise ValueError(f"The observation space {space} has no dimension: make it Box(low, high, (1,))")
    _check_space(action_space, "action")
    if isinstance(action_space, spaces.MultiBinary) and len(action_space.shape) != 1:
        raise ValueError(f"The action space {action_space} is not one-dimensional: {_RESHAPE}")
    if isinstance(action_space, spaces.Box):
        bounds = f"low={action_space.low}, high={action_space.high}"
        if np.isnan(action_space.low).any() or np.isnan(action_space.high).any():
            raise ValueError(f"The action space has NaN bounds: {bounds}")
        with np.errstate(over="ignore"):
            has_extent = np.isfinite(action_space.high - action_space.low).all()
        if model.policy_kwargs.get("squash_output") and not has_extent:
            raise ValueError(f"squash_output=True needs finite action bounds, got {bounds}")
    elif model.use_sde:
        raise ValueError(f"use_sde=True (gSDE) needs continuous actions, but the environment has {action_space}")


def _check_space(space: spaces.Space, kind: str) -> None:
    """SB3 takes Discrete numbers to count from 0, and MultiDiscrete to be vectors."""
    if np.any(getattr(space, "start", 0) != 0):
        raise ValueError(f"The {kind} space {space} does not start at 0: {_RESHAPE}")
    if isinstance(space, spaces.MultiDiscrete) and len(space.shape) != 1:
        raise ValueError(f"The {kind} space {space} is not one-dimensional: {_RESHAPE}")


def read_model_file(
    path: str | pathlib.Path | io.BufferedIOBase, changes: dict[str, Any]
) -> tuple[io.BytesIO, dict[str, Any]]:
    """
    Read a file, and look at what it says of itself before anything in it is unpickled.

    :param path: where a model was saved, as for SB3's ``load``
    :param changes: arguments that are to replace those that were saved
    :return: the file in memory, and the saved attributes, without those that are pickled
    :raises ValueError: if that is no complete file, a model of another algorithm, or one that cannot be changed so
    """
    file = open_path(path, "r", suffix="zip")
    file.seek(0)
    content = io.BytesIO(file.read())
    if isinstance(path, (str, pathlib.Path)):
        file.close()
    try:
        with zipfile.ZipFile(content) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile(f"{archive.testzip()} in it is damaged")
            saved = json.loads(archive.read("data"))
            if not isinstance(saved, dict):
                raise ValueError("its data are no attributes")
            archive.getinfo("policy.pth"), archive.getinfo("policy.optimizer.pth")
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no complete model file: it is damaged, cut short, or was never one ({error})") from error
    if saved.get("file_format") != FILE_FORMAT:
        policy_class = saved.get("policy_class")
        policy_class = policy_class.get("__module__", "unknown") if isinstance(policy_class, dict) else "unknown"
        raise ValueError(
            f"{path} holds a model of another algorithm, or of a version of REINFORCE that cannot be loaded any more: its "
            f"format is {saved.get('file_format')!r}, not {FILE_FORMAT!r}, its policy from {policy_class}. Load it with the "
            "class that saved it"
        )
    for name in ("advantage", "baseline", "baseline_memory", "baseline_kwargs", "normalize_observations"):
        if name in changes and changes[name] != saved.get(name):
            raise ValueError(
                f"{name}={changes[name]!r} cannot be given to a model that was saved with {name}={saved.get(name)!r}: "
                "its policy holds what was fitted with that. Make a new model"
            )
    content.seek(0)
    return content, saved
