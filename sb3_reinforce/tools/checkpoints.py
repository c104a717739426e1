"""Checkpoints from which training resumes exactly."""

import glob
import io
import json
import os
import pickle
import re
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from sb3_reinforce.episodes.checks import check_count, read_model_file


class AtomicCheckpointCallback(BaseCallback):
    """
    Saves checkpoints of ``REINFORCE`` from which training resumes exactly.

    Unlike with SB3's ``CheckpointCallback``, a file is complete or absent, whatever happens during writing, and old files are
    removed. At SIGINT (Ctrl-C) or SIGTERM, the run finishes its step, saves, prints how to resume, and exits; a second signal
    acts at once. :func:`newest_checkpoint` finds the file to load.

    A resumed run with this callback first removes the rows of its ``Monitor`` files after the checkpoint (of environments of
    this process, made with ``monitor_kwargs=dict(override_existing=False)``), and writes a SessionLog START event to its
    TensorBoard log, at which TensorBoard drops the events after the checkpoint.

    A checkpoint that cannot be written, e.g. on a full disk, is reported, and training continues. Put this callback last in a
    list: callbacks behind it are not called at the end of a training that a signal has stopped.

    :param save_path: Folder of the checkpoints, created if it does not exist
    :param every_n_updates: Number of updates between checkpoints, at least 1
    :param every_n_minutes: Number of minutes between checkpoints, above 0, if ``every_n_updates`` is None. Checkpoints are
        saved between two rollouts, and at the end of training
    :param keep: Number of checkpoints to keep, at least 1
    :param name_prefix: Prefix of the file names, as in SB3; statistics of ``VecNormalize`` are saved next to them
    :param resume_command: Command that resumes the run, to print when it is stopped. None: a line of Python
    :param verbose: 1 to print the saved files
    :raises ValueError: if an argument is out of its range
    """

    model: Any

    def __init__(
        self,
        save_path: str | Path,
        every_n_updates: int | None = None,
        every_n_minutes: float = 5.0,
        keep: int = 3,
        name_prefix: str = "checkpoint",
        resume_command: str | None = None,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        check_count("every_n_updates", every_n_updates)
        if not every_n_minutes > 0:
            raise ValueError(f"every_n_minutes must be above 0, got every_n_minutes={every_n_minutes!r}")
        if keep is None:
            raise ValueError("keep must be an integer of at least 1, got keep=None")
        check_count("keep", keep)
        self.save_path = Path(save_path)
        self.every_n_updates = every_n_updates
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self.name_prefix = name_prefix
        self.resume_command = resume_command
        # Previous signal handlers, and the signal that was received
        self._handlers: dict[int, Any] = {}
        self._signal: int | None = None

    def _init_callback(self) -> None:
        self.save_path.mkdir(parents=True, exist_ok=True)
        # Unfinished files of killed processes
        for path in self.save_path.glob(f".{glob.escape(self.name_prefix)}_*.tmp"):
            path.unlink(missing_ok=True)

    def _on_training_start(self) -> None:
        self._truncate_logs()
        self._monitors = monitor_states(self.training_env)
        self._last_save = self.model._n_updates, time.monotonic()
        self._newest: tuple[Path, int] | None = None
        self._signal = None
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def _on_rollout_start(self) -> None:
        self._monitors = monitor_states(self.training_env)
        n_updates, moment = self._last_save
        if self.every_n_updates is not None:
            is_due = self.model._n_updates - n_updates >= self.every_n_updates
        else:
            is_due = time.monotonic() - moment >= 60 * self.every_n_minutes
        if is_due:
            self._save()

    def _on_step(self) -> bool:
        return self._signal is None

    def _on_training_end(self) -> None:
        if self.model._rollout_start is None:
            self._monitors = monitor_states(self.training_env)
        self._save()
        self.release_signals()
        number, self._signal = self._signal, None
        if number is None:
            return
        line = f"Stopped by {signal.Signals(number).name}."
        if self._newest is not None:
            path, n_steps = self._newest
            # SB3's own callbacks read this private attribute
            n_left = self.model._total_timesteps - n_steps
            command = f"REINFORCE.load({str(path)!r}, env).learn({n_left}, reset_num_timesteps=False)"
            line += f" To resume: {self.resume_command or command}"
        print(line, flush=True)
        if number == signal.SIGINT:
            raise KeyboardInterrupt(line)
        if callable(self._handlers[number]):
            signal.raise_signal(number)
        raise SystemExit(128 + number)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        self.release_signals()

    def release_signals(self) -> None:
        """Restore the previous signal handlers. ``REINFORCE.learn()`` calls this after an error."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _save(self) -> None:
        model, n_steps = self.model, _num_timesteps(self.model)
        content = io.BytesIO()
        logs = [Path(output.writer.log_dir).name for output in _tensorboard_outputs(self.logger)]
        model._log_state = dict(n_steps=n_steps, monitors=self._monitors, tensorboard=logs)
        try:
            model.save(content, include=["_log_state"])
        finally:
            del model._log_state
        path = self.save_path / f"{self.name_prefix}_{n_steps}_steps.zip"
        try:
            if (normalize := model.get_vec_normalize_env()) is not None:
                write_atomically(statistics_path(path), pickle.dumps(normalize))
            write_atomically(path, content.getvalue())
        except OSError as error:
            if not path.exists():
                statistics_path(path).unlink(missing_ok=True)
            print(f"The checkpoint {path} was not saved, and training continues: {error}", flush=True)
            return
        self._last_save = model._n_updates, time.monotonic()
        self._newest = path, n_steps
        if self.verbose >= 1:
            print(f"Saved {path}")
        # Files with more steps belong to another run
        for _, old in [entry for entry in _checkpoints(self.save_path, self.name_prefix) if entry[0] <= n_steps][: -self.keep]:
            old.unlink(missing_ok=True)
            statistics_path(old).unlink(missing_ok=True)

    def _truncate_logs(self) -> None:
        state = vars(self.model).pop("_log_state", None)
        # The model has been trained since it was loaded
        if state is None or state["n_steps"] != self.model.num_timesteps:
            return
        for monitor, (name, size, header) in zip(_file_monitors(self.training_env), state["monitors"], strict=False):
            path = Path(monitor.results_writer.file_handler.name)
            # Another header means another file
            if path.name == name and path.exists() and path.stat().st_size >= size and _header(path) == header:
                os.truncate(path, size)
                # Times are relative to the start of the file
                if header.startswith("#"):
                    monitor.t_start = json.loads(header[1:])["t_start"]
        for output in _tensorboard_outputs(self.logger):
            # SB3 continues in the latest folder, which may belong to another run
            if Path(output.writer.log_dir).name in state["tensorboard"]:
                event = Event(session_log=SessionLog(status=SessionLog.START))
                output.writer._get_file_writer().add_event(event, state["n_steps"] + 1)


def newest_checkpoint(folder: str | Path, name_prefix: str = "checkpoint") -> Path | None:
    """
    Find the complete checkpoint with the most steps.

    :param folder: ``save_path`` of an :class:`AtomicCheckpointCallback`
    :param name_prefix: ``name_prefix`` of the callback
    :return: path for ``REINFORCE.load()``, None if there is none
    """
    for _, path in reversed(_checkpoints(Path(folder), name_prefix)):
        try:
            read_model_file(path)
        except (ValueError, OSError):
            continue
        return path
    return None


def write_atomically(path: Path, content: bytes) -> None:
    """
    Write a file that is complete or absent, even after a loss of power.

    :raises OSError: if it cannot be written; a previous file is left alone
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def monitor_states(env: Any) -> list[tuple[str, int, str]]:
    """Name, size in bytes and header of each ``Monitor`` file of the environments of this process."""
    paths = [Path(monitor.results_writer.file_handler.name) for monitor in _file_monitors(env)]
    return [(path.name, path.stat().st_size, _header(path)) if path.exists() else (path.name, 0, "") for path in paths]


def _header(path: Path) -> str:
    with open(path, newline="") as file:
        return file.readline()


def restore_evaluations(callback: EvalCallback, path: str | Path, last_step: int) -> int:
    """
    Continue the evaluations of an earlier run.

    :param callback: callback whose results, and best result, are read from the file
    :param path: ``evaluations.npz`` of the run, which may be missing
    :param last_step: step of the checkpoint; later evaluations are ignored, because they are repeated
    :return: step of the latest evaluation, 0 if there is none
    """
    try:
        with open(path, "rb") as file, np.load(file) as saved:
            n = int(np.sum(saved["timesteps"] <= last_step))
            callback.evaluations_timesteps = saved["timesteps"][:n].tolist()
            callback.evaluations_results = saved["results"][:n].tolist()
            callback.evaluations_length = saved["ep_lengths"][:n].tolist()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        # Incomplete, or never written
        return 0
    callback.best_mean_reward = max((float(np.mean(returns)) for returns in callback.evaluations_results), default=-np.inf)
    return max(callback.evaluations_timesteps, default=0)


def _file_monitors(env: Any) -> Iterator[Any]:
    """The ``Monitor`` and ``VecMonitor`` wrappers that write files."""
    wrappers = [env, *getattr(env.unwrapped, "envs", [])]
    while wrappers:
        wrapper = wrappers.pop(0)
        if vars(wrapper).get("results_writer") is not None:
            yield wrapper
        wrappers += [inner for name in ("env", "venv") if (inner := vars(wrapper).get(name)) is not None]


def _tensorboard_outputs(logger: Any) -> list[TensorBoardOutputFormat]:
    return [output for output in logger.output_formats if isinstance(output, TensorBoardOutputFormat)]


def _checkpoints(folder: Path, name_prefix: str) -> list[tuple[int, Path]]:
    """Steps and path of each checkpoint, sorted by steps."""
    matches = ((re.fullmatch(rf"{re.escape(name_prefix)}_(\d+)_steps\.zip", path.name), path) for path in folder.glob("*.zip"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def statistics_path(checkpoint: Path) -> Path:
    """Path of the statistics of ``VecNormalize``, named as by SB3's ``CheckpointCallback``."""
    prefix, n_steps = checkpoint.stem.removesuffix("_steps").rsplit("_", 1)
    return checkpoint.with_name(f"{prefix}_vecnormalize_{n_steps}_steps.pkl")


def _num_timesteps(model: Any) -> int:
    """Steps of a model as it is saved, without an unfinished rollout."""
    return (model._rollout_start or vars(model))["num_timesteps"]
