"""
RL Zoo: its own commands, with ``reinforce`` among the algorithms.

    python -m sb3_reinforce train --env LunarLanderContinuous-v3     # or: sb3-reinforce train ...
    python -m sb3_reinforce enjoy --env LunarLanderContinuous-v3
    python -m sb3_reinforce train --env LunarLanderContinuous-v3 -i logs/reinforce/LunarLanderContinuous-v3_1   # goes on
    python -m sb3_reinforce train --env LunarLanderContinuous-v3 --workers 4

A script of your own calls :func:`register` before it calls rl_zoo3.
"""

import argparse
import functools
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_reinforce.episodes.algorithm import StepsProgressBar
from sb3_reinforce.episodes.files import read_model_file
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv, wrap_env
from sb3_reinforce.episodes.workers import EnvFactory
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.tools.checkpoints import (
    AtomicCheckpointCallback,
    newest_checkpoint,
    restore_evaluations,
    statistics_path,
)

ALGO = "reinforce"
_DEFAULTS = ["--algo", ALGO, "--folder", "logs"]
#: Environment variable with the number of workers of ``train``
WORKERS = "SB3_REINFORCE_WORKERS"
#: The commands of rl_zoo3 and their default options here: folders are those that ``train`` writes, and ``enjoy``, which would
#: cut episodes as training does, has the environment's own time limit.
COMMANDS: dict[str, list[str]] = {
    "train": ["--algo", ALGO],
    "enjoy": [*_DEFAULTS, "--env-kwargs", "max_episode_steps:None"],
    "record_video": _DEFAULTS,
    "record_training": _DEFAULTS,
    "plot_train": ["--algo", ALGO, "--exp-folder", "logs"],
    "all_plots": ["--algos", ALGO, "--exp-folders", "logs"],
    "plot_from_file": [],
    "benchmark": ["--log-dir", "logs"],
    "load_from_hub": _DEFAULTS,
    "push_to_hub": _DEFAULTS,
}
#: Those that rl_zoo3 has as scripts, not as functions
_SCRIPTS = ("record_video", "record_training", "benchmark", "load_from_hub", "push_to_hub")
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

    ExperimentManager: Any = type("ExperimentManager", (Experiments, rl_zoo3.exp_manager.ExperimentManager), {})
    # Both modules have a name for it, whichever is imported from
    rl_zoo3.exp_manager.ExperimentManager = rl_zoo3.train.ExperimentManager = ExperimentManager  # type: ignore[misc]
    # SB3's own also counts the steps that idle environments do not take
    rl_zoo3.exp_manager.ProgressBarCallback = StepsProgressBar  # type: ignore[misc]
    rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER[ALGO] = sample_reinforce_params
    rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER[ALGO] = convert_reinforce_params
    rl_zoo3.ALGOS[ALGO] = REINFORCE


#: Of a class that is known when rl_zoo3 is imported
_Base: Any = object


class Experiments(_Base):
    """What rl_zoo3's ``ExperimentManager`` has to do in another way for ``reinforce``; other algorithms see no difference."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.workers = int(os.environ.get(WORKERS, 0))
        if self.workers and (self.algo != ALGO or self.optimize_hyperparameters):
            raise SystemExit(f"--workers are for training with {ALGO}, not for others, nor for -optimize (--n-jobs)")
        self.goes_on = self.algo == ALGO and self.continue_training and is_checkpoint(self.trained_agent)
        if self.algo == ALGO:
            self.config = find_config(kwargs.get("config"))
            # REINFORCE makes this of a plain DummyVecEnv itself, but not of one below a wrapper
            if self.vec_env_class is DummyVecEnv:  # type: ignore[has-type]
                self.vec_env_class = EpisodeVecEnv
        if self.goes_on:
            # In the folder of the run, not in one of its own
            self.save_path = os.path.dirname(self.trained_agent)
            self.params_path = f"{self.save_path}/{self.env_name}"
            self.monitor_kwargs["override_existing"] = False

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> Any:
        is_training = not (eval_env or no_log)
        if is_training and self.goes_on and not self.workers:
            self._begin_monitor_files(n_envs)
        if not is_training or not self.workers:
            return super().create_envs(n_envs, eval_env, no_log)
        if self.normalize or self.frame_stack is not None or self.vec_env_wrapper is not None:
            raise SystemExit(
                "--workers: wrappers of a VecEnv (normalize, frame_stack, vec_env_wrapper) cannot be sent to them"
            )
        env = EnvFactory(self.env_name.gym_id, self.env_kwargs, self.env_wrapper, {}, self.save_path, self.monitor_kwargs)
        return wrap_env(env)

    def _begin_monitor_files(self, n_envs: int) -> None:
        """Those of environments that were not there before: a monitor that appends to a file writes no header."""
        header: dict[str, Any] = dict(t_start=time.time(), env_id=self.env_name.gym_id)
        for path in (f"{self.save_path}/{index}.{Monitor.EXT}" for index in range(n_envs)):
            if not os.path.exists(path):
                ResultsWriter(path, header, self.monitor_kwargs.get("info_keywords", ())).close()

    def _preprocess_action_noise(self, hyperparams: Any, saved_hyperparams: Any, env: Any) -> Any:
        if self.workers:
            hyperparams["workers"] = self.workers
            # They are one environment to the algorithm: batches stay as large as in the file
            if "n_steps" in hyperparams:
                hyperparams["n_steps"] *= self.n_envs
        return super()._preprocess_action_noise(hyperparams, saved_hyperparams, env)

    def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> dict[str, Any]:
        """``target_kl: lin_0.01`` falls to 0 with the progress remaining, as rl_zoo3 has it for learning rates."""
        target_kl = hyperparams.get("target_kl")
        if self.algo == ALGO and isinstance(target_kl, str) and target_kl.startswith("lin_"):
            # What is no number, the constructor refuses
            with suppress(ValueError):
                # The schedule of SB3, so that the model needs no rl_zoo3 to load
                hyperparams["target_kl"] = LinearSchedule(float(target_kl.removeprefix("lin_")), 0.0, 1.0)
        return super()._preprocess_schedules(hyperparams)

    def create_callbacks(self) -> None:
        super().create_callbacks()
        if self.algo == ALGO and not self.optimize_hyperparameters:
            command = f"sb3-reinforce train ... -i {self.save_path}, with the other options as they were"
            self.callbacks.append(AtomicCheckpointCallback(self.save_path, resume_command=command))

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if not self.goes_on:
            return super()._load_pretrained_agent(hyperparams, env)
        # With the seed and the hyperparameters that it has
        print(f"Going on from {self.trained_agent}")
        _, saved = read_model_file(self.trained_agent, {})
        model = REINFORCE.load(
            self.trained_agent,
            env,
            # Batches stay as large, with workers or without
            n_steps=saved["n_steps"] and saved["n_steps"] * saved["n_envs"] // env.num_envs,
            device=self.device,
            tensorboard_log=self.tensorboard_log,
            verbose=self.verbose,
            workers=self.workers or None,
        )
        self.n_timesteps -= model.num_timesteps
        for callback in self.callbacks:
            if isinstance(callback, EvalCallback):
                restore_evaluations(callback, f"{self.save_path}/evaluations.npz", model.num_timesteps)
        return model

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        statistics = statistics_path(Path(self.trained_agent)) if self.goes_on else None
        if statistics is None or not statistics.exists():
            return super()._maybe_normalize(env, eval_env)
        env = VecNormalize.load(str(statistics), env)
        if eval_env:
            env.training = env.norm_reward = False
        return env

    def learn(self, model: BaseAlgorithm) -> None:
        if not self.goes_on:
            return super().learn(model)
        goes_on = functools.partialmethod(REINFORCE.learn, reset_num_timesteps=False)
        with mock.patch.object(REINFORCE, "learn", goes_on):
            super().learn(model)


def is_checkpoint(path: str) -> bool:
    """Whether a file is named as those of :class:`~sb3_reinforce.tools.checkpoints.AtomicCheckpointCallback` are."""
    return re.fullmatch(r"checkpoint_\d+_steps\.zip", os.path.basename(path)) is not None


def take_workers(options: list[str]) -> list[str]:
    """Options of ``train`` without ``--workers N``, which RL Zoo does not know: its managers find it in the environment."""
    parser = argparse.ArgumentParser(prog="sb3-reinforce train", add_help=False, allow_abbrev=False)
    parser.add_argument("--workers", type=int, default=0)
    arguments, others = parser.parse_known_args(options)
    os.environ[WORKERS] = str(arguments.workers)
    return others


def find_checkpoint(options: list[str]) -> list[str]:
    """
    Options of ``train`` with the newest checkpoint in the place of the folder that ``-i`` names.

    :raises SystemExit: if there is none
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-i", "--trained-agent", default="")
    arguments, others = parser.parse_known_args(options)
    if not os.path.isdir(arguments.trained_agent):
        return options
    checkpoint = newest_checkpoint(arguments.trained_agent)
    if checkpoint is None:
        raise SystemExit(f"{arguments.trained_agent} has no checkpoint to go on from")
    return [*others, "--trained-agent", str(checkpoint)]


def find_config(name: str | None) -> str:
    """
    :param name: ``--conf-file``: a path, a Python module, or "article.yml" or "reinforce.yml", which this package has; None
        for the latter
    :return: the path or module for rl_zoo3 to read
    """
    package = Path(__file__).parent.parent
    # A build puts the files inside the package, a checkout has them beside it
    folder = next(path for path in (package / "zoo_configs", package.parent / "zoo_configs") if path.is_dir())
    if name is None:
        return str(folder / "reinforce.yml")
    return str(folder / name) if (folder / name).is_file() and not Path(name).exists() else name


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
        "target_kl": trial.suggest_float("target_kl", 1e-3, 0.1, log=True),
        "cg_damping": trial.suggest_float("cg_damping", 0.01, 10.0, log=True),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "baseline": trial.suggest_categorical("baseline", ["linear", "quadratic", "random_features"]),
        "baseline_memory": trial.suggest_float("baseline_memory", 0.0, 0.9),
        "bootstrap_timeouts": trial.suggest_categorical("bootstrap_timeouts", [False, True]),
        "normalize_observations": trial.suggest_categorical("normalize_observations", [False, True]),
        "net_arch": trial.suggest_categorical("net_arch", list(_NET_ARCHS)),
        "activation_fn": trial.suggest_categorical("activation_fn", list(_ACTIVATION_FNS)),
    }
    if n_actions > 0:
        sampled_params["log_std_init"] = trial.suggest_float("log_std_init", -2.0, 1.0)
    # Display true values
    trial.set_user_attr("gamma", 1 - sampled_params["one_minus_gamma"])
    return convert_reinforce_params(sampled_params)


def convert_reinforce_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: parameters of a trial
    :return: arguments for the algorithm
    """
    hyperparams = sampled_params.copy()
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    policy_kwargs = {
        "net_arch": _NET_ARCHS[hyperparams.pop("net_arch")],
        "activation_fn": _ACTIVATION_FNS[hyperparams.pop("activation_fn")],
    }
    if "log_std_init" in hyperparams:
        policy_kwargs["log_std_init"] = hyperparams.pop("log_std_init")
    return {**hyperparams, "policy_kwargs": policy_kwargs}


@contextmanager
def _patch_subprocesses(with_ffmpeg: bool = False) -> Iterator[None]:
    """Let benchmark and record_training start commands that know ``reinforce``; the latter may need imageio-ffmpeg as well."""
    call, path = subprocess.call, os.environ.get("PATH", "")
    # rl_zoo3's repository has an enjoy.py, its package none
    commands = {("python", "enjoy.py"): "enjoy", ("python", "-m", "rl_zoo3.record_video"): "record_video"}

    def start(command: Any, *args: Any, **kwargs: Any) -> int:
        for known, ours in commands.items():
            if tuple(command[: len(known)]) == known:
                command = [sys.executable, "-m", "sb3_reinforce.tools.zoo", ours, *command[len(known) :]]
        return call(command, *args, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        if with_ffmpeg and shutil.which("ffmpeg") is None:
            from imageio_ffmpeg import get_ffmpeg_exe

            os.symlink(get_ffmpeg_exe(), Path(folder, "ffmpeg"))
        subprocess.call = start  # type: ignore[assignment]
        os.environ["PATH"] = f"{path}{os.pathsep}{folder}"
        try:
            yield
        finally:
            subprocess.call, os.environ["PATH"] = call, path


def _patch_hub() -> None:
    """Give rl_zoo3 what huggingface_sb3 had before version 3."""
    import huggingface_sb3
    from huggingface_hub.errors import HfHubHTTPError
    from requests.exceptions import HTTPError

    load = huggingface_sb3.load_from_hub

    def load_from_hub(repo_id: str, filename: str) -> str:
        try:
            return load(repo_id, filename)
        except HfHubHTTPError as error:
            # rl_zoo3 catches this for files that need not be there, such as the statistics of VecNormalize
            raise HTTPError(str(error)) from error

    huggingface_sb3.load_from_hub = load_from_hub
    # The package has a function of the same name
    push_to_hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(push_to_hub, "generate_metadata"):
        push_to_hub.generate_metadata = lambda *args: push_to_hub._generate_metadata(*args).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="sb3-reinforce",
        description="RL Zoo's commands with REINFORCE, and a report on runs; `sb3-reinforce COMMAND --help` lists its options",
    )
    parser.add_argument("command", choices=[*COMMANDS, "report"])
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the command")
    arguments = parser.parse_args()
    try:
        if arguments.command == "report":
            # It needs no rl_zoo3
            importlib.import_module("sb3_reinforce.tools.report").main(arguments.options)
            return
        register()
    except ImportError as error:
        raise SystemExit(str(error)) from error

    command = arguments.command
    # A repeated option overrides the default
    options = find_checkpoint(take_workers(arguments.options)) if command == "train" else arguments.options
    sys.argv = [f"sb3-reinforce {command}", *COMMANDS[command], *options]
    if command not in _SCRIPTS:
        getattr(importlib.import_module("rl_zoo3.cli"), command)()
        return
    if command.endswith("_hub"):
        _patch_hub()
    with _patch_subprocesses(with_ffmpeg=command == "record_training"):
        runpy.run_module(f"rl_zoo3.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
