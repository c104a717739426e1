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
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat
from stable_baselines3.common.utils import get_latest_run_id
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from sb3_reinforce.episodes.checks import check_count, read_model_file


class AtomicCheckpointCallback(BaseCallback):
    """
    Saves checkpoints of ``REINFORCE`` from which training resumes exactly.

    Unlike with SB3's ``CheckpointCallback``, a file is complete or absent, whatever happens during writing, and old files are
    removed. File names contain the ``run_id`` of the model, so several runs may share a folder. At SIGINT (Ctrl-C) or SIGTERM,
    the run leaves the rollout, or finishes the update, saves, prints how to resume, and exits; a second signal acts at once.
    :func:`newest_checkpoint` finds the file to load.

    A resumed run with this callback first removes the rows of its ``Monitor`` files after the checkpoint (of environments of
    this process, made with ``monitor_kwargs=dict(override_existing=False)``), continues in its own TensorBoard folder, and
    writes a SessionLog START event, at which TensorBoard drops the events after the checkpoint.

    A checkpoint or log that cannot be written, e.g. on a full disk, is reported once, and training continues; the next
    interval tries again. Inside an ``EveryNTimesteps`` or ``EvalCallback``, this callback saves when it is called, and at the
    end; ``Monitor`` files are then not shortened when the run is resumed.

    :param save_path: Folder of the checkpoints, created if it does not exist
    :param every_n_updates: Number of updates between checkpoints, at least 1
    :param every_n_minutes: Number of minutes between checkpoints, above 0, if ``every_n_updates`` is None. Checkpoints are
        saved between two rollouts, and at the end of ``learn()``, also after an error
    :param keep: Number of checkpoints of this run to keep, at least 1
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
        # Environments and callbacks may change the current folder
        self.save_path = Path(save_path).absolute()
        self.every_n_updates = every_n_updates
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self.name_prefix = name_prefix
        self.resume_command = resume_command
        self._is_training = False
        # Previous signal handlers, the signal that was received, and the exception that ends training
        self._handlers: dict[int, Any] = {}
        self._signal: int | None = None
        self._stop: BaseException | None = None
        self._newest: tuple[Path, int] | None = None
        # State of the Monitor files at the start of a rollout
        self._monitors: list[tuple[str, int, str]] = []
        self._noted_rollout: dict[str, Any] | None = None
        # What has failed and was not repeated successfully
        self._failing: set[str] = set()
        self._guarded: list[tuple[Any, str]] = []
        self._broken: list[TensorBoardOutputFormat] = []

    def _on_training_start(self) -> None:
        self._is_training, self._signal, self._stop = True, None, None
        self._last_save = self.model._n_updates, time.monotonic()
        self._newest, self._monitors = None, []
        self._failing.clear()
        with self._reported(f"The folder {self.save_path} was not created"):
            self.save_path.mkdir(parents=True, exist_ok=True)
        state = vars(self.model).pop("_log_state", None)
        if state is not None and state["n_steps"] != self.model.num_timesteps:
            # The model has been trained since it was loaded
            state = None
        with self._reported("The Monitor files were not continued"):
            self._continue_monitors(state)
        with self._reported("The TensorBoard log was not continued"):
            self._continue_tensorboard(state)
        self._guard_logs()
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def _on_rollout_start(self) -> None:
        self._note_monitors()
        self._end_if_stopped()
        n_updates, moment = self._last_save
        if self.every_n_updates is not None:
            is_due = self.model._n_updates - n_updates >= self.every_n_updates
        else:
            is_due = time.monotonic() - moment >= 60 * self.every_n_minutes
        if is_due:
            self._save()

    def _on_step(self) -> bool:
        # An EventCallback only calls this, and not at each step
        if self.parent is not None:
            self._save()
        return True

    def update_child_locals(self, locals_: dict[str, Any]) -> None:
        """Stop before the callbacks of a step if a signal was received. Unlike ``on_step()``, this is called at each step."""
        self._end_if_stopped()

    def on_learn_end(self) -> None:
        """Save the last checkpoint and restore the signal handlers. ``REINFORCE.learn()`` calls this, also after an error."""
        if not self._is_training:
            return
        self._is_training = False
        try:
            # A script that failed at once should not resume, with its old arguments, from a model that has learned nothing
            if self._stop is not None or self.model._n_updates > 0:
                self._save()
        finally:
            self._release_signals()
            while self._guarded:
                writer, name = self._guarded.pop()
                vars(writer).pop(name, None)
        number, stop, self._stop = self._signal, self._stop, None
        if number is None or stop is None:
            return
        line = f"Stopped by {signal.Signals(number).name}."
        if self._newest is not None:
            path, n_steps = self._newest
            # SB3's own callbacks read this private attribute
            n_left = self.model._total_timesteps - n_steps
            command = f"REINFORCE.load({str(path)!r}, env).learn({n_left}, reset_num_timesteps=False)"
            line += f" To resume: {self.resume_command or command}"
        _print(line)
        if number == signal.SIGINT:
            stop.args = (line,)
        elif callable(self._handlers[number]):
            self._handlers[number](number, None)
        raise stop

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        self._stop = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        self._release_signals()
        # The buffer is full during an update, which is finished first
        if self._is_training and not self.model.rollout_buffer.full:
            raise self._stop

    def _end_if_stopped(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _release_signals(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def _reported(self, failure: str, key: str | None = None) -> Iterator[None]:
        """Report an error instead of raising it, once until the same thing succeeds."""
        key = key or failure
        try:
            yield
        except Exception as error:
            if key not in self._failing:
                _print(f"{failure}, and training continues: {type(error).__name__}: {error}")
            self._failing.add(key)
        else:
            self._failing.discard(key)

    def _save(self) -> None:
        n_steps, start = _num_timesteps(self.model), self.model._rollout_start
        # Inside an EventCallback, the start of a rollout is not seen. Elsewhere, no step was taken since it started
        if start is None or (start is not self._noted_rollout and self.parent is None):
            self._note_monitors()
        path = self.save_path / f"{self.name_prefix}_{self.model.run_id}_{n_steps}_steps.zip"
        self._last_save = self.model._n_updates, time.monotonic()
        with self._reported(f"The checkpoint {path} was not saved", "checkpoint"):
            saved, content = copy(self.model), io.BytesIO()
            saved._log_state = dict(n_steps=n_steps, monitors=self._monitors)
            saved.save(content, include=["_log_state"])
            self.save_path.mkdir(parents=True, exist_ok=True)
            if (normalize := self.model.get_vec_normalize_env()) is not None:
                write_atomically(statistics_path(path), pickle.dumps(normalize))
            write_atomically(path, content.getvalue())
            self._newest = path, n_steps
            if self.verbose >= 1:
                _print(f"Saved {path}")
            with self._reported(f"Old checkpoints in {self.save_path} were not removed"):
                self._remove_old(n_steps)
        while self._broken:
            # TensorBoard's writer does not recover from an error: the next value begins another file
            writer = self._broken.pop().writer
            writer.file_writer = writer.all_writers = None

    def _remove_old(self, n_steps: int) -> None:
        """Remove old checkpoints of this run, their statistics, and files that a killed process has not finished."""
        own = re.compile(rf"\.?{re.escape(f'{self.name_prefix}_{self.model.run_id}')}_(?:vecnormalize_)?(\d+)_steps\.(.+)")
        files = [(int(match[1]), path) for path in self.save_path.iterdir() if (match := own.fullmatch(path.name))]
        # A run that was resumed from an older checkpoint has not reached the newer ones
        kept = sorted({steps for steps, path in files if path.suffix == ".zip" and steps <= n_steps})[-self.keep :]
        errors = []
        for steps, path in files:
            if steps < kept[0]:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _note_monitors(self) -> None:
        self._monitors, self._noted_rollout = [], self.model._rollout_start
        with self._reported("The Monitor files were not read"):
            self._monitors = monitor_states(self.training_env)

    def _continue_monitors(self, state: dict[str, Any] | None) -> None:
        """Remove the rows after the checkpoint that was loaded."""
        states = [] if state is None else state["monitors"]
        for monitor, (name, size, header) in zip(_file_monitors(self.training_env), states, strict=False):
            path = Path(monitor.results_writer.file_handler.name)
            # Another header means another file
            if path.name == name and path.exists() and _header(path) == header:
                with open(path, "rb") as file:
                    # After a loss of power, the file may be shorter than noted, and end within a row
                    os.truncate(path, file.read(size).rfind(b"\n") + 1)
                # Times are relative to the start of the file
                if header.startswith("#"):
                    monitor.t_start = json.loads(header[1:])["t_start"]

    def _continue_tensorboard(self, state: dict[str, Any] | None) -> None:
        """Write to the folder of this run, and let TensorBoard drop the events after the checkpoint that was loaded."""
        for index, output in enumerate(self.logger.output_formats):
            if isinstance(output, TensorBoardOutputFormat):
                is_own, output = self._own_tensorboard(output)
                self.logger.output_formats[index] = output
                if state is not None and is_own:
                    event = Event(session_log=SessionLog(status=SessionLog.START))
                    output.writer._get_file_writer().add_event(event, state["n_steps"] + 1)

    def _own_tensorboard(self, output: TensorBoardOutputFormat) -> tuple[bool, TensorBoardOutputFormat]:
        """
        Return whether an output writes to the folder of this run, and an output that does. SB3 continues in the latest folder,
        which may belong to another run. The first event file tells whose a folder is: the model keeps its name.
        """
        model, file = self.model, _event_file(output)
        folder, first = file.parent.absolute(), vars(self.model).get("_event_file")
        if first is None or not (folder / first).exists():
            if {path.name for path in folder.glob("events.out.tfevents.*")} == {file.name}:
                first = model._event_file = file.name
            elif model._custom_logger:
                return False, output
            else:
                name = folder.name.rpartition("_")[0]
                new = folder.with_name(f"{name}_{get_latest_run_id(str(folder.parent), name) + 1}")
                known = folder.parent.glob(f"*/{glob.escape(first)}") if first is not None else iter(())
                folder = next((path.parent for path in known), new)
        if folder != file.parent:
            output.close()
            file.unlink()
            output = TensorBoardOutputFormat(str(folder))
            if first is None or not (folder / first).exists():
                model._event_file = _event_file(output).name
        return True, output

    def _guard_logs(self) -> None:
        """Let training continue if a row of a log cannot be written."""
        writers = [(output, "write") for output in self.logger.output_formats if hasattr(output, "write")]
        writers += [(monitor.results_writer, "write_row") for monitor in _file_monitors(self.training_env)]
        for writer, name in writers:
            setattr(writer, name, partial(self._write, writer, getattr(writer, name)))
            self._guarded.append((writer, name))

    def _write(self, writer: Any, write: Any, *args: Any, **kwargs: Any) -> None:
        with self._reported(f"A log was not written ({type(writer).__name__})"):
            try:
                write(*args, **kwargs)
            except Exception:
                if isinstance(writer, TensorBoardOutputFormat):
                    self._broken.append(writer)
                raise


def newest_checkpoint(folder: str | Path, name_prefix: str = "checkpoint", run: str | None = None) -> Path | None:
    """
    Find the complete checkpoint with the most steps. Damaged files and files of other algorithms are reported and
    skipped.

    :param folder: ``save_path`` of an :class:`AtomicCheckpointCallback`
    :param name_prefix: ``name_prefix`` of the callback
    :param run: ``run_id`` of the model, if the folder has checkpoints of several runs
    :return: path for ``REINFORCE.load()``, None if there is none
    :raises ValueError: if the folder has checkpoints of several runs, and ``run`` is None
    :raises OSError: if the folder, or a checkpoint in it, cannot be read
    """
    newest: dict[str | None, Path] = {}
    for _, named, path in reversed(_checkpoints(Path(folder), name_prefix)):
        if named in newest:
            continue
        try:
            _, saved = read_model_file(path)
        except FileNotFoundError:
            # Its run has removed it
            continue
        except ValueError as error:
            _print(f"Skipped: {error}")
            continue
        newest.setdefault(str(saved.get("run_id")), path)
    if run is None and len(newest) > 1:
        runs = ", ".join(f"run={name!r} ({path.name})" for name, path in list(newest.items())[:8])
        raise ValueError(f"{folder} has checkpoints of {len(newest)} runs, give one of them to newest_checkpoint(): {runs}")
    return next(iter(newest.values()), None) if run is None else newest.get(run)


def write_atomically(path: Path, content: bytes) -> None:
    """
    Write a file that is complete or absent, even after a loss of power if the file system supports it.

    :raises OSError: if it cannot be written; a previous file is left alone
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(unfinished, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    # Not all file systems can do this, and the file is there
    with suppress(OSError):
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
    :raises OSError: if the file is there, but cannot be read
    """
    try:
        with open(path, "rb") as file, np.load(file) as saved:
            n = int(np.sum(saved["timesteps"] <= last_step))
            callback.evaluations_timesteps = saved["timesteps"][:n].tolist()
            callback.evaluations_results = saved["results"][:n].tolist()
            callback.evaluations_length = saved["ep_lengths"][:n].tolist()
    except (FileNotFoundError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        # Never written, empty or incomplete
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


def _event_file(output: TensorBoardOutputFormat) -> Path:
    return Path(output.writer._get_file_writer().event_writer._file_name)


def checkpoint_pattern(name_prefix: str = "checkpoint") -> re.Pattern[str]:
    """Pattern of the file names of checkpoints, with the run (None: not part of the name) and the steps."""
    return re.compile(rf"{re.escape(name_prefix)}_(?:([0-9a-f]{{8}})_)?(\d+)_steps\.zip")


def _checkpoints(folder: Path, name_prefix: str) -> list[tuple[int, str | None, Path]]:
    """Steps, run (None: not part of the name) and path of each checkpoint, sorted by steps."""
    pattern = checkpoint_pattern(name_prefix)
    try:
        # Unlike glob(), this raises an error if the folder cannot be read
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = ((pattern.fullmatch(name), folder / name) for name in names)
    # Opening a pipe would wait
    checkpoints = [(int(match[2]), match[1], path) for match, path in found if match and path.is_file()]
    return sorted(checkpoints, key=lambda entry: entry[0])


def statistics_path(checkpoint: Path) -> Path:
    """Path of the statistics of ``VecNormalize``, named as by SB3's ``CheckpointCallback``."""
    prefix, n_steps = checkpoint.stem.removesuffix("_steps").rsplit("_", 1)
    return checkpoint.with_name(f"{prefix}_vecnormalize_{n_steps}_steps.pkl")


def _num_timesteps(model: Any) -> int:
    """Steps of a model as it is saved, without an unfinished rollout."""
    return (model._rollout_start or vars(model))["num_timesteps"]


def _print(line: str) -> None:
    """Print a line, escaped if the output cannot show it. An output that is closed does not matter."""
    for text in (line, line.encode("ascii", "backslashreplace").decode()):
        with suppress(OSError, ValueError):
            return print(text, flush=True)
