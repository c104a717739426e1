"""Checkpoints from which training goes on as if it had not stopped."""

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

from sb3_reinforce.episodes.checks import check_count
from sb3_reinforce.episodes.files import read_model_file


class AtomicCheckpointCallback(BaseCallback):
    """
    Saves checkpoints of ``REINFORCE`` from which training goes on as if it had not stopped.

    Unlike with SB3's ``CheckpointCallback``, a file is there in full or not at all, whatever happens while it is written.
    Older ones are removed. A run that gets SIGINT (Ctrl-C) or SIGTERM finishes its step, saves, says how to go on, and exits;
    a second signal acts at once. :func:`newest_checkpoint` finds the file to load.

    When a run goes on from a checkpoint with this callback, what the logs have beyond it comes again, and is removed first:
    rows of ``Monitor`` files (of environments of this process, made with ``monitor_kwargs=dict(override_existing=False)``),
    and events in the folder of the TensorBoard log.

    A checkpoint that cannot be written (a full disk) is reported, and training goes on. Put this callback last in a list: the
    others behind it do not hear of the end of a training that a signal has stopped.

    :param save_path: folder of the checkpoints, made if it is not there
    :param every_n_updates: updates from one checkpoint to the next, at least 1
    :param every_n_minutes: minutes from one checkpoint to the next, above 0, if not ``every_n_updates``. Either is looked at
        between two rollouts; there is one more at the end of training
    :param keep: how many checkpoints to keep, at least 1
    :param name_prefix: first part of the names of the files, as in SB3; statistics of ``VecNormalize`` are saved beside them
    :param resume_command: what to do to go on, for the message of a run that was stopped. None: a line of Python
    :param verbose: 1 to print what is saved
    :raises ValueError: when an argument is out of its range
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
        # What signals did before this callback, and the one that has come
        self._handlers: dict[int, Any] = {}
        self._signal: int | None = None

    def _init_callback(self) -> None:
        self.save_path.mkdir(parents=True, exist_ok=True)
        # What a process that was killed has not finished
        for path in self.save_path.glob(f".{glob.escape(self.name_prefix)}_*.tmp"):
            path.unlink(missing_ok=True)

    def _on_training_start(self) -> None:
        self._drop_what_comes_again()
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
            # Private, but what SB3's own callbacks look at
            n_left = self.model._total_timesteps - n_steps
            command = f"REINFORCE.load({str(path)!r}, env).learn({n_left}, reset_num_timesteps=False)"
            line += f" To go on: {self.resume_command or command}"
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
        """Let signals do what they did before training. ``REINFORCE.learn()`` calls this when an error ends it."""
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
            print(f"The checkpoint {path} was not saved, and training goes on: {error}", flush=True)
            return
        self._last_save = model._n_updates, time.monotonic()
        self._newest = path, n_steps
        if self.verbose >= 1:
            print(f"Saved {path}")
        # Those of more steps are from another run
        for _, old in [entry for entry in _checkpoints(self.save_path, self.name_prefix) if entry[0] <= n_steps][: -self.keep]:
            old.unlink(missing_ok=True)
            statistics_path(old).unlink(missing_ok=True)

    def _drop_what_comes_again(self) -> None:
        state = vars(self.model).pop("_log_state", None)
        # Not what a model has learned since it was loaded
        if state is None or state["n_steps"] != self.model.num_timesteps:
            return
        for monitor, (name, size, header) in zip(_file_monitors(self.training_env), state["monitors"], strict=False):
            path = Path(monitor.results_writer.file_handler.name)
            # Another header: it was begun anew
            if path.name == name and path.exists() and path.stat().st_size >= size and _header(path) == header:
                os.truncate(path, size)
                # Times count from the beginning of the file
                if header.startswith("#"):
                    monitor.t_start = json.loads(header[1:])["t_start"]
        for output in _tensorboard_outputs(self.logger):
            folder = Path(output.writer.log_dir)
            # SB3 goes on in the latest folder, which may be that of another run
            if folder.name in state["tensorboard"]:
                try:
                    drop_events(folder, state["n_steps"])
                except OSError as error:
                    print(f"Events after the checkpoint stay in {folder}: {error}", flush=True)


def newest_checkpoint(folder: str | Path, name_prefix: str = "checkpoint") -> Path | None:
    """
    Find the checkpoint of the most steps that is a complete model file.

    :param folder: ``save_path`` of an :class:`AtomicCheckpointCallback`
    :param name_prefix: that of the callback
    :return: a path for ``REINFORCE.load()``, None if there is none
    """
    for _, path in reversed(_checkpoints(Path(folder), name_prefix)):
        try:
            read_model_file(path, {})
        except (ValueError, OSError):
            continue
        return path
    return None


def write_atomically(path: Path, content: bytes) -> None:
    """
    Write a file that is there in full or not at all, even after a loss of power.

    :raises OSError: when it cannot be written; what was there before is still there
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
    """Name, size in bytes and first line of each ``Monitor`` file of the environments of this process."""
    paths = [Path(monitor.results_writer.file_handler.name) for monitor in _file_monitors(env)]
    return [(path.name, path.stat().st_size, _header(path)) if path.exists() else (path.name, 0, "") for path in paths]


def _header(path: Path) -> str:
    with open(path, newline="") as file:
        return file.readline()


def restore_evaluations(callback: EvalCallback, path: str | Path, last_step: int) -> int:
    """
    Let an ``EvalCallback`` go on after the evaluations of an earlier run.

    :param callback: the callback; its results, and the best of them, are those of the file
    :param path: ``evaluations.npz`` of the run, which need not be there
    :param last_step: later evaluations are left out: they come again
    :return: step of the latest evaluation, 0 if there is none
    """
    try:
        with np.load(path) as saved:
            n = int(np.sum(saved["timesteps"] <= last_step))
            callback.evaluations_timesteps = saved["timesteps"][:n].tolist()
            callback.evaluations_results = saved["results"][:n].tolist()
            callback.evaluations_length = saved["ep_lengths"][:n].tolist()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        # Cut short, or never written
        return 0
    callback.best_mean_reward = max((float(np.mean(returns)) for returns in callback.evaluations_results), default=-np.inf)
    return max(callback.evaluations_timesteps, default=0)


def drop_events(folder: Path, last_step: int) -> None:
    """Remove what a TensorBoard log has after a step, and events that were cut short."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in folder.glob(".events.out.tfevents.*.tmp"):
        path.unlink()
    for path in folder.glob("events.out.tfevents.*"):
        events = list(RawEventFileLoader(str(path)).Load())
        kept = [event for event in events if Event.FromString(event).step <= last_step]
        content = io.BytesIO()
        writer = RecordWriter(content)
        for event in kept:
            writer.write(event)
        # Not that of the run that begins
        if len(kept) < len(events) or content.tell() < path.stat().st_size:
            write_atomically(path, content.getvalue())


def _file_monitors(env: Any) -> Iterator[Any]:
    """``Monitor`` and ``VecMonitor`` that write files."""
    wrappers = [env, *getattr(env.unwrapped, "envs", [])]
    while wrappers:
        wrapper = wrappers.pop(0)
        if vars(wrapper).get("results_writer") is not None:
            yield wrapper
        wrappers += [inner for name in ("env", "venv") if (inner := vars(wrapper).get(name)) is not None]


def _tensorboard_outputs(logger: Any) -> list[TensorBoardOutputFormat]:
    return [output for output in logger.output_formats if isinstance(output, TensorBoardOutputFormat)]


def _checkpoints(folder: Path, name_prefix: str) -> list[tuple[int, Path]]:
    """Steps and path of each checkpoint, fewest steps first."""
    matches = ((re.fullmatch(rf"{re.escape(name_prefix)}_(\d+)_steps\.zip", path.name), path) for path in folder.glob("*.zip"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def statistics_path(checkpoint: Path) -> Path:
    """Where the statistics of ``VecNormalize`` are, as SB3's ``CheckpointCallback`` names it."""
    prefix, n_steps = checkpoint.stem.removesuffix("_steps").rsplit("_", 1)
    return checkpoint.with_name(f"{prefix}_vecnormalize_{n_steps}_steps.pkl")


def _num_timesteps(model: Any) -> int:
    """Steps of a model as it is saved: without those of a rollout that is not finished."""
    return (model._rollout_start or vars(model))["num_timesteps"]
