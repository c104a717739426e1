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
FILE_FORMAT = "sb3_reinforce.REINFORCE 5"
_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def is_integer(value: Any, minimum: int = 1, end: float = math.inf) -> bool:
    """Whether a value is an integer in [minimum, end)."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(minimum <= value < end)


def is_real(value: Any, minimum: float = -math.inf) -> bool:
    """Whether a value is a finite number of at least minimum."""
    return isinstance(value, (int, float, np.number)) and math.isfinite(value) and bool(value >= minimum)


def shorten(value: Any) -> str:
    """Text of a value for a message: that of large spaces and arrays fills pages."""
    text = str(value)
    return text if len(text) <= 250 else f"{text[:200]} ... {text[-40:]}"


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError if a value is neither None nor an integer of at least 1."""
    if value is not None and not is_integer(value):
        raise ValueError(f"{name} must be an integer of at least 1, or None, got {name}={value!r}")


def check_scheduled(name: str, value: float, progress_remaining: float) -> None:
    """Raise a ValueError if a schedule returns a value that is not finite or below 0."""
    if not is_real(value, minimum=0) or (name == "learning_rate" and value > float(np.finfo(np.float32).max)):
        raise ValueError(f"{name} must be finite and at least 0, but its schedule returns {value} at {progress_remaining=}")


def check_policy_class(policy_class: type[BasePolicy]) -> None:
    """Raise a ValueError unless a class is an actor-critic policy without recurrent states."""
    is_actor_critic = isinstance(policy_class, type) and issubclass(policy_class, ActorCriticPolicy)
    if not is_actor_critic or "lstm_states" in inspect.signature(policy_class.forward).parameters:
        raise ValueError(f"policy must be a subclass of SB3's ActorCriticPolicy that is not recurrent, got {policy_class}")


def check_space(kind: str, space: spaces.Space) -> None:
    """Raise a ValueError that names the first entry of an observation or action space that is not supported, and a remedy."""
    is_dict, is_observation = isinstance(space, spaces.Dict) and kind == "observation", kind == "observation"
    entries: Any = space.spaces.items() if is_dict else [("", space)]  # type: ignore[attr-defined]
    for key, entry in entries or [("", space)]:
        shape: tuple[int, ...] = entry.shape or ()
        if not isinstance(entry, _SPACES):
            what = f"is none of {', '.join(cls.__name__ for cls in _SPACES)}" + ", or a Dict of these" * is_observation
        elif np.any(getattr(entry, "start", 0) != 0):
            what = "does not start at 0"
        elif isinstance(entry, (spaces.MultiDiscrete, *[spaces.MultiBinary] * (not is_observation))) and len(shape) != 1:
            what = "is not one-dimensional"
        elif 0 in shape or (is_observation and isinstance(entry, spaces.Box) and shape == ()):
            what = "has no number or no dimension"
        else:
            continue
        remedy = ("FlattenObservation or " if is_observation else "") + f"Transform{kind.capitalize()}"
        remedy = "leave it out with FilterObservation, or use TransformObservation" if key else f"use {remedy}"
        name = f"entry {key!r} of the " if key else ""
        raise ValueError(f"The {name}{kind} space {shorten(entry)} {what}: {remedy} of gymnasium.wrappers")


def check_spaces(model: Any, policy: str | type[BasePolicy]) -> None:
    """Raise a ValueError that names the first space of a model that its policy does not support, and a remedy."""
    space, action_space = model.observation_space, model.action_space
    is_dict = isinstance(space, spaces.Dict)
    if policy in ("MlpPolicy", "CnnPolicy") and is_dict:
        raise ValueError(f"You must use `MultiInputPolicy` with a dictionary observation space, not {policy}")
    if policy == "MultiInputPolicy" and not is_dict:
        raise ValueError(f"MultiInputPolicy needs a dictionary observation space, got {shorten(space)}")
    if model.use_sde and not isinstance(action_space, spaces.Box):
        raise ValueError(f"use_sde=True (gSDE) needs continuous actions, but the environment has {shorten(action_space)}")
    low, high = getattr(action_space, "low", np.zeros(1)), getattr(action_space, "high", np.zeros(1))
    if np.isnan(low).any() or np.isnan(high).any():
        raise ValueError(f"The action space has NaN bounds: low={shorten(low)}, high={shorten(high)}")
    with np.errstate(over="ignore"):
        if model.policy_kwargs.get("squash_output") and not np.isfinite(high - low).all():
            raise ValueError(f"squash_output=True needs finite action bounds, got low={shorten(low)}, high={shorten(high)}")


def read_model_file(
    path: str | pathlib.Path | io.BufferedIOBase, changes: dict[str, Any] | None = None, fixed: tuple[str, ...] = ()
) -> tuple[io.BytesIO, dict[str, Any]]:
    """
    Read a model file into memory, with the saved attributes that are not pickled.

    :raises ValueError: if the file is incomplete, holds another algorithm, or ``changes`` one of the ``fixed`` arguments
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
            f"{path} holds a model of another algorithm or version: its format is {saved.get('file_format')!r} instead of "
            f"{FILE_FORMAT!r}, its policy from {module}. Load it with the class that saved it"
        )
    for name in fixed:
        if changes and name in changes and changes[name] != saved.get(name):
            given, own = f"{name}={changes[name]!r}", f"{name}={saved.get(name)!r}"
            raise ValueError(f"{given} cannot be given to a model whose policy was fitted with {own}: make a new model")
    content.seek(0)
    return content, saved
