"""
RL Zoo: its own commands, with ``reinforce`` among the algorithms.

    python -m sb3_reinforce.zoo train --env LunarLanderContinuous-v3     # or: sb3-reinforce train ...
    python -m sb3_reinforce.zoo enjoy --env LunarLanderContinuous-v3

Scripts of one's own call :func:`register` before they call rl_zoo3.
"""

import argparse
import importlib
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from sb3_reinforce.callbacks import StepsProgressBar
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.vec_env import EpisodeVecEnv

ALGO = "reinforce"
_DEFAULTS = ["--algo", ALGO, "--folder", "logs"]
#: For each command, its module and what its options are by default: the folders are those that ``train`` writes to, where
#: rl_zoo3's own would be that of the agents it has trained
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "train": ("rl_zoo3.train", ["--algo", ALGO]),
    "enjoy": ("rl_zoo3.enjoy", _DEFAULTS),
    "record_video": ("rl_zoo3.record_video", _DEFAULTS),
    "plot_train": ("rl_zoo3.plots", ["--algo", ALGO, "--exp-folder", "logs"]),
    "all_plots": ("rl_zoo3.plots", ["--algos", ALGO, "--exp-folders", "logs"]),
    "plot_from_file": ("rl_zoo3.plots", []),
    "benchmark": ("rl_zoo3.benchmark", ["--log-dir", "logs"]),
    "load_from_hub": ("rl_zoo3.load_from_hub", _DEFAULTS),
    "push_to_hub": ("rl_zoo3.push_to_hub", _DEFAULTS),
}
#: The commands that rl_zoo3 has as scripts, not as functions
_SCRIPTS = ("record_video", "benchmark", "load_from_hub", "push_to_hub")

_NET_ARCHS = {"linear": [], "small": [32, 32], "medium": [64, 64], "large": [256, 256]}
_ACTIVATION_FNS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def register() -> None:
    """
    Make ``reinforce`` an algorithm of rl_zoo3, with this project's hyperparameter file and a search space.

    Call it before ``rl_zoo3.train.train()``, ``rl_zoo3.enjoy.enjoy()`` and so on; further calls do nothing.

    :raises ImportError: if rl_zoo3 is not installed
    """
    try:
        import rl_zoo3.exp_manager
        import rl_zoo3.hyperparams_opt
        import rl_zoo3.train
    except ImportError as error:
        raise ImportError(f"{error}. The RL Zoo needs: pip install 'sb3-reinforce[zoo]'") from error
    if ALGO in rl_zoo3.ALGOS:
        return

    class ExperimentManager(rl_zoo3.exp_manager.ExperimentManager):
        """rl_zoo3's, which says in no other way what an algorithm is to have. Others than ``reinforce`` see no difference."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if self.algo == ALGO:
                self.config = find_config(kwargs.get("config"))
            # Same results, but cheaper to step. There is nothing to do about render modes: rl_zoo3 makes its training
            # environments without one
            if self.algo == ALGO and self.vec_env_class is DummyVecEnv:
                self.vec_env_class = EpisodeVecEnv

        def _preprocess_hyperparams(self, hyperparams: dict[str, Any]) -> Any:
            rate = hyperparams.get("learning_rate")
            self.max_episode_steps = hyperparams.get("max_episode_steps")
            processed = super()._preprocess_hyperparams(hyperparams)
            # rl_zoo3's own class of schedules would be saved with the model, which could not be loaded without rl_zoo3 then
            if self.algo == ALGO and isinstance(rate, str):
                processed[0]["learning_rate"] = linear_schedule(rate)
            return processed

        def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
            env_kwargs = self.env_kwargs
            own_limit = env_kwargs.get("max_episode_steps", gym.spec(self.env_name.gym_id).max_episode_steps) or math.inf
            limit = self.max_episode_steps or math.inf
            # Wrappers may count steps differently than the environment within
            if self.algo != ALGO or eval_env or self.env_wrapper is not None or limit >= own_limit:
                return super().create_envs(n_envs, eval_env, no_log)
            # Episodes that REINFORCE would cut end by themselves then, which puts them into monitor.csv
            self.env_kwargs = {**env_kwargs, "max_episode_steps": limit}
            try:
                return super().create_envs(n_envs, eval_env, no_log)
            finally:
                self.env_kwargs = env_kwargs

        def create_callbacks(self) -> None:
            super().create_callbacks()
            # SB3's progress bar counts idle environments too
            if self.algo == ALGO:
                self.callbacks = [StepsProgressBar() if type(c) is ProgressBarCallback else c for c in self.callbacks]

    # Both modules have a name for it, whichever is imported from
    rl_zoo3.exp_manager.ExperimentManager = rl_zoo3.train.ExperimentManager = ExperimentManager  # type: ignore[misc]
    rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER[ALGO] = sample_reinforce_params
    rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER[ALGO] = convert_reinforce_params
    rl_zoo3.ALGOS[ALGO] = REINFORCE


def find_config(name: str | None) -> str:
    """
    :param name: ``--conf-file``: a path, a Python module, or "article.yml" or "reinforce.yml", which this package has; None
        for the latter
    :return: the path or module for rl_zoo3 to read
    """
    folder = Path(__file__).parent / "zoo_configs"
    if not folder.is_dir():
        # In a checkout; building the package is what puts them inside
        folder = Path(__file__).parent.parent / "zoo_configs"
    if name is None:
        return str(folder / "reinforce.yml")
    return str(folder / name) if (folder / name).is_file() and not Path(name).exists() else name


def linear_schedule(text: str) -> LinearSchedule:
    """
    :param text: as in rl_zoo3's files: "lin_" and the value to begin with
    :return: a schedule from this value to 0
    """
    return LinearSchedule(float(text.split("_")[1]), 0.0, 1.0)


def sample_reinforce_params(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for REINFORCE hyperparams.

    :param trial: an Optuna trial
    :param n_actions: number of action dimensions, 0 if actions are not continuous
    :param n_envs: not used
    :param additional_args: not used
    :return: arguments for the algorithm
    """
    sampled_params = {
        "n_steps": trial.suggest_int("n_steps", 128, 2048, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.001, 0.1, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 0.03, log=True),
        "lr_schedule": trial.suggest_categorical("lr_schedule", ["linear", "constant"]),
        "target_kl": trial.suggest_float("target_kl", 1e-3, 0.1, log=True),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "baseline": trial.suggest_categorical("baseline", ["linear", "quadratic", "random"]),
        "baseline_memory": trial.suggest_float("baseline_memory", 0.0, 0.9),
        "bootstrap_timeouts": trial.suggest_categorical("bootstrap_timeouts", [False, True]),
        "normalize_observations": trial.suggest_categorical("normalize_observations", [False, True]),
        "net_arch": trial.suggest_categorical("net_arch", list(_NET_ARCHS)),
        "activation_fn": trial.suggest_categorical("activation_fn", list(_ACTIVATION_FNS)),
    }
    if n_actions > 0:
        sampled_params["bounds_coef"] = trial.suggest_float("bounds_coef", 1e-3, 1.0, log=True)
        sampled_params["log_std_init"] = trial.suggest_float("log_std_init", -2.0, 0.5)
    # Display true values
    trial.set_user_attr("gamma", 1 - sampled_params["one_minus_gamma"])
    hyperparams = convert_reinforce_params(sampled_params)
    if isinstance(hyperparams["learning_rate"], str):
        hyperparams["learning_rate"] = linear_schedule(hyperparams["learning_rate"])
    return hyperparams


def convert_reinforce_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn what was sampled in a trial into hyperparameters as a file would have them.

    :param sampled_params: parameters of the trial
    :return: hyperparameters
    """
    hyperparams = sampled_params.copy()
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    if hyperparams.pop("lr_schedule") == "linear":
        hyperparams["learning_rate"] = f"lin_{hyperparams['learning_rate']}"
    policy_kwargs = {
        "net_arch": _NET_ARCHS[hyperparams.pop("net_arch")],
        "activation_fn": _ACTIVATION_FNS[hyperparams.pop("activation_fn")],
    }
    if "log_std_init" in hyperparams:
        policy_kwargs["log_std_init"] = hyperparams.pop("log_std_init")
    return {**hyperparams, "policy_kwargs": policy_kwargs}


def _mend_benchmark() -> None:
    """It starts ``python enjoy.py``: a file that only rl_zoo3's repository has, and a process that has no ``reinforce``."""

    def start_enjoy(command: list[str]) -> int:
        return subprocess.run([sys.executable, "-m", "sb3_reinforce.zoo", "enjoy", *command[2:]]).returncode

    subprocess.call = start_enjoy  # type: ignore[assignment]


def _mend_hub() -> None:
    """rl_zoo3 (2.9) has not followed huggingface_sb3 to its version 3, from which another client raises the errors."""
    import requests.exceptions
    from huggingface_hub.errors import HfHubHTTPError

    # What rl_zoo3 catches this for is a file that is not on the hub, such as the statistics of a model without VecNormalize
    requests.exceptions.HTTPError = HfHubHTTPError  # type: ignore[assignment,misc]
    # The package has a function of the same name
    push_to_hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(push_to_hub, "generate_metadata"):
        push_to_hub.generate_metadata = lambda *args: push_to_hub._generate_metadata(*args).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="sb3-reinforce", description="RL Zoo's commands with REINFORCE; `sb3-reinforce COMMAND --help` lists its options"
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the command")
    arguments = parser.parse_args()
    try:
        register()
    except ImportError as error:
        raise SystemExit(str(error)) from error

    command = arguments.command
    module, defaults = COMMANDS[command]
    # Of an option that is there twice, the latter counts
    sys.argv = [f"sb3-reinforce {command}", *defaults, *arguments.options]
    if command not in _SCRIPTS:
        getattr(importlib.import_module(module), command)()
        return
    if command == "benchmark":
        _mend_benchmark()
    if command.endswith("_hub"):
        _mend_hub()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
