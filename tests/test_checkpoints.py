"""Checkpoints: when they are written, what they contain, signals, full disks, and the logs of resumed runs."""

import csv
import errno
import io
import os
import re
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TransformReward
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter

from sb3_reinforce import REINFORCE, AtomicCheckpointCallback, newest_checkpoint, restore_evaluations
from sb3_reinforce.episodes import checks
from sb3_reinforce.tools import checkpoints
from sb3_reinforce.tools.checkpoints import write_atomically
from tests.envs import RandomLengthEnv
from tests.rollouts import StopAt, state_of
from tests.runs.common import monitor_rows, scalars, wait_for_the_next_second

TOTAL = 120
SIGNALS = [signal.SIGINT, signal.SIGTERM]
each_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


def make_model(env: Any = None, **kwargs: Any) -> REINFORCE:
    defaults: dict[str, Any] = dict(n_steps=20, seed=0, policy_kwargs=dict(net_arch=[4]))
    return REINFORCE("MlpPolicy", env or RandomLengthEnv(9), **(defaults | kwargs))


def learn_all(model: REINFORCE, callback: Any = None, total: int = TOTAL) -> REINFORCE:
    """Continue up to a number of steps."""
    return model.learn(total - model.num_timesteps, callback, reset_num_timesteps=False)


def assert_same_weights(model: REINFORCE, other: REINFORCE) -> None:
    np.testing.assert_array_equal(state_of(model), state_of(other))


def names(folder: Path) -> list[str]:
    """Names of files, without the identities of runs."""
    return sorted(re.sub("_[0-9a-f]{8}(?=_)", "", path.name) for path in folder.iterdir())


def checkpoint(folder: Path, n_steps: int) -> Path:
    (path,) = folder.glob(f"checkpoint_????????_{n_steps}_steps.zip")
    return path


def files_of(steps: Any) -> list[str]:
    return sorted(f"checkpoint_{n}_steps.zip" for n in set(steps))


class Each(BaseCallback):
    """Call functions of the callback at the start of each rollout, at each step, and at the end of each rollout."""

    def __init__(self, start: Any = None, step: Any = None, end: Any = None):
        super().__init__()
        self.functions = dict(start=start, step=step, end=end)

    def _call(self, moment: str) -> None:
        if self.functions[moment] is not None:
            self.functions[moment](self)

    def _on_rollout_start(self) -> None:
        self._call("start")

    def _on_step(self) -> bool:
        self._call("step")
        return True

    def _on_rollout_end(self) -> None:
        self._call("end")


def at(moment: str, n_updates: int, function: Callable[[], Any], step: int = 7) -> Each:
    """Call a function once, in the rollout after a number of updates."""

    def call(callback: Any) -> None:
        if callback.model._n_updates == n_updates and (moment != "step" or callback.locals["n_steps"] == step):
            function()

    return Each(**{moment: call})


def kill(number: int = signal.SIGTERM, moment: str = "step", n_updates: int = 0) -> Each:
    return at(moment, n_updates, lambda: os.kill(os.getpid(), number))


class CustomError(Exception):
    pass


def raise_error(*args: Any) -> None:
    raise CustomError


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, Any]]:
    """Signal handlers before a test, which are restored after it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole() -> REINFORCE:
    """Model of an uninterrupted run."""
    return learn_all(make_model())


@pytest.fixture(scope="module")
def starts() -> list[int]:
    """Steps at the start of each rollout of the uninterrupted run, and at its end."""
    starts: list[int] = []
    model = learn_all(make_model(), Each(start=lambda callback: starts.append(callback.model.num_timesteps)))
    return [*starts, model.num_timesteps]


# Schedule and content


@pytest.mark.parametrize("n", [1, 2])
def test_checkpoints_every_n_updates_and_at_the_end(n: int, tmp_path: Path, whole: REINFORCE, starts: list[int]):
    model = learn_all(make_model(), AtomicCheckpointCallback(tmp_path, every_n_updates=n, keep=100))
    expected = {*starts[n::n], starts[-1]}
    assert names(tmp_path) == files_of(expected)
    for steps in expected:
        loaded = REINFORCE.load(checkpoint(tmp_path, steps))
        assert (loaded.num_timesteps, loaded._n_updates) == (steps, starts.index(steps))
    assert_same_weights(model, whole)
    assert_same_weights(REINFORCE.load(checkpoint(tmp_path, starts[-1])), whole)


@pytest.mark.parametrize(("minutes", "n"), [(2, 2), (2.5, 3), (100, 100)])
def test_checkpoints_every_n_minutes(
    minutes: float, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, starts: list[int]
):
    """Each rollout takes a minute."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    pass_a_minute = Each(end=lambda callback: setattr(clock, "now", clock.now + 60))
    monkeypatch.setattr(checkpoints, "time", clock)
    folder = tmp_path / "new" / "folder"
    saver = AtomicCheckpointCallback(str(folder), every_n_minutes=minutes, keep=100, verbose=1)
    learn_all(make_model(), [pass_a_minute, saver])
    assert names(folder) == files_of([*starts[n::n], starts[-1]])
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(f"Saved {path}" for path in folder.iterdir())


def test_older_checkpoints_are_removed_with_their_statistics(tmp_path: Path):
    env = VecNormalize(DummyVecEnv([lambda: RandomLengthEnv(9)]))
    learn_all(make_model(env), AtomicCheckpointCallback(tmp_path, every_n_updates=1, keep=2))
    steps = sorted(int(path.stem.split("_")[2]) for path in tmp_path.glob("*.zip"))
    assert len(steps) == 2 and steps[-1] >= TOTAL
    statistics = [f"checkpoint_vecnormalize_{n}_steps.pkl" for n in steps]
    assert names(tmp_path) == sorted([*files_of(steps), *statistics])
    path = str(checkpoints.statistics_path(checkpoint(tmp_path, steps[-1])))
    loaded = VecNormalize.load(path, DummyVecEnv([lambda: RandomLengthEnv(9)]))
    np.testing.assert_array_equal(loaded.obs_rms.mean, env.obs_rms.mean)
    assert loaded.obs_rms.count == env.obs_rms.count > TOTAL


@pytest.mark.parametrize("prefix", ["a", "check[point]", "checkpoint_2"])
def test_files_with_other_names_are_left_alone(prefix: str, tmp_path: Path):
    """Files that a killed process of the same run has not finished are removed."""
    model = make_model()
    others = [f".{prefix}_01234567_5_steps.zip.tmp", "b_5_steps.zip", "notes.txt", "checkpoint_5_steps.zip"]
    for name in (f".{prefix}_{model.run_id}_5_steps.zip.tmp", *others):
        (tmp_path / name).touch()
    learn_all(model, AtomicCheckpointCallback(tmp_path, every_n_updates=1, keep=1, name_prefix=prefix))
    path = newest_checkpoint(tmp_path, prefix)
    assert path is not None and REINFORCE.load(path).num_timesteps >= TOTAL
    assert {file.name for file in tmp_path.iterdir()} == {*others, path.name}


def test_each_run_keeps_its_own_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Runs with the same seed save the same steps. A stopped run names its own checkpoint."""
    runs = [learn_all(make_model(), AtomicCheckpointCallback(tmp_path, keep=1), total) for total in (200, TOTAL)]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    stopped = stop_by_signal(signal.SIGTERM, [kill(n_updates=2), AtomicCheckpointCallback(tmp_path, keep=1)])
    resumed = resume(capsys)
    assert resumed.run_id == stopped.run_id
    learn_all(resumed, AtomicCheckpointCallback(tmp_path, keep=1))
    assert_same_weights(resumed, runs[1])
    assert all(path.read_bytes() == content for path, content in before.items()) and len(names(tmp_path)) == 3
    assert newest_checkpoint(tmp_path, run="other") is None
    with pytest.raises(ValueError, match="3 runs") as error:
        newest_checkpoint(tmp_path)
    for run in (*runs, resumed):
        name = f"checkpoint_{run.run_id}_{run.num_timesteps}_steps.zip"
        assert newest_checkpoint(tmp_path, run=run.run_id) == tmp_path / name
        assert f"run='{run.run_id}' ({name})" in str(error.value)


def test_a_model_that_begins_anew_is_another_run():
    model = make_model()
    ids = [model.run_id, *(model.learn(1, reset_num_timesteps=reset).run_id for reset in (True, False, True))]
    assert ids[0] == ids[1] == ids[2] != ids[3] and make_model().run_id not in ids


@pytest.mark.parametrize(
    "kwargs",
    [
        *(dict(every_n_updates=value) for value in (0, 1.5, True)),
        *(dict(every_n_minutes=value) for value in (0, float("nan"))),
        *(dict(keep=value) for value in (0, None, 2.0)),
    ],
    ids=str,
)
def test_arguments_out_of_range_raise_a_value_error(kwargs: dict[str, Any], tmp_path: Path):
    (name,) = kwargs
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {name}="):
        AtomicCheckpointCallback(tmp_path / "folder", **kwargs)
    assert not (tmp_path / "folder").exists()


# Files that cannot be written


class FullFile(io.FileIO):
    def write(self, content: Any) -> int:
        super().write(content[:1000])
        return len(content) if len(content) <= 1000 else fail()


def fail(*args: Any, number: int = errno.ENOSPC, **kwargs: Any) -> Any:
    raise OSError(number, os.strerror(number))


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "open": lambda patch: patch.setattr(checkpoints, "open", fail, raising=False),
    "write": lambda patch: patch.setattr(checkpoints, "open", FullFile, raising=False),
    "fsync": lambda patch: patch.setattr(os, "fsync", fail),
    "replace": lambda patch: patch.setattr(Path, "replace", fail),
    "mkdir": lambda patch: patch.setattr(Path, "mkdir", fail),
}


@pytest.mark.parametrize("failure", ["open", "write", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_atomically(tmp_path / "file", b"old" * 1000)
    with monkeypatch.context() as patch:
        FAILURES[failure](patch)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(tmp_path / "file", b"new" * 1000)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old" * 1000
    write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"new"


def test_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other one writes while this one has not finished. The file system cannot synchronize folders."""
    path, fsync, others = tmp_path / "file", os.fsync, [b"other" * 1000]

    def other_writes(number: int) -> None:
        if others:
            write_atomically(path, others.pop())
            assert path.read_bytes() == b"other" * 1000
        fsync(number) if os.path.isfile(f"/proc/self/fd/{number}") else fail()

    monkeypatch.setattr(os, "fsync", other_writes)
    write_atomically(path, b"this" * 1000)
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"this" * 1000


@pytest.mark.parametrize("failure", ["write", "replace", "mkdir", "pickle"])
def test_training_continues_if_a_checkpoint_cannot_be_written(
    failure: str, tmp_path: Path, capsys: pytest.CaptureFixture, whole: REINFORCE, starts: list[int]
):
    """The second and third checkpoint cannot be written, which is reported once."""
    failing, seen, model = pytest.MonkeyPatch(), [], make_model()
    attribute = dict(pickle=lambda patch: patch.setattr(model, "lock", threading.Lock(), raising=False))
    fill = at("start", 2, lambda: (FAILURES | attribute)[failure](failing))
    free = at("start", 4, lambda: [seen.append(names(tmp_path)), failing.undo()])
    learn_all(model, [fill, free, AtomicCheckpointCallback(tmp_path, every_n_updates=1)])
    assert_same_weights(model, whole)
    assert seen == [files_of([starts[1]])] and len(names(tmp_path)) == 3
    (line,) = capsys.readouterr().out.splitlines()
    path = tmp_path / f"checkpoint_{model.run_id}_{starts[2]}_steps.zip"
    assert line.startswith(f"The checkpoint {path} was not saved, and training continues: ")
    assert ("No space left" in line) == (failure != "pickle")


def test_training_continues_if_an_old_checkpoint_cannot_be_removed(tmp_path: Path, capsys: Any, starts: list[int]):
    replace = at("start", 2, lambda: [checkpoint(tmp_path, starts[1]).unlink(), path.mkdir()])
    model = make_model()
    path = tmp_path / f"checkpoint_{model.run_id}_{starts[1]}_steps.zip"
    learn_all(model, [replace, AtomicCheckpointCallback(tmp_path, every_n_updates=1, keep=1)])
    assert names(tmp_path) == files_of([starts[1], starts[-1]])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Old checkpoints in {tmp_path} were not removed, and training continues: ")


@pytest.mark.parametrize("how", ["ascii", "utf-8", "pipe"])
def test_training_continues_if_a_line_cannot_be_printed(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, printed = tmp_path / os.fsdecode("Läufe".encode("latin-1")), io.BytesIO()
    output = io.TextIOWrapper(printed, encoding="ascii" if how == "ascii" else "utf-8")
    if how == "pipe":
        printed.write = fail  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", output)
    learn_all(make_model(), AtomicCheckpointCallback(folder, every_n_updates=1, verbose=1))
    assert len(names(folder)) == 3 and printed.getvalue().count(b"Saved ") == (0 if how == "pipe" else 5)


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An environment or a callback changes the current folder."""
    monkeypatch.chdir(tmp_path)
    model = make_model(tensorboard_log="tensorboard")
    (tmp_path / "other").mkdir()
    learn_all(model, [at("start", 1, lambda: os.chdir("other")), AtomicCheckpointCallback("folder", every_n_updates=1)])
    assert len(names(tmp_path / "folder")) == 3 and names(tmp_path / "other") == []
    assert len(scalars(next((tmp_path / "tensorboard").iterdir()))["train/grad_norm"]) == model._n_updates - 1


# Newest checkpoint


def test_newest_checkpoint_skips_files_that_are_damaged_or_of_other_algorithms(tmp_path: Path, capsys: Any):
    learn_all(make_model(), AtomicCheckpointCallback(tmp_path, every_n_updates=1))
    first, second, third = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem.split("_")[2]))
    assert newest_checkpoint(tmp_path) == newest_checkpoint(str(tmp_path)) == third
    A2C("MlpPolicy", RandomLengthEnv(9)).save(third)
    assert newest_checkpoint(tmp_path) == second
    os.truncate(second, second.stat().st_size // 2)
    assert newest_checkpoint(tmp_path) == first
    with zipfile.ZipFile(first, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", " " * 10**6)
    assert newest_checkpoint(tmp_path) is None
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(" ")[1] for line in printed] == [str(third), str(second), str(first)] and "unpacks" in printed[-1]


def test_newest_checkpoint_is_the_one_with_the_most_steps(tmp_path: Path):
    (tmp_path / "checkpoint_70_steps.zip").mkdir()
    os.mkfifo(tmp_path / "checkpoint_80_steps.zip")
    (tmp_path / "checkpoint_90_steps.zip").symlink_to("checkpoint_90_steps.zip")
    (tmp_path / "checkpoint_seven_steps.zip").touch()
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "checkpoint_seven_steps.zip"):
        assert newest_checkpoint(folder) is None
    model = make_model()
    for steps in (9, 10):
        model.save(tmp_path / f"checkpoint_{steps}_steps.zip")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint_10_steps.zip"


@pytest.mark.parametrize(("module", "name"), [(checks, "open_path"), (os, "listdir")])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_read_is_an_error(number: int, module: Any, name: str, tmp_path: Path, monkeypatch: Any):
    make_model().save(tmp_path / "checkpoint_10_steps.zip")
    monkeypatch.setattr(module, name, partial(fail, number=number))
    with pytest.raises(OSError, match=os.strerror(number)):
        newest_checkpoint(tmp_path)


# Signals


def stop_by_signal(number: int, callback: Any, model: REINFORCE | None = None) -> REINFORCE:
    model = model or make_model()
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stop:
        learn_all(model, callback)
    if number == signal.SIGTERM:
        assert stop.value.code == 143  # type: ignore[attr-defined]
    return model


def resume(capsys: pytest.CaptureFixture) -> REINFORCE:
    """Run the line of Python that a stopped run has printed."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Stopped by ")]
    return eval(line.split(". To resume: ", 1)[1], dict(REINFORCE=REINFORCE, env=RandomLengthEnv(9)))


@each_signal
@pytest.mark.parametrize(("moment", "n_updates"), [("step", 0), ("start", 3), ("step", 3), ("end", 3), ("end", 4)])
def test_a_signal_saves_a_checkpoint_and_prints_how_to_resume(
    moment: str, n_updates: int, number: int, tmp_path: Path, capsys: Any, whole: REINFORCE, starts: list[int], handlers: Any
):
    """Training leaves the rollout, or finishes the update. A signal before the last update also ends the program."""
    steps: list[int] = []
    note_steps = Each(step=lambda callback: steps.append(callback.locals["n_steps"]))
    model = stop_by_signal(number, [kill(number, moment, n_updates), note_steps, AtomicCheckpointCallback(tmp_path)])
    n_started = n_updates + (moment == "end")
    assert model.num_timesteps == starts[n_started] + (7 if moment == "step" else 0) == len(steps) + (moment == "step")
    assert names(tmp_path) == files_of([starts[n_started]])
    resumed = resume(capsys)
    assert resumed.num_timesteps == whole.num_timesteps
    assert_same_weights(resumed, whole)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@each_signal
def test_a_second_signal_takes_effect_immediately(number: int, tmp_path: Path):
    signal.signal(number, raise_error)
    twice, model = at("end", 2, lambda: [signal.raise_signal(number) for _ in range(2)]), make_model()
    with pytest.raises((CustomError, KeyboardInterrupt)):
        learn_all(model, [twice, AtomicCheckpointCallback(tmp_path)])
    assert model._n_updates == 2 and len(names(tmp_path)) == 1


@each_signal
@pytest.mark.parametrize("workers", [None, 2])
def test_a_signal_ends_a_rollout_at_once(workers: int | None, number: int, tmp_path: Path):
    """The episodes would take minutes."""
    pytest.importorskip("loky")
    timer, moments = threading.Timer(2, lambda: [moments.append(time.monotonic()), os.kill(os.getpid(), number)]), []
    slow = TransformReward(RandomLengthEnv(9), lambda reward: time.sleep(60))
    model = make_model(lambda: slow, workers=workers)
    stop_by_signal(number, [at("start", 0, timer.start), AtomicCheckpointCallback(tmp_path)], model)
    assert time.monotonic() - moments[0] < 2 and names(tmp_path) == ["checkpoint_0_steps.zip"]


@pytest.mark.parametrize("fails", [True, False])
def test_saves_in_an_event_callback_and_after_errors_of_other_callbacks(fails: bool, tmp_path: Path, handlers: Any):
    """``EveryNTimesteps`` calls nothing else. A signal stops the rollout all the same."""
    saver, saved = AtomicCheckpointCallback(tmp_path, every_n_updates=100, keep=100), []
    look, model = Each(step=lambda callback: saved.append(len(names(tmp_path)))), make_model()
    end = type("End", (Each,), dict(_on_training_end=raise_error))() if fails else kill(n_updates=4)
    with pytest.raises(CustomError if fails else SystemExit):
        learn_all(model, [end, EveryNTimesteps(50, saver), look])
    assert saved[48:50] == [0, 1] and saved[99] == 2
    path = newest_checkpoint(tmp_path)
    assert path is not None and REINFORCE.load(path)._n_updates == (model._n_updates if fails else 4)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_previous_handler_of_sigterm_is_called_after_saving(tmp_path: Path, capsys: pytest.CaptureFixture):
    calls: list[int] = []
    signal.signal(signal.SIGTERM, lambda *args: calls.append(len(names(tmp_path))))
    stop_by_signal(signal.SIGTERM, [kill(), AtomicCheckpointCallback(tmp_path, resume_command="python train.py --resume")])
    assert calls == [1] and capsys.readouterr().out == "Stopped by SIGTERM. To resume: python train.py --resume\n"


@each_signal
@pytest.mark.parametrize("handler", [signal.SIG_IGN, raise_error], ids=["ignore", "custom"])
@pytest.mark.parametrize("end", ["complete", "stopped", "error"])
def test_signal_handlers_are_restored(handler: Any, end: str, number: int, tmp_path: Path):
    signal.signal(number, handler)
    during: list[Any] = []
    look = Each(step=lambda callback: during.append(signal.getsignal(number)))
    saver = AtomicCheckpointCallback(tmp_path)
    endings = dict(complete=[], stopped=[StopAt(50)], error=[at("end", 2, raise_error)])
    try:
        learn_all(make_model(), [look, *endings[end], saver])
    except CustomError:
        assert end == "error"
    assert set(during) == {saver._on_signal}
    assert signal.getsignal(number) is handler


def test_signal_handlers_are_not_changed_outside_of_the_main_thread(tmp_path: Path, handlers: Any, whole: REINFORCE):
    found: list[Any] = []
    look = Each(step=lambda callback: found.append({number: signal.getsignal(number) for number in handlers}))

    def train() -> None:
        found.append(learn_all(make_model(), [look, AtomicCheckpointCallback(tmp_path, every_n_updates=1)]))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    *during, model = found
    assert len(during) >= TOTAL and all(handlers_then == handlers for handlers_then in during)
    assert_same_weights(model, whole)
    assert len(names(tmp_path)) == 3


def test_a_run_stopped_with_a_full_disk_names_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, whole: REINFORCE
):
    def fill_and_stop() -> None:
        FAILURES["write"](monkeypatch)
        signal.raise_signal(signal.SIGTERM)

    stop_by_signal(signal.SIGTERM, [at("step", 3, fill_and_stop), AtomicCheckpointCallback(tmp_path, every_n_updates=2)])
    monkeypatch.undo()
    resumed = resume(capsys)
    assert resumed._n_updates == whole._n_updates
    assert_same_weights(resumed, whole)


# Logs of resumed runs

opened: list[VecEnv] = []


@pytest.fixture(autouse=True)
def closed_files() -> Iterator[None]:
    """Close ``Monitor`` files after each test."""
    yield
    while opened:
        opened.pop().close()


def monitored(folder: Path, override_existing: bool, n_envs: int = 1) -> VecEnv:
    def make(index: int) -> Callable[[], gym.Env]:
        path = str(folder / str(index))
        return lambda: Monitor(RandomLengthEnv(9), path, override_existing=override_existing)

    opened.append(DummyVecEnv([make(index) for index in range(n_envs)]))
    return opened[-1]


def n_rows(folder: Path) -> int:
    return sum(map(len, monitor_rows(folder).values()))


def n_logged_steps(folder: Path) -> int:
    return sum(int(line.split(",")[1]) for lines in monitor_rows(folder).values() for line in lines)


def session_starts(folder: Path) -> list[int]:
    """Steps of the SessionLog START events of a TensorBoard log."""
    events = [event for path in sorted(folder.iterdir()) for event in EventFileLoader(str(path)).Load()]
    return [event.step for event in events if event.session_log.status == SessionLog.START]


def log_within_rollouts(callback: Any) -> None:
    """Write values during a rollout, as an evaluation does."""
    if callback.locals["n_steps"] % 2 == 0:
        callback.logger.record("custom/steps", callback.num_timesteps)
        callback.logger.dump(callback.num_timesteps)


def interrupted(folder: Path, env: Any, n_updates: int = 3, moment: str = "step", **kwargs: Any) -> Path:
    """Stop a run after the first episode of a rollout, or at its start or end, and return its checkpoint."""

    def stop(callback: Any) -> None:
        if callback.model._n_updates == n_updates and (moment != "step" or callback.locals["dones"].any()):
            signal.raise_signal(signal.SIGTERM)

    # The name of the TensorBoard folder is REINFORCE_1, as usual
    callbacks = [Each(step=log_within_rollouts), Each(**{moment: stop}), AtomicCheckpointCallback(folder)]
    with pytest.raises(SystemExit):
        make_model(env, **kwargs).learn(TOTAL, callbacks)
    path = newest_checkpoint(folder)
    assert path is not None
    return path


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """Checkpoint of a stopped run. Its logs are in the same folder."""
    return interrupted(tmp_path, monitored(tmp_path, True), tensorboard_log=str(tmp_path))


@pytest.mark.parametrize("moment", ["start", "step", "end"])
@pytest.mark.parametrize(("n_envs", "n_steps", "n_updates"), [(1, 20, 0), (1, 20, 3), (3, 8, 3)])
def test_a_resumed_run_has_the_logs_of_a_whole_one(n_envs: int, n_steps: int, n_updates: int, moment: str, tmp_path: Path):
    """Episodes in ``Monitor`` files and values in TensorBoard logs: each step once. Times continue."""
    log, folder, n_before = tmp_path / "whole", tmp_path / "parts", []
    log.mkdir()
    folder.mkdir()
    uninterrupted = make_model(monitored(log, True, n_envs), tensorboard_log=str(log), n_steps=n_steps)
    uninterrupted.learn(TOTAL, Each(step=log_within_rollouts))
    env = monitored(folder, True, n_envs)
    path = interrupted(folder, env, n_updates, moment, tensorboard_log=str(folder), n_steps=n_steps)
    n_stopped, start = n_rows(folder), REINFORCE.load(path).num_timesteps
    look = at("start", n_updates, lambda: n_before.append(n_rows(folder)))
    wait_for_the_next_second()
    resumed = REINFORCE.load(path, monitored(folder, False, n_envs))
    learn_all(resumed, [Each(step=log_within_rollouts), look, AtomicCheckpointCallback(folder)])
    assert monitor_rows(folder) == monitor_rows(log)
    # The stopped rollout had finished episodes
    assert moment != "step" or n_before[0] < n_stopped
    assert len(load_results(str(folder))) == n_rows(folder)

    shown = scalars(folder / "REINFORCE_1")
    assert shown == scalars(log / "REINFORCE_1")
    assert {"custom/steps", "rollout/ep_rew_mean", "train/grad_norm"} <= shown.keys()
    for values in shown.values():
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps))
    assert session_starts(log / "REINFORCE_1") == []
    assert session_starts(folder / "REINFORCE_1") == [start + 1]


def test_the_tensorboard_log_of_another_run_is_not_changed(stopped: Path, tmp_path: Path):
    """SB3 continues in the latest log of a folder, which belongs to another run. This one is resumed twice."""
    make_model(seed=1, tensorboard_log=str(tmp_path)).learn(TOTAL)
    log, own = tmp_path / "REINFORCE_2", tmp_path / "REINFORCE_1"
    content = {path: path.read_bytes() for path in log.iterdir()}
    for total in (150, 200):
        path = newest_checkpoint(tmp_path)
        assert path is not None
        wait_for_the_next_second()
        model = learn_all(REINFORCE.load(path, monitored(tmp_path, False)), AtomicCheckpointCallback(tmp_path), total)
    assert {path: path.read_bytes() for path in log.iterdir()} == content
    assert len(scalars(own)["train/grad_norm"]) == model._n_updates - 1 and len(session_starts(own)) == 2
    # A run that is not resumed has no log to continue
    learn_all(make_model(tensorboard_log=str(tmp_path)), AtomicCheckpointCallback(tmp_path / "third"))
    assert (tmp_path / "REINFORCE_3").exists() and {path: path.read_bytes() for path in log.iterdir()} == content


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_training_continues_if_logs_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture, whole: REINFORCE):
    """The disk is full for two updates."""
    saver = AtomicCheckpointCallback(tmp_path / "checkpoints", every_n_updates=1)
    full, model = pytest.MonkeyPatch(), make_model(monitored(tmp_path, True))
    model.set_logger(configure(str(tmp_path), ["csv", "tensorboard"]))

    def fill() -> None:
        full.setattr(RecordWriter, "write", fail)
        full.setattr(csv.DictWriter, "writerow", fail)
        full.setattr(model.logger.output_formats[0], "file", SimpleNamespace(write=fail, seek=fail))

    learn_all(model, [at("start", 1, fill), at("end", 2, full.undo), saver])
    assert_same_weights(model, whole)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and all("log was not written" in line and "No space left" in line for line in printed)
    steps = [step for step, _ in scalars(tmp_path)["rollout/episodes"]]
    assert steps[-1] == model.num_timesteps and len(steps) == model._n_updates - 1


@pytest.mark.parametrize("why", ["learned", "reset", "saved_again", "saved_in_training"])
def test_logs_are_only_truncated_directly_after_a_checkpoint_is_loaded(why: str, stopped: Path, tmp_path: Path):
    """Not if the model has learned or been saved since, nor if training starts from step 0."""
    model = REINFORCE.load(stopped, monitored(tmp_path, False))
    if why == "learned":
        model.learn(1, reset_num_timesteps=False)
    elif why == "saved_again":
        model.save(tmp_path / "model")
        model = REINFORCE.load(tmp_path / "model", monitored(tmp_path, False))
    elif why == "saved_in_training":
        learn_all(model, at("start", 4, lambda: model.save(tmp_path / "model")))
        model = REINFORCE.load(tmp_path / "model", monitored(tmp_path, False))
    file, log = tmp_path / "0.monitor.csv", tmp_path / "REINFORCE_1"
    before = file.read_bytes()
    model.learn(60, AtomicCheckpointCallback(tmp_path / "other"), reset_num_timesteps=why == "reset")
    assert file.read_bytes().startswith(before)
    assert session_starts(log) == []


@pytest.mark.parametrize("has_rows", [True, False])
def test_a_new_monitor_file_is_not_truncated(has_rows: bool, tmp_path: Path):
    """Its header may be longer than the old file."""
    env = monitored(tmp_path, True)
    path = tmp_path / "0.monitor.csv"
    path.write_text(path.read_text().split("t_start")[0] + 't_start": 1.5, "env_id": "None"}\nr,l,t\n')
    checkpoint = interrupted(tmp_path, env, 3 if has_rows else 0)
    model = REINFORCE.load(checkpoint, monitored(tmp_path, True))
    n_before = model.num_timesteps
    learn_all(model, AtomicCheckpointCallback(tmp_path))
    assert n_logged_steps(tmp_path) == model.num_timesteps - n_before


@pytest.mark.parametrize("is_older", [False, True])
def test_an_incomplete_row_is_removed(is_older: bool, stopped: Path, tmp_path: Path):
    """Also if the file has lost rows that the checkpoint has counted."""
    path = tmp_path / "0.monitor.csv"
    content, rows = path.read_bytes(), monitor_rows(tmp_path)["0.monitor.csv"]
    path.write_bytes(content[: content.index(b"\n", 200) - 3] if is_older else content[:-3])
    n_whole = path.read_bytes().count(b"\n") - 2
    model = learn_all(REINFORCE.load(stopped, monitored(tmp_path, False)), AtomicCheckpointCallback(tmp_path))
    assert monitor_rows(tmp_path)["0.monitor.csv"][:n_whole] == rows[:n_whole]
    assert (n_logged_steps(tmp_path) == model.num_timesteps) == (not is_older)


# Evaluations of resumed runs


def evaluations(folder: Path) -> EvalCallback:
    return EvalCallback(Monitor(RandomLengthEnv(9)), n_eval_episodes=2, eval_freq=30, log_path=str(folder), verbose=0)


def test_evaluations_up_to_the_checkpoint_are_restored(tmp_path: Path):
    path = tmp_path / "evaluations.npz"
    assert restore_evaluations(evaluations(tmp_path), path, 100) == 0
    done = evaluations(tmp_path)
    learn_all(make_model(), done)
    assert done.evaluations_timesteps == [30, 60, 90, 120]
    for last_step, n in ((29, 0), (60, 2), (89, 2), (1000, 4)):
        callback = evaluations(tmp_path)
        assert restore_evaluations(callback, path, last_step) == 30 * n
        assert callback.evaluations_timesteps == done.evaluations_timesteps[:n]
        assert callback.evaluations_length == [list(map(int, lengths)) for lengths in done.evaluations_length[:n]]
        means = [float(np.mean(returns)) for returns in done.evaluations_results[:n]]
        assert callback.best_mean_reward == max(means, default=-np.inf)
    for size in (path.stat().st_size // 2, 0):
        os.truncate(path, size)
        callback = evaluations(tmp_path)
        assert restore_evaluations(callback, path, 1000) == 0
        assert callback.evaluations_timesteps == [] and callback.best_mean_reward == -np.inf
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        restore_evaluations(callback, path, 1000)
