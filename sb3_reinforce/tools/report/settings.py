"""Settings of runs as text, and the defaults of their algorithms, without unpickling."""

import base64
import functools
import importlib
import itertools
import json
import pickletools
import re
from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import data_to_json

from sb3_reinforce.reinforce import REINFORCE

#: Arguments that do not affect training, or are shown elsewhere in the report
_NO_SETTINGS = ("policy", "env", "seed", "tensorboard_log", "verbose", "device", "workers")
#: Arguments that off-policy algorithms replace by values that depend on the environment, or are not readable
_REPLACED = ("train_freq", "target_entropy")
#: Buffers that SB3 chooses by itself
_CHOSEN_BUFFERS = r"(Dict|Episode)?(Rollout|Replay)Buffer"


@functools.cache
def find_algorithm(name: str) -> Any:
    """
    Find the class of an algorithm of this package, SB3 or sb3-contrib.

    :param name: name in RL Zoo, for example "a2c"
    :return: class, or None
    """
    found: dict[str, Any] = {}
    for package in ("sb3_contrib", "stable_baselines3"):
        with suppress(ImportError):
            found |= vars(importlib.import_module(package))
    classes: list[Any] = [REINFORCE, *(each for each in found.values() if isinstance(each, type))]
    names = {cls.__name__.lower(): cls for cls in classes if issubclass(cls, BaseAlgorithm)}
    return names.get({"ppo_lstm": "recurrentppo"}.get(name, name))


@functools.cache
def default_settings(algorithm: Any, policy: str | None = None) -> dict[str, str]:
    """
    Read the defaults of the arguments of an algorithm.

    :param algorithm: class
    :param policy: alias, or name of the class, of the policy; affects the defaults of REINFORCE
    :return: text of each argument
    """
    classes = {alias: cls.__name__ for alias, cls in algorithm.policy_aliases.items()}
    alias = next((alias for alias, name in classes.items() if policy in (alias, name)), next(iter(classes)))
    # Constructors replace some defaults, for example A2C the optimizer
    model = algorithm(alias, None, device="cpu", _init_setup_model=False)
    arguments = {name: value for name, value in vars(model).items() if name in signature(algorithm).parameters}
    texts = model_settings(json.loads(data_to_json(arguments)), algorithm)
    return {"policy_class": classes[alias], "n_envs": "1", **texts}


def model_settings(saved: Mapping[str, Any], algorithm: Any = None) -> dict[str, str]:
    """
    Read the settings of a model file.

    :param saved: JSON of the model file
    :param algorithm: class of the model, if known
    :return: text of each argument
    """
    arguments = signature(algorithm).parameters if algorithm is not None else ()
    names = [name for name in arguments if name not in _NO_SETTINGS and name not in _REPLACED]
    texts = {name: setting_text(saved[name]) for name in ("policy_class", "n_envs", *names) if name in saved}
    return {name: "None" if re.fullmatch(_CHOSEN_BUFFERS, text) else text for name, text in texts.items()}


def setting_text(value: Any) -> str:
    """
    Format a value of a model file.

    :param value: value from the JSON of the model file
    :return: ``repr`` of the value. For pickled values, the name of the class, or the type and its readable attributes
    """
    if not (isinstance(value, dict) and ":type:" in value):
        return repr(value)
    operations = pickletools.genops(base64.b64decode(value[":serialized:"]))
    texts = [text for _, text, _ in itertools.islice(operations, 1000) if isinstance(text, str)]
    if "__module__" in value and len(texts) == 2:
        return texts[1]
    inner = {name: item for name, item in value.items() if not name.startswith((":", "_"))}
    kind = re.findall(r"\w+", value[":type:"])[-1]
    if kind == "dict":
        return repr(inner)
    text = f"{kind}({', '.join(f'{name}={item}' for name, item in inner.items())})"
    # SB3 wraps numbers in schedules
    text = re.sub(r"^FloatSchedule\(value_schedule=(.*)\)$", r"\1", text)
    return re.sub(r"^ConstantSchedule\(val=(.*)\)$", r"\1", text)


def read_config(text: str) -> dict[str, str]:
    """
    Read a YAML file of RL Zoo without creating objects: a few aliases may stand for billions.

    :param text: content of ``config.yml`` or ``args.yml``
    :return: ``repr`` of numbers, strings and booleans, and the YAML of other values
    """
    pairs = yaml.compose(text, yaml.SafeLoader).value[0].value
    return {pair.value[0].value: _yaml_text(text, pair.value[1]) for pair in pairs}


def _yaml_text(text: str, node: yaml.Node) -> str:
    part = text[node.start_mark.index : node.end_mark.index]
    if isinstance(node, yaml.ScalarNode) and len(part) < 100:
        with suppress(yaml.YAMLError, ValueError):
            return repr(yaml.safe_load(part))
    return " ".join(part.split())
