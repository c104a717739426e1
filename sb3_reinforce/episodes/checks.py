"""Validation of numbers, spaces, policy classes and model files."""

import inspect
import io
import json
import math
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import open_path

#: Stored in each model file as ``file_format``. The number increases when older files cannot be loaded.
FILE_FORMAT = "sb3_reinforce.REINFORCE 4"

_ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
_RESHAPE = "wrap the environment, e.g. with TransformObservation or TransformAction of gymnasium.wrappers"


def is_integer(value: Any, minimum: int = 1, end: float = math.inf) -> bool:
    """Whether a value is an integer in [minimum, end)."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(minimum <= value < end)


def is_real(value: Any, minimum: float = -math.inf) -> bool:
    """Whether a value is a finite number of at least minimum."""
    return isinstance(value, (int, float, np.number)) and math.isfinite(value) and bool(value >= minimum)


def check_integer(name: str, value: Any, minimum: int = 1, end: float = math.inf) -> None:
    """Raise a ValueError if a value is not an integer in [minimum, end)."""
    if not is_integer(value, minimum, end):
        expected = f"of at least {minimum}" if end == math.inf else f"in [{minimum}, {end})"
        raise ValueError(f"{name} must be an integer {expected}, got {name}={value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError if a value is neither None nor an integer of at least 1."""
    if value is not None and not is_integer(value):
        raise ValueError(f"{name} must be an integer of at least 1, or None, got {name}={value!r}")


def check_scheduled(name: str, value: float, progress_remaining: float) -> None:
    """Raise a ValueError if a schedule returns a value that is not finite or below 0."""
    # Adam fails on learning rates that overflow float32
    if not is_real(value, minimum=0) or (name == "learning_rate" and value > float(np.finfo(np.float32).max)):
        raise ValueError(f"{name} must be finite and at least 0, but its schedule returns {value} at {progress_remaining=}")


def check_policy_class(policy_class: type[BasePolicy]) -> None:
    """Raise a ValueError unless a class is an actor-critic policy without recurrent states."""
    is_actor_critic = isinstance(policy_class, type) and issubclass(policy_class, ActorCriticPolicy)
    if not is_actor_critic or "lstm_states" in inspect.signature(policy_class.forward).parameters:
        raise ValueError(f"policy must be a subclass of SB3's ActorCriticPolicy that is not recurrent, got {policy_class}")


def check_spaces(model: Any, policy: str | type[BasePolicy]) -> None:
    """Raise a ValueError that names the first space of a model that its policy does not support, and a remedy."""
    space: Any = model.observation_space
    action_space: Any = model.action_space
    is_dict = isinstance(space, spaces.Dict)
    if not isinstance(action_space, _ACTION_SPACES):
        names = ", ".join(space.__name__ for space in _ACTION_SPACES)
        raise ValueError(f"REINFORCE supports the action spaces {names}, but the environment has {action_space}")
    if policy in ("MlpPolicy", "CnnPolicy") and is_dict:
        raise ValueError(f"You must use `MultiInputPolicy` with a dictionary observation space, not {policy}")
    if policy == "MultiInputPolicy" and not is_dict:
        raise ValueError(f"MultiInputPolicy needs a dictionary observation space, got {space}")
    entries = [("observation", entry) for entry in (space.spaces.values() if is_dict else [space])]
    for kind, entry in [*entries, ("action", action_space)]:
        # SB3 supports Discrete spaces that start at 0, and one-dimensional MultiDiscrete spaces
        if np.any(getattr(entry, "start", 0) != 0):
            raise ValueError(f"The {kind} space {entry} does not start at 0: {_RESHAPE}")
        is_flat = spaces.MultiDiscrete if kind == "observation" else (spaces.MultiDiscrete, spaces.MultiBinary)
        if isinstance(entry, is_flat) and len(entry.shape) != 1:
            raise ValueError(f"The {kind} space {entry} is not one-dimensional: {_RESHAPE}")
        if kind == "observation" and isinstance(entry, spaces.Box) and entry.shape == ():
            raise ValueError(f"The observation space {entry} has no dimension: make it Box(low, high, (1,))")
    if model.use_sde and not isinstance(action_space, spaces.Box):
        raise ValueError(f"use_sde=True (gSDE) needs continuous actions, but the environment has {action_space}")
    low, high = getattr(action_space, "low", np.zeros(1)), getattr(action_space, "high", np.zeros(1))
    if np.isnan(low).any() or np.isnan(high).any():
        raise ValueError(f"The action space has NaN bounds: low={low}, high={high}")
    with np.errstate(over="ignore"):
        if model.policy_kwargs.get("squash_output") and not np.isfinite(high - low).all():
            raise ValueError(f"squash_output=True needs finite action bounds, got low={low}, high={high}")


def read_model_file(
    path: str | pathlib.Path | io.BufferedIOBase, changes: dict[str, Any] | None = None, fixed: tuple[str, ...] = ()
) -> tuple[io.BytesIO, dict[str, Any]]:
    """
    Read a model file, as for SB3's ``load``.

    :param changes: arguments that replace saved ones
    :param fixed: names of arguments that cannot be replaced
    :return: the file in memory, and the saved attributes that are not pickled
    :raises ValueError: if the file is incomplete, holds a model of another algorithm, or a fixed argument differs
    """
    file = open_path(path, "r", suffix="zip")
    file.seek(0)
    content = io.BytesIO(file.read())
    if isinstance(path, (str, pathlib.Path)):
        file.close()
    try:
        with zipfile.ZipFile(content) as archive:
            if sum(info.file_size for info in archive.infolist()) > content.getbuffer().nbytes:
                raise zipfile.BadZipFile("it unpacks to more than its size, and SB3 does not compress")
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} in it is damaged")
            saved = json.loads(archive.read("data"))
            if not isinstance(saved, dict):
                raise ValueError("its data are no attributes")
            archive.getinfo("policy.pth"), archive.getinfo("policy.optimizer.pth")
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete model file: damaged, truncated, or of another kind ({error})") from error
    if saved.get("file_format") != FILE_FORMAT:
        policy_class = saved.get("policy_class")
        module = policy_class.get("__module__", "unknown") if isinstance(policy_class, dict) else "unknown"
        raise ValueError(
            f"{path} holds a model of another algorithm, or of another version of REINFORCE: its format is "
            f"{saved.get('file_format')!r} instead of {FILE_FORMAT!r}, its policy from {module}. Load it with the class that "
            "saved it"
        )
    for name in fixed:
        if changes and name in changes and changes[name] != saved.get(name):
            raise ValueError(
                f"{name}={changes[name]!r} cannot be given to a model that was saved with {name}={saved.get(name)!r}, because "
                "its policy was fitted with that. Make a new model"
            )
    content.seek(0)
    return content, saved
