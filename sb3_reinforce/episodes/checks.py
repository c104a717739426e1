"""What no algorithm of whole episodes can work with: numbers out of their range, policies and spaces it cannot act in."""

import inspect
import math
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

_RESHAPE = "wrap the environment, with TransformObservation or TransformAction of gymnasium.wrappers for instance"
_ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def is_integer(value: Any, minimum: int, end: float = math.inf) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(minimum <= value < end)


def is_count(value: Any) -> bool:
    return is_integer(value, 1)


def is_real(value: Any, minimum: float = -math.inf) -> bool:
    return isinstance(value, (int, float, np.number)) and math.isfinite(value) and bool(value >= minimum)


def check_count(name: str, value: Any) -> None:
    """Raise a ValueError if a value is neither None nor an integer of at least 1."""
    if value is not None and not is_count(value):
        raise ValueError(f"{name} must be an integer of at least 1, or None, got {name}={value!r}")


def check_integer(name: str, value: Any, minimum: int, end: float = math.inf) -> None:
    """Raise a ValueError if a value is no integer in [minimum, end)."""
    if not is_integer(value, minimum, end):
        expected = f"of at least {minimum}" if end == math.inf else f"in [{minimum}, {end})"
        raise ValueError(f"{name} must be an integer {expected}, got {name}={value!r}")


def check_policy_class(policy_class: type[BasePolicy]) -> None:
    """Raise a ValueError if a class is that of no actor-critic policy, or of a recurrent one."""
    is_actor_critic = isinstance(policy_class, type) and issubclass(policy_class, ActorCriticPolicy)
    if not is_actor_critic or "lstm_states" in inspect.signature(policy_class.forward).parameters:
        raise ValueError(f"policy must be a subclass of SB3's ActorCriticPolicy that is not recurrent, got {policy_class}")


def check_scheduled(name: str, value: float, progress_remaining: float) -> None:
    """Raise a ValueError if what the schedule of an argument gives at some progress (from 1 to 0) is not allowed."""
    # Adam refuses rates that float32 cannot hold in other words
    if not is_real(value, minimum=0) or (name == "learning_rate" and value > float(np.finfo(np.float32).max)):
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
