"""
The public interface is listed in ``public_api.txt``, so that no name or argument changes by accident.

After an intended change: ``python -m tests.test_api > tests/public_api.txt``, and an entry in CHANGELOG.md.
"""

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import sb3_reinforce
from sb3_reinforce import REINFORCE

LISTED = Path(__file__).with_name("public_api.txt")
#: In their own modules, because they need extras
OTHERS = ("tools.EnvPoolVecEnv", "tools.RayExecutor", "tools.register", "tools.write_report")
PUBLIC = tuple(f"sb3_reinforce.{name}" for name in (*sb3_reinforce.__all__, *OTHERS))


def signature(function: Callable[..., Any]) -> str:
    """Return names, kinds and defaults of arguments, without annotations, whose text depends on the version of Python."""
    parameters = inspect.signature(function).parameters.values()
    shown = [
        parameter.replace(annotation=parameter.empty) for parameter in parameters if parameter.name not in ("self", "cls")
    ]
    return str(inspect.Signature(shown))


def describe(name: str) -> Iterator[str]:
    """Return a line per function or class, and per member of this package for exported classes."""
    module, _, last = name.rpartition(".")
    value = getattr(import_module(module), last)
    yield name + signature(value)
    if module != "sb3_reinforce" or not inspect.isclass(value):
        return
    members = [cls.__dict__ for cls in value.__mro__ if cls.__module__.startswith("sb3_reinforce")]
    for member in sorted({member for own in members for member in own}):
        if member.startswith("_") and member != "__call__":
            continue
        is_called = inspect.isroutine(getattr(value, member))
        yield f"{name}.{member}{signature(getattr(value, member)) if is_called else ''}"


def interface() -> str:
    return "".join(f"{line}\n" for name in PUBLIC for line in describe(name))


def test_the_public_interface_has_not_changed():
    assert interface().splitlines() == LISTED.read_text(encoding="utf-8").splitlines()


def test_a_changed_signature_is_found(monkeypatch: pytest.MonkeyPatch):
    class Changed(REINFORCE):
        def learn(self, total_timesteps, callback=None, log_interval=4):
            return self

    Changed.__module__ = "sb3_reinforce"
    before = interface()
    monkeypatch.setattr(sb3_reinforce, "REINFORCE", Changed)
    (one,) = set(before.splitlines()) - set(interface().splitlines())
    assert one.startswith("sb3_reinforce.REINFORCE.learn(total_timesteps, callback=None, log_interval=1, ")


def test_a_star_import_has_all_public_names():
    namespace: dict[str, Any] = {}
    exec("from sb3_reinforce import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(sb3_reinforce.__all__)


if __name__ == "__main__":
    print(interface(), end="")
