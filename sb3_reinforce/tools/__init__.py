"""Tools around REINFORCE: checkpoints, and what needs an extra (RL Zoo, EnvPool, Ray, reports)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_reinforce.tools.envpool import EnvPoolVecEnv
    from sb3_reinforce.tools.ray import RayExecutor
    from sb3_reinforce.tools.report import write_report
    from sb3_reinforce.tools.zoo import register

__all__ = ["EnvPoolVecEnv", "RayExecutor", "register", "write_report"]

#: Imported when they are used, so that ``import sb3_reinforce`` needs no extra
_MODULES = {"EnvPoolVecEnv": "envpool", "RayExecutor": "ray", "register": "zoo", "write_report": "report"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
