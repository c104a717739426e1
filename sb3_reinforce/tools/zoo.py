"""
RL Zoo's commands with the algorithm ``reinforce``.

    python -m sb3_reinforce train --env LunarLanderContinuous-v3     # or: sb3-reinforce train ...
    python -m sb3_reinforce enjoy --env LunarLanderContinuous-v3
    python -m sb3_reinforce train -i logs/reinforce/LunarLanderContinuous-v3_1   # resume
    python -m sb3_reinforce train --env LunarLanderContinuous-v3 --workers 4

Your own scripts must call :func:`register` before they call rl_zoo3.
"""

import argparse
import functools
import glob
import importlib
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_reinforce.episodes.checks import check_count, read_model_file
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv, wrap_env
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.tools.checkpoints import (
    AtomicCheckpointCallback,
    checkpoint_pattern,
    newest_checkpoint,
    restore_evaluations,
    statistics_path,
    write_atomically,
)
from sb3_reinforce.tools.env_factory import EnvFactory

ALGO = "reinforce"
_DEFAULTS = ["--algo", ALGO, "--folder", "logs"]
#: Commands of rl_zoo3 and their default options: ``train`` writes to the folder "logs", and ``enjoy`` uses the time limit of
#: the environment instead of the one for training
COMMANDS: dict[str, list[str]] = {
    "train": [],
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
#: Commands that rl_zoo3 only has as scripts
_SCRIPTS = ("record_video", "record_training", "benchmark", "load_from_hub", "push_to_hub")
_NET_ARCHS = {"linear": [], "small": [32, 32], "medium": [64, 64], "large": [256, 256]}
_ACTIVATION_FNS = {"relu": nn.ReLU, "tanh": nn.Tanh}
#: Changes to the options of rl_zoo3.train
_TRAIN_OPTIONS: dict[str, dict[str, Any]] = {
    "--algo": dict(default=ALGO, help=f"RL Algorithm (default: {ALGO})"),
    "--log-folder": dict(help="Log folder (default: logs)"),
    "--trained-agent": dict(
        help=f"Folder of a run of {ALGO}, to resume it with its options and hyperparameters (-n: with another total number of "
        "timesteps), or path to a model, to continue training it in a new folder"
    ),
    "--conf-file": dict(
        help="Hyperparameters: YAML file, Python file or package with a dictionary 'hyperparams', with a key for each "
        "environment, or article.yml of this package (default: its reinforce.yml)"
    ),
}


def register() -> None:
    """
    Add ``reinforce`` to the algorithms of rl_zoo3, with the hyperparameter file of this package and a search space.

    Call it before ``rl_zoo3.train.train()``, ``rl_zoo3.enjoy.enjoy()`` etc. Further calls have no effect.

    :raises ImportError: if rl_zoo3 is not installed
    """
    try:
        import rl_zoo3.exp_manager
        import rl_zoo3.hyperparams_opt
        import rl_zoo3.train
        import rl_zoo3.utils
    except ImportError as error:
        raise ImportError(f"{error}. The RL Zoo needs: pip install 'sb3-reinforce[zoo]'") from error
    if ALGO in rl_zoo3.ALGOS:
        return

    ExperimentManager: Any = type("ExperimentManager", (Experiments, rl_zoo3.exp_manager.ExperimentManager), {})
    # rl_zoo3.train imports the class by name
    rl_zoo3.exp_manager.ExperimentManager = rl_zoo3.train.ExperimentManager = ExperimentManager  # type: ignore[misc]
    # rl_zoo3.train creates its parser inside of train()
    rl_zoo3.train.argparse = SimpleNamespace(ArgumentParser=TrainParser)  # type: ignore[assignment]
    rl_zoo3.utils.glob = SimpleNamespace(glob=_glob_checkpoints)  # type: ignore[assignment]
    rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER[ALGO] = sample_reinforce_params
    rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER[ALGO] = convert_reinforce_params
    rl_zoo3.ALGOS[ALGO] = REINFORCE


def _glob_checkpoints(pattern: str) -> list[str]:
    """``glob.glob()`` for rl_zoo3, whose ``--load-last-checkpoint`` only knows the file names of SB3's callback."""
    return list({*glob.glob(pattern), *glob.glob(pattern.replace("rl_model_*", "checkpoint_*"))})


class TrainParser(argparse.ArgumentParser):
    """Parser of ``rl_zoo3.train`` with the options of this package. A folder for ``-i`` sets the other defaults."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_argument(
            "--workers", metavar="N", help="Number of processes that run episodes (default: 0, none)", default=0, type=int
        )

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        return super().add_argument(*names, **kwargs | _TRAIN_OPTIONS.get(names[-1], {}))

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        try:
            arguments = super().parse_args(args, namespace)
        except (SyntaxError, NameError) as error:
            self.error(f"{error} in NAME:VALUE, where VALUE must be a Python expression, with quotes around a string")
        if arguments.workers < 0:
            self.error(f"argument --workers: must be at least 0, got {arguments.workers}")
        if arguments.trained_agent and not os.path.exists(arguments.trained_agent):
            self.error(f"argument -i/--trained-agent: no such file or folder: {arguments.trained_agent}")
        if os.path.isdir(folder := arguments.trained_agent):
            checkpoint = newest_checkpoint(folder)
            if checkpoint is None:
                raise SystemExit(f"{folder} has no checkpoint to resume from")
            self.set_defaults(**saved_arguments(folder))
            arguments = super().parse_args(args, namespace)
            arguments.trained_agent = str(checkpoint)
        return arguments


#: Arguments of ``Monitor`` in a resumed run
_APPEND: dict[str, Any] = dict(override_existing=False)


def _make_appending_vec_env(env_id: Any, **kwargs: Any) -> VecEnv:
    """Create environments that append to existing ``Monitor`` files."""
    return make_vec_env(env_id, **{**kwargs, "monitor_kwargs": kwargs["monitor_kwargs"] | _APPEND})


def saved_arguments(folder: str) -> dict[str, Any]:
    """
    Return the options of ``train`` that a run has saved.

    :param folder: folder of the run
    :return: values by name, empty if the run was not started with ``train``
    """
    paths = glob.glob(f"{glob.escape(folder)}/*/args.yml")
    # Like enjoy of rl_zoo3: values may be objects
    return dict(yaml.unsafe_load(Path(paths[0]).read_text())) if paths else {}


#: register() adds the base class, because rl_zoo3 is optional
_Base: Any = object


class Experiments(_Base):
    """Changes to rl_zoo3's ``ExperimentManager`` for ``reinforce``, without effect on other algorithms."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.workers = getattr(self.args, "workers", 0)
        if self.workers and (self.algo != ALGO or self.optimize_hyperparameters):
            raise SystemExit(f"--workers is only available for training with {ALGO}, and not with -optimize (use --n-jobs)")
        self.resumes = self.algo == ALGO and self.continue_training and is_checkpoint(self.trained_agent)
        if self.algo == ALGO:
            self.config = find_config(kwargs.get("config"))
            # REINFORCE only converts a DummyVecEnv without wrappers
            if self.vec_env_class is DummyVecEnv:  # type: ignore[has-type]
                self.vec_env_class = EpisodeVecEnv
        if self.resumes:
            _, self.saved = read_model_file(self.trained_agent, {})
            if self.saved["seed"] is not None:
                self.seed = self.saved["seed"]
            # Continue in the folder of the run instead of a new one
            self.save_path = os.path.dirname(self.trained_agent)
            self.params_path = f"{self.save_path}/{self.env_name}"

    def setup_experiment(self) -> Any:
        if self.algo != ALGO:
            return super().setup_experiment()
        # rl_zoo3 prints each setting where it is read: _print_settings() shows all of them
        no_output: Any = dict.fromkeys(("print", "pprint"), lambda *args: None)
        with mock.patch.multiple("rl_zoo3.exp_manager", **no_output, create=True):
            return super().setup_experiment()

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # rl_zoo3 ignores trial 0
        if self.algo == ALGO and self.trial_id == 0 and self.storage and self.study_name:
            trial = self.load_trial(self.storage, self.study_name, 0)
            self.custom_hyperparams = trial | (self.custom_hyperparams or {})  # type: ignore[has-type]
        config = f"{self.params_path}/config.yml"
        if self.resumes and os.path.exists(config):
            # The file of the run, not the one that --conf-file names, which may have changed
            self.config, saved = config, dict(yaml.unsafe_load(Path(config).read_text()))
            given = self.custom_hyperparams or {}
            changed = [name for name in given if name in signature(REINFORCE).parameters and given[name] != saved.get(name)]
            if changed:
                raise SystemExit(f"A resumed model keeps its hyperparameters: remove {', '.join(changed)} from -params")
            saved |= given | (dict(env_kwargs=self.env_kwargs) if self.env_kwargs else {})
            hyperparams = saved.copy()
        else:
            try:
                hyperparams, saved = super().read_hyperparameters()
            except (AttributeError, TypeError) as error:
                raise SystemExit(
                    f"{self.config} has no dictionary of hyperparameters for each environment: {error}"
                ) from error
        if self.algo == ALGO:
            missing = [name for name in ("n_timesteps", "policy") if name not in saved]
            if missing:
                raise SystemExit(f"{self.config} has no {' and '.join(missing)} for {self.env_name.gym_id}")
            check_count("n_envs", saved.get("n_envs", 1))
            self._print_settings(saved)
        return hyperparams, saved

    def load_trial(self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True) -> dict[str, Any]:
        try:
            return super().load_trial(storage, study_name, trial_id, convert)
        except (KeyError, IndexError) as error:
            raise SystemExit(f"{storage} has no trial {trial_id} of the study {study_name!r}") from error

    def _print_settings(self, saved_hyperparams: dict[str, Any]) -> None:
        given = {**saved_hyperparams, **(dict(env_kwargs=self.env_kwargs) if self.env_kwargs else {})}
        given["n_timesteps"] = int(self.n_timesteps if self.n_timesteps > 0 else given["n_timesteps"])
        elsewhere = ("env", "tensorboard_log", "verbose", "seed", "device", "_init_setup_model", "workers", *given)
        arguments = (argument for argument in signature(REINFORCE).parameters.values() if argument.name not in elsewhere)
        default = {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}
        config = Path(self.config)
        file = config.name if self.resumes or config.parent == Path(find_config(None)).parent else config
        print(f"Folder: {self.save_path}")
        for title, settings in ((f"Set ({file} and options)", given), ("Default", default)):
            # A value is not split
            text = " ".join(f"{name}={value!r}".replace(" ", "\0") for name, value in sorted(settings.items()))
            width, indent = shutil.get_terminal_size().columns - 1, "  "
            options: Any = dict(subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            print(textwrap.fill(f"{title}: {text}", width, **options).replace("\0", " "))

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> Any:
        is_training = not (eval_env or no_log)
        if is_training and self.resumes and not self.workers:
            self._create_monitor_files(n_envs)
        if not is_training or not self.workers:
            # rl_zoo3 replaces self.monitor_kwargs by those of the hyperparameters, and by others for some environments
            with mock.patch("rl_zoo3.exp_manager.make_vec_env", _make_appending_vec_env if self.resumes else make_vec_env):
                return super().create_envs(n_envs, eval_env, no_log)
        if self.normalize or self.frame_stack is not None or self.vec_env_wrapper is not None:
            raise SystemExit("--workers does not support VecEnv wrappers (normalize, frame_stack, vec_env_wrapper)")
        monitor_kwargs = self.monitor_kwargs | (_APPEND if self.resumes else {})
        env = EnvFactory(self.env_name.gym_id, self.env_kwargs, self.env_wrapper, {}, self.save_path, monitor_kwargs)
        return wrap_env(env)

    def _create_monitor_files(self, n_envs: int) -> None:
        """Create missing monitor files: ``Monitor`` does not write a header when it appends to a file."""
        header: dict[str, Any] = dict(t_start=time.time(), env_id=self.env_name.gym_id)
        for path in (f"{self.save_path}/{index}.{Monitor.EXT}" for index in range(n_envs)):
            if not os.path.exists(path):
                ResultsWriter(path, header, self.monitor_kwargs.get("info_keywords", ())).close()

    def _preprocess_action_noise(self, hyperparams: Any, saved_hyperparams: Any, env: Any) -> Any:
        if self.workers:
            hyperparams["workers"] = self.workers
            # With workers, there is a single environment: keep the number of transitions per batch
            n_steps = hyperparams.get("n_steps", signature(REINFORCE).parameters["n_steps"].default)
            hyperparams["n_steps"] = None if n_steps is None else n_steps * self.n_envs
        return super()._preprocess_action_noise(hyperparams, saved_hyperparams, env)

    def _preprocess_schedules(self, hyperparams: dict[str, Any]) -> dict[str, Any]:
        """Support ``target_kl: lin_0.01`` (a linear decrease to 0), like rl_zoo3 for learning rates."""
        target_kl = hyperparams.get("target_kl")
        if self.algo == ALGO and isinstance(target_kl, str) and target_kl.startswith("lin_"):
            # The constructor of REINFORCE checks invalid values
            with suppress(ValueError):
                # SB3's schedule, so that loading the model does not need rl_zoo3
                hyperparams["target_kl"] = LinearSchedule(float(target_kl.removeprefix("lin_")), 0.0, 1.0)
        return super()._preprocess_schedules(hyperparams)

    def create_callbacks(self) -> None:
        super().create_callbacks()
        if self.algo == ALGO and not self.optimize_hyperparameters:
            command = shlex.join([*_program(), "train", "-i", self.save_path])
            self.callbacks.append(AtomicCheckpointCallback(self.save_path, resume_command=command))

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if not self.resumes:
            return super()._load_pretrained_agent(hyperparams, env)
        # Keep the seed and the hyperparameters of the checkpoint
        print(f"Resuming from {self.trained_agent}")
        model = REINFORCE.load(
            self.trained_agent,
            env,
            # Keep the number of transitions per batch with another number of environments
            n_steps=self.saved["n_steps"] and self.saved["n_steps"] * self.saved["n_envs"] // env.num_envs,
            device=self.device,
            tensorboard_log=self.tensorboard_log,
            verbose=self.verbose,
            workers=self.workers or None,
        )
        self.n_timesteps -= model.num_timesteps
        for callback in self.callbacks:
            if isinstance(callback, EvalCallback):
                restore_evaluations(callback, f"{self.save_path}/evaluations.npz", model.num_timesteps)
                # Evaluations are due every eval_freq calls
                callback.n_calls = model.num_timesteps // env.num_envs
        return model

    def _maybe_normalize(self, env: VecEnv, eval_env: bool) -> VecEnv:
        statistics = statistics_path(Path(self.trained_agent)) if self.resumes else None
        if statistics is None or not statistics.exists():
            return super()._maybe_normalize(env, eval_env)
        env = VecNormalize.load(str(statistics), env)
        if eval_env:
            env.training = env.norm_reward = False
        return env

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        command = Path(self.params_path, "command.txt")
        if not self.resumes:
            super()._save_config(saved_hyperparams)
            if self.algo == ALGO:
                # rl_zoo3 does not quote the words
                command.write_text(shlex.join(sys.orig_argv))
            return
        # A resumed run keeps its seed, command and hyperparameters, except for the number of timesteps
        arguments = saved_arguments(self.save_path)
        n_timesteps = getattr(self.args, "n_timesteps", -1)
        if arguments and self.n_timesteps > 0 and n_timesteps != arguments["n_timesteps"]:
            changed = yaml.dump(arguments | dict(n_timesteps=n_timesteps))
            write_atomically(Path(self.params_path, "args.yml"), changed.encode())
            if command.exists():
                parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
                parser.add_argument("-n", "--n-timesteps")
                _, others = parser.parse_known_args(shlex.split(command.read_text()))
                write_atomically(command, shlex.join([*others, "-n", str(n_timesteps)]).encode())

    def learn(self, model: BaseAlgorithm) -> None:
        if not self.resumes:
            return super().learn(model)
        if self.n_timesteps <= 0:
            return print(f"The run is complete, with {model.num_timesteps:,} timesteps: -n sets a larger total number")
        learn = functools.partialmethod(REINFORCE.learn, reset_num_timesteps=False)
        with mock.patch.object(REINFORCE, "learn", learn):
            super().learn(model)


def is_checkpoint(path: str) -> bool:
    """Return whether a path has a file name of :class:`~sb3_reinforce.tools.checkpoints.AtomicCheckpointCallback`."""
    return checkpoint_pattern().fullmatch(os.path.basename(path)) is not None


def _program() -> list[str]:
    """Words that start this program in the shell: the installed script, if it is found, or a module of this interpreter."""
    python = Path(sys.executable)
    script = shutil.which("sb3-reinforce")
    if script is not None and Path(script).parent.absolute() == python.parent:
        return ["sb3-reinforce"]
    return [str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python), "-m", "sb3_reinforce"]


def find_config(name: str | None) -> str:
    """
    Find the hyperparameters.

    :param name: value of ``--conf-file``: a path, a Python module, or a file of this package ("article.yml" or
        "reinforce.yml"). None for "reinforce.yml"
    :return: path or module for rl_zoo3
    """
    package = Path(__file__).parent.parent
    # Inside the package in the wheel, at the top level of the repository
    folder = next(path for path in (package / "zoo_configs", package.parent / "zoo_configs") if path.is_dir())
    if name is None:
        return str(folder / "reinforce.yml")
    return str(folder / name) if (folder / name).is_file() and not Path(name).exists() else name


def sample_reinforce_params(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sample hyperparameters of REINFORCE.

    :param trial: Optuna trial
    :param n_actions: number of action dimensions, 0 if actions are not continuous
    :param n_envs: unused
    :param additional_args: unused
    :return: arguments of the algorithm
    """
    sampled_params = {
        "n_steps": trial.suggest_int("n_steps", 128, 4096, log=True),
        "n_episodes": trial.suggest_int("n_episodes", 2, 20, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.001, 0.1, log=True),
        "target_kl": trial.suggest_categorical("target_kl", ["auto", 0.003, 0.01, 0.03]),
        "cg_damping": trial.suggest_categorical("cg_damping", ["auto", 0.1, 1.0, 10.0]),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 0.1, log=True),
        "baseline": trial.suggest_categorical("baseline", ["linear", "random_features"]),
        "baseline_memory": trial.suggest_float("baseline_memory", 0.0, 0.9),
        "bootstrap_timeouts": trial.suggest_categorical("bootstrap_timeouts", [False, True]),
        "normalize_observations": trial.suggest_categorical("normalize_observations", [False, True]),
        "net_arch": trial.suggest_categorical("net_arch", list(_NET_ARCHS)),
        "activation_fn": trial.suggest_categorical("activation_fn", list(_ACTIVATION_FNS)),
    }
    if n_actions > 0:
        sampled_params["log_std_init"] = trial.suggest_float("log_std_init", -2.0, 1.0)
    # Shown by Optuna
    trial.set_user_attr("gamma", 1 - sampled_params["one_minus_gamma"])
    return convert_reinforce_params(sampled_params)


def convert_reinforce_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Convert sampled parameters.

    :param sampled_params: parameters of a trial
    :return: arguments of the algorithm
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
    """Let the subprocesses of rl_zoo3 use the commands of this package, and optionally ffmpeg from imageio-ffmpeg."""
    call, path = subprocess.call, os.environ.get("PATH", "")
    # enjoy.py is only in the repository of rl_zoo3
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
    """Make huggingface_sb3 3.x compatible with rl_zoo3."""
    import huggingface_sb3
    from huggingface_hub.errors import HfHubHTTPError
    from requests.exceptions import HTTPError

    load = huggingface_sb3.load_from_hub

    def load_from_hub(repo_id: str, filename: str) -> str:
        try:
            return load(repo_id, filename)
        except HfHubHTTPError as error:
            # rl_zoo3 catches HTTPError for optional files, such as the statistics of VecNormalize
            raise HTTPError(str(error)) from error

    huggingface_sb3.load_from_hub = load_from_hub
    # A plain import would return the function of the same name
    push_to_hub: Any = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(push_to_hub, "generate_metadata"):
        push_to_hub.generate_metadata = lambda *args: push_to_hub._generate_metadata(*args).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="sb3-reinforce",
        description="RL Zoo's commands with REINFORCE, and HTML reports. Options: `sb3-reinforce COMMAND --help`",
    )
    commands = [*COMMANDS, "report"]
    parser.add_argument("command", metavar="COMMAND", choices=commands, help=", ".join(commands))
    # argparse counts the remainder as required
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the command").required = False
    try:
        # Errors are one line
        with mock.patch.object(argparse.ArgumentParser, "print_usage", lambda *args: None):
            arguments = parser.parse_args()
            _run(arguments.command, arguments.options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if _needs_traceback(error):
            raise
        raise SystemExit(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _needs_traceback(error: Exception) -> bool:
    """Return whether an error comes from code of the user: an environment, a callback or a policy."""
    frames = traceback.extract_tb(error.__traceback__)
    names = {frame.name for frame in frames}
    # A log may have no folder
    is_running = not names.isdisjoint({"learn", "reset", "step"}) and "configure_logger" not in names
    is_ours = Path(frames[-1].filename).is_relative_to(Path(__file__).parent.parent)
    # Notes are about environments
    return (is_running and not is_ours) or hasattr(error, "__notes__")


def _run(command: str, options: list[str]) -> None:
    if command == "report":
        # Does not need rl_zoo3
        return importlib.import_module("sb3_reinforce.tools.report").main(options)
    register()
    if command != "train":
        # rl_zoo3 loads models with a learning rate of 0
        warnings.filterwarnings("ignore", "learning_rate of no effect")
    sys.argv = [f"sb3-reinforce {command}", *COMMANDS[command], *options]
    if command not in _SCRIPTS:
        return getattr(importlib.import_module("rl_zoo3.cli"), command)()
    if command.endswith("_hub"):
        _patch_hub()
    with _patch_subprocesses(with_ffmpeg=command == "record_training"):
        runpy.run_module(f"rl_zoo3.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
