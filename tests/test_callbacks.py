"""Checkpoints, the progress bar, and a callback from SB3's documentation; SB3's own callbacks are in tests/integration."""

import builtins
import errno
import os
import signal
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import HParam
from stable_baselines3.common.monitor import Monitor, ResultsWriter, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecEnv, VecMonitor, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from sb3_reinforce import REINFORCE, AtomicCheckpointCallback, callbacks, newest_checkpoint
from sb3_reinforce.episodes.algorithm import StepsProgressBar
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from sb3_reinforce.tools.checkpoints import drop_events, write_atomically
from tests.envs import RandomLengthEnv, ScriptedEnv, subproc


class Count(BaseCallback):
    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("make", [DummyVecEnv, EpisodeVecEnv, lambda fns: VecNormalize(EpisodeVecEnv(fns))])
def test_the_progress_bar_moves_by_the_steps_that_were_taken(make: Any):
    env = make([lambda length=length: ScriptedEnv([length]) for length in (3, 8)])
    model = REINFORCE("MlpPolicy", env, n_steps=6)
    for _ in range(2):
        before, bar = model.num_timesteps, StepsProgressBar()
        model.learn(10, callback=bar, reset_num_timesteps=False)
        assert bar.pbar.n == model.num_timesteps - before


@pytest.mark.parametrize("callback", [None, Count(), [Count(), Count()], lambda locals_, globals_: True])
def test_learn_shows_the_progress_bar_beside_whatever_callback_there_is(callback: Any, capsys: pytest.CaptureFixture):
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8).learn(20, callback=callback, progress_bar=True)
    assert f"{model.num_timesteps}/20" in capsys.readouterr().out
    for counted in callback if isinstance(callback, list) else [callback]:
        assert not isinstance(counted, Count) or counted.n_calls == model.num_timesteps


class HParamCallback(BaseCallback):
    """From SB3's documentation ("TensorBoard integration"): default arguments are values that TensorBoard can show."""

    def _on_training_start(self) -> None:
        hparam_dict = {
            "algorithm": self.model.__class__.__name__,
            "learning rate": self.model.learning_rate,
            "gamma": self.model.gamma,
        }
        metric_dict = {"rollout/ep_len_mean": 0, "train/value_loss": 0.0}
        self.logger.record(
            "hparams",
            HParam(hparam_dict, metric_dict),
            exclude=("stdout", "log", "json", "csv"),  # type: ignore[arg-type]
        )

    def _on_step(self) -> bool:
        return True


def test_the_hyperparameter_callback_of_the_documentation_works_with_the_default_arguments(tmp_path: Path):
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), tensorboard_log=str(tmp_path))
    model.learn(2001, callback=HParamCallback())
    events = EventAccumulator(str(tmp_path / "REINFORCE_1"))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["algorithm"].string_value == "REINFORCE"
    assert hparams["learning rate"].number_value == model.learning_rate
    assert hparams["gamma"].number_value == model.gamma
    assert {"rollout/ep_len_mean", "train/value_loss"} <= set(events.Tags()["scalars"])


# Checkpoints -----------------------------------------------------------------------------------------------------------------

TOTAL = 120
#: SB3's name for the first run, if it begins as one that goes on
TENSORBOARD = "REINFORCE_0"


def make_model(env: Any = None, **kwargs: Any) -> REINFORCE:
    defaults: dict[str, Any] = dict(n_steps=20, seed=0, policy_kwargs=dict(net_arch=[4]))
    return REINFORCE("MlpPolicy", env or RandomLengthEnv(9), **(defaults | kwargs))


def learn_all(model: REINFORCE, callback: Any = None, total: int = TOTAL) -> REINFORCE:
    """Go on until there are so many steps."""
    return model.learn(total - model.num_timesteps, callback, reset_num_timesteps=False)


def weights(model: REINFORCE) -> np.ndarray:
    return np.concatenate([value.numpy().ravel().copy() for value in model.policy.state_dict().values()])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Each(BaseCallback):
    """Calls functions of the callback at the beginning of each rollout, at each step, and at the end of each rollout."""

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
    """A callback that calls a function once: at a moment of the rollout after so many updates."""

    def call(callback: Any) -> None:
        if callback.model._n_updates == n_updates and (moment != "step" or callback.locals["n_steps"] == step):
            function()

    return Each(**{moment: call})


class Mine(Exception):
    """What nobody else raises."""


def raise_mine(*args: Any) -> None:
    raise Mine


class StopAt(BaseCallback):
    def __init__(self, n_calls: int):
        super().__init__()
        self.last = n_calls

    def _on_step(self) -> bool:
        return self.n_calls < self.last


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, Any]]:
    """The signal handlers that there were before a test, which are there after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole() -> REINFORCE:
    """Trained without a stop."""
    return learn_all(make_model())


def starts_of_rollouts() -> list[int]:
    """Steps at the beginning of each rollout of :func:`whole`, and at its end."""
    starts: list[int] = []
    model = learn_all(make_model(), Each(start=lambda callback: starts.append(callback.model.num_timesteps)))
    return [*starts, model.num_timesteps]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_checkpoints_are_n_updates_apart_and_there_is_one_at_the_end(n: int, tmp_path: Path, whole: REINFORCE):
    model = learn_all(make_model(), AtomicCheckpointCallback(tmp_path, every_n_updates=n, keep=100))
    starts = starts_of_rollouts()
    expected = {*starts[n::n], starts[-1]}
    assert names(tmp_path) == sorted(f"checkpoint_{steps}_steps.zip" for steps in expected)
    for steps in expected:
        loaded = REINFORCE.load(tmp_path / f"checkpoint_{steps}_steps")
        assert (loaded.num_timesteps, loaded._n_updates) == (steps, starts.index(steps))
    np.testing.assert_array_equal(weights(model), weights(whole))
    np.testing.assert_array_equal(weights(loaded if steps == starts[-1] else model), weights(whole))


@pytest.mark.parametrize(("minutes", "n"), [(2, 2), (2.5, 3), (0.5, 1), (100, 100)])
def test_checkpoints_are_minutes_apart(minutes: float, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each rollout takes a minute."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)

    def pass_a_minute(callback: Any) -> None:
        clock.now += 60

    monkeypatch.setattr(callbacks, "time", clock)
    learn_all(make_model(), [Each(end=pass_a_minute), AtomicCheckpointCallback(tmp_path, every_n_minutes=minutes, keep=100)])
    starts = starts_of_rollouts()
    assert names(tmp_path) == sorted(f"checkpoint_{steps}_steps.zip" for steps in {*starts[n::n], starts[-1]})


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_older_checkpoints_are_removed_with_their_statistics(keep: int, tmp_path: Path):
    env = VecNormalize(DummyVecEnv([lambda: RandomLengthEnv(9)]))
    learn_all(make_model(env), AtomicCheckpointCallback(tmp_path, every_n_updates=1, keep=keep))
    steps = sorted(int(path.stem.split("_")[1]) for path in tmp_path.glob("*.zip"))
    assert len(steps) == keep and steps[-1] >= TOTAL
    statistics = [f"checkpoint_vecnormalize_{n}_steps.pkl" for n in steps]
    assert names(tmp_path) == sorted([*(f"checkpoint_{n}_steps.zip" for n in steps), *statistics])
    loaded = VecNormalize.load(str(tmp_path / statistics[-1]), DummyVecEnv([lambda: RandomLengthEnv(9)]))
    np.testing.assert_array_equal(loaded.obs_rms.mean, env.obs_rms.mean)
    assert loaded.obs_rms.count == env.obs_rms.count > TOTAL


@pytest.mark.parametrize("prefix", ["a", "check[point]", "checkpoint_2"])
def test_checkpoints_of_one_name_leave_those_of_another_alone(prefix: str, tmp_path: Path):
    for name in (f".{prefix}_5_steps.zip.tmp", ".b_5_steps.zip.tmp", "b_5_steps.zip", "notes.txt", "checkpoint_5_steps.zip"):
        (tmp_path / name).touch()
    learn_all(make_model(), AtomicCheckpointCallback(tmp_path, every_n_updates=1, keep=1, name_prefix=prefix))
    path = newest_checkpoint(tmp_path, prefix)
    assert path is not None and REINFORCE.load(path).num_timesteps >= TOTAL
    assert names(tmp_path) == sorted([".b_5_steps.zip.tmp", "b_5_steps.zip", "notes.txt", "checkpoint_5_steps.zip", path.name])
    assert newest_checkpoint(tmp_path) is newest_checkpoint(tmp_path, "b") is None


def test_what_was_just_saved_is_kept_beside_checkpoints_of_more_steps(tmp_path: Path):
    """Of an earlier run in the same folder."""
    learn_all(make_model(), AtomicCheckpointCallback(tmp_path, every_n_updates=1, keep=2), total=200)
    model = make_model(seed=1).learn(60, AtomicCheckpointCallback(tmp_path, every_n_updates=1, keep=2))
    assert (tmp_path / f"checkpoint_{model.num_timesteps}_steps.zip").exists()


def test_a_training_that_a_callback_stopped_leaves_the_beginning_of_its_rollout(tmp_path: Path, whole: REINFORCE):
    stopped = learn_all(make_model(), [StopAt(70), AtomicCheckpointCallback(tmp_path)])
    (name,) = names(tmp_path)
    loaded = REINFORCE.load(tmp_path / name, env=RandomLengthEnv(9))
    start = max(steps for steps in starts_of_rollouts() if steps < 70)
    assert loaded.num_timesteps == start < stopped.num_timesteps == 70
    np.testing.assert_array_equal(weights(learn_all(loaded)), weights(whole))


def test_a_training_without_a_rollout_leaves_a_checkpoint(tmp_path: Path):
    """Also that of a model whose last rollout was stopped."""
    model = make_model().learn(0, AtomicCheckpointCallback(tmp_path / "new"))
    assert names(tmp_path / "new") == ["checkpoint_0_steps.zip"]
    learn_all(model, StopAt(70)).learn(0, AtomicCheckpointCallback(tmp_path / "stopped"), reset_num_timesteps=False)
    path = newest_checkpoint(tmp_path / "stopped")
    assert path is not None and 0 < REINFORCE.load(path).num_timesteps < 70


def test_folders_are_made_and_verbose_names_the_files(tmp_path: Path, capsys: pytest.CaptureFixture):
    learn_all(make_model(), AtomicCheckpointCallback(str(tmp_path / "a" / "b"), every_n_updates=2, verbose=1, keep=100))
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == sorted(f"Saved {tmp_path / 'a' / 'b' / name}" for name in names(tmp_path / "a" / "b"))
    assert len(printed) >= 3
    learn_all(make_model(), AtomicCheckpointCallback(tmp_path / "quiet"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "kwargs",
    [
        *(dict(every_n_updates=value) for value in (0, -1, 1.5, True, "1")),
        *(dict(every_n_minutes=value) for value in (0, -1.0, float("nan"))),
        *(dict(keep=value) for value in (0, -1, None, 2.0)),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_name(kwargs: dict[str, Any], tmp_path: Path):
    (name,) = kwargs
    with pytest.raises(ValueError, match=rf"{name} must be .*, got {name}="):
        AtomicCheckpointCallback(tmp_path / "folder", **kwargs)
    assert not (tmp_path / "folder").exists()


# Files that cannot be written


class FullDisk:
    """Files of a module take so many bytes, and then there is no space left. Takes the place of ``open()``."""

    def __init__(self, n_bytes: int):
        self.n_bytes = n_bytes
        self.is_full = True

    def __call__(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = builtins.open(path, mode, *args, **kwargs)
        return FullFile(file, self.n_bytes) if self.is_full and "w" in mode else file


class FullFile:
    def __init__(self, file: Any, n_bytes: int):
        self.file = file
        self.n_bytes = n_bytes

    def write(self, content: bytes) -> int:
        self.file.write(content[: self.n_bytes])
        if len(content) > self.n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.n_bytes -= len(content)
        return len(content)

    def __enter__(self) -> "FullFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def fail(*args: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "open": lambda patch: patch.setattr(callbacks, "open", fail, raising=False),
    "first_byte": lambda patch: patch.setattr(callbacks, "open", FullDisk(0), raising=False),
    "after_1000_bytes": lambda patch: patch.setattr(callbacks, "open", FullDisk(1000), raising=False),
    "fsync": lambda patch: patch.setattr(os, "fsync", fail),
    "replace": lambda patch: patch.setattr(Path, "replace", fail),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_other(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_atomically(tmp_path / "file", b"old" * 1000)
    with monkeypatch.context() as patch:
        FAILURES[failure](patch)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(tmp_path / "file", b"new" * 1000)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old" * 1000
    write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"new"


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"fsync {path.name} of {path.stat().st_size} bytes" if path.is_file() else "fsync folder")
        fsync(descriptor)

    def note_replace(path: Path, target: Any) -> Any:
        events.append(f"replace {path.name} by {Path(target).name}")
        return replace(path, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("Only Linux tells which file a descriptor is of")
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomically(tmp_path / "file", b"12345")
    assert events == ["fsync .file.tmp of 5 bytes", "replace .file.tmp by file", "fsync folder"]


@pytest.mark.parametrize("failure", FAILURES)
def test_training_goes_on_when_a_checkpoint_cannot_be_written(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, whole: REINFORCE
):
    """The disk is full from the second checkpoint on, and has space again for the last."""
    contents: list[dict[str, bytes]] = []
    starts, failing = starts_of_rollouts(), pytest.MonkeyPatch()

    def fill_or_free(callback: Any) -> None:
        n_updates = callback.model._n_updates
        if n_updates == 2:
            FAILURES[failure](failing)
        if 2 <= n_updates <= 4:
            contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
        if n_updates == 4:
            failing.undo()

    try:
        model = learn_all(make_model(), [Each(start=fill_or_free), AtomicCheckpointCallback(tmp_path, every_n_updates=1)])
    finally:
        failing.undo()
    np.testing.assert_array_equal(weights(model), weights(whole))
    assert [*contents[0]] == [f"checkpoint_{starts[1]}_steps.zip"]
    assert contents[0] == contents[1] == contents[2]
    assert len(names(tmp_path)) == 3 and all(name.endswith(".zip") for name in names(tmp_path))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" was not saved")[0] for line in printed] == [
        f"The checkpoint {tmp_path / f'checkpoint_{steps}_steps.zip'}" for steps in starts[2:4]
    ]
    assert all("training goes on" in line and "No space left" in line for line in printed)


def test_a_checkpoint_that_cannot_be_written_leaves_no_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """There is space for those of ``VecNormalize``, but not for the model."""
    monkeypatch.setattr(callbacks, "open", FullDisk(5000), raising=False)
    env = VecNormalize(DummyVecEnv([lambda: RandomLengthEnv(9)]))
    learn_all(make_model(env), AtomicCheckpointCallback(tmp_path, every_n_updates=1, keep=1))
    assert "was not saved" in capsys.readouterr().out
    assert names(tmp_path) == []


def test_a_folder_that_is_gone_does_not_stop_training(tmp_path: Path, capsys: pytest.CaptureFixture, whole: REINFORCE):
    folder = tmp_path / "checkpoints"
    callback = AtomicCheckpointCallback(folder, every_n_updates=1)
    model = learn_all(make_model(), [at("start", 0, folder.rmdir), callback])
    np.testing.assert_array_equal(weights(model), weights(whole))
    assert "was not saved" in capsys.readouterr().out


def test_saving_goes_on_where_a_process_was_killed_while_it_saved(tmp_path: Path):
    for name in (".checkpoint_5_steps.zip.tmp", ".checkpoint_vecnormalize_5_steps.pkl.tmp"):
        (tmp_path / name).write_bytes(b"half")
    learn_all(make_model(), AtomicCheckpointCallback(tmp_path))
    (name,) = names(tmp_path)
    assert name.endswith("_steps.zip")


# The newest checkpoint


def spoiled(content: bytes, folder: Path, how: str) -> bytes:
    """The content of a model file, spoiled."""
    if how in ("not_json", "list", "null", "text", "number_as_class"):
        data = {"not_json": "{", "list": "[]", "null": "null", "text": '"text"', "number_as_class": '{"policy_class": 3}'}[how]
        with zipfile.ZipFile(folder / "spoiled", "w") as archive:
            for name, part in (("data", data), ("policy.pth", ""), ("policy.optimizer.pth", "")):
                archive.writestr(name, part)
        return (folder / "spoiled").read_bytes()
    if how == "a2c":
        A2C("MlpPolicy", RandomLengthEnv(9)).save(folder / "a2c.zip")
        return (folder / "a2c.zip").read_bytes()
    middle = len(content) // 2
    return {
        "empty": b"",
        "no_zip": b"no zip",
        "zeros": bytes(len(content)),
        "half": content[:middle],
        "last_byte": content[:-1],
        "zero_tail": content[:middle] + bytes(len(content) - middle),
        "hole": content[: middle - 50] + bytes(100) + content[middle + 50 :],
    }[how]


SPOILED = ["empty", "no_zip", "zeros", "half", "last_byte", "zero_tail", "hole", "a2c"]
SPOILED_JSON = ["not_json", "list", "null", "text", "number_as_class"]


@pytest.mark.parametrize("how", [*SPOILED, *SPOILED_JSON])
def test_the_newest_checkpoint_is_the_newest_that_is_complete(how: str, tmp_path: Path):
    folder = tmp_path / "folder"
    learn_all(make_model(), AtomicCheckpointCallback(folder, every_n_updates=1))
    *_, second, newest = sorted(int(path.stem.split("_")[1]) for path in folder.iterdir())
    path = folder / f"checkpoint_{newest}_steps.zip"
    assert newest_checkpoint(folder) == newest_checkpoint(str(folder)) == path
    path.write_bytes(spoiled(path.read_bytes(), tmp_path, how))
    assert newest_checkpoint(folder) == folder / f"checkpoint_{second}_steps.zip"
    for remaining in folder.glob("*.zip"):
        remaining.write_bytes(path.read_bytes())
    assert newest_checkpoint(folder) is None


def test_there_is_no_checkpoint_in_a_folder_that_is_empty_or_missing(tmp_path: Path):
    (tmp_path / "checkpoint_7_steps.zip").mkdir()
    (tmp_path / "checkpoint_seven_steps.zip").touch()
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "checkpoint_seven_steps.zip"):
        assert newest_checkpoint(folder) is None


def test_checkpoints_are_compared_by_their_steps_as_numbers(tmp_path: Path):
    make_model().save(tmp_path / "checkpoint_9_steps.zip")
    make_model().save(tmp_path / "checkpoint_10_steps.zip")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint_10_steps.zip"


# Signals

SIGNALS = [signal.SIGINT, signal.SIGTERM]
each_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


def stop_by_signal(number: int, callback: Any, model: REINFORCE | None = None) -> REINFORCE:
    """Train until a signal stops it, as it should."""
    model = model or make_model()
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stop:
        learn_all(model, callback)
    if number == signal.SIGTERM:
        assert stop.value.code == 143  # type: ignore[attr-defined]
    return model


def next_line(printed: str) -> str:
    """What a run that was stopped says to do next."""
    (line,) = [line for line in printed.splitlines() if line.startswith("Stopped by ")]
    return line.split(". To go on: ", 1)[1]


@each_signal
@pytest.mark.parametrize("moment", ["start", "step", "end"])
@pytest.mark.parametrize("n_updates", [0, 3])
def test_a_signal_stops_training_and_what_it_says_goes_on(
    moment: str, number: int, n_updates: int, tmp_path: Path, capsys: pytest.CaptureFixture, whole: REINFORCE, handlers: Any
):
    """At the end of a step: the file has the state of the beginning of that rollout, and goes on from there."""
    steps: list[int] = []
    saver = AtomicCheckpointCallback(tmp_path)
    kill = at(moment, n_updates, lambda: os.kill(os.getpid(), number))
    model = stop_by_signal(number, [kill, Each(step=lambda callback: steps.append(callback.locals["n_steps"])), saver])
    starts = starts_of_rollouts()
    # The step in which a signal arrives is finished, and seen by all callbacks
    n_begun = n_updates + (moment == "end")
    assert model.num_timesteps == len(steps) == starts[n_begun] + {"start": 1, "step": 7, "end": 1}[moment]
    assert names(tmp_path) == [f"checkpoint_{starts[n_begun]}_steps.zip"]
    printed = capsys.readouterr().out
    assert printed.startswith(f"Stopped by {signal.Signals(number).name}. To go on: REINFORCE.load(")
    resumed = eval(next_line(printed), dict(REINFORCE=REINFORCE, env=RandomLengthEnv(9)))
    assert resumed.num_timesteps == whole.num_timesteps
    np.testing.assert_array_equal(weights(resumed), weights(whole))
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@each_signal
def test_a_signal_in_an_update_lets_it_finish(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, whole: REINFORCE
):
    model, gradient_norm = make_model(), REINFORCE._gradient_norm

    def kill(self: REINFORCE) -> float:
        if self._n_updates == 2:
            signal.raise_signal(number)
        return gradient_norm(self)

    monkeypatch.setattr(REINFORCE, "_gradient_norm", kill)
    stop_by_signal(number, AtomicCheckpointCallback(tmp_path), model)
    monkeypatch.undo()
    resumed = eval(next_line(capsys.readouterr().out), dict(REINFORCE=REINFORCE, env=RandomLengthEnv(9)))
    assert model._n_updates == 3 < resumed._n_updates
    np.testing.assert_array_equal(weights(resumed), weights(whole))


@each_signal
def test_a_signal_at_the_last_step_of_training_stops_the_program_too(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture, whole: REINFORCE
):
    """In its last update: nothing is left to train, and what follows in the program is not run."""
    n_updates = whole._n_updates
    kill = at("end", n_updates - 1, lambda: os.kill(os.getpid(), number))
    model = stop_by_signal(number, [kill, AtomicCheckpointCallback(tmp_path)])
    np.testing.assert_array_equal(weights(model), weights(whole))
    resumed = eval(next_line(capsys.readouterr().out), dict(REINFORCE=REINFORCE, env=RandomLengthEnv(9)))
    assert resumed._n_updates == n_updates
    np.testing.assert_array_equal(weights(resumed), weights(whole))


def test_a_run_that_was_stopped_says_what_it_was_told_to_say(tmp_path: Path, capsys: pytest.CaptureFixture):
    callback = AtomicCheckpointCallback(tmp_path, resume_command="python train.py --resume")
    with pytest.raises(KeyboardInterrupt, match=r"Stopped by SIGINT\. To go on: python train\.py --resume"):
        learn_all(make_model(), [at("step", 2, lambda: signal.raise_signal(signal.SIGINT)), callback])
    assert capsys.readouterr().out == "Stopped by SIGINT. To go on: python train.py --resume\n"


@each_signal
def test_a_second_signal_acts_at_once(number: int, tmp_path: Path):
    signal.signal(number, raise_mine)
    seen: list[int] = []

    def twice() -> None:
        signal.raise_signal(number)
        seen.append(1)
        signal.raise_signal(number)
        seen.append(2)

    with pytest.raises(Mine):
        learn_all(make_model(), [at("step", 2, twice), AtomicCheckpointCallback(tmp_path)])
    assert seen == [1]


def test_a_handler_of_sigterm_that_was_there_is_called_after_saving(tmp_path: Path, capsys: pytest.CaptureFixture):
    calls: list[tuple[int, list[str], str]] = []
    signal.signal(
        signal.SIGTERM, lambda number, frame: calls.append((number, names(tmp_path), capsys.readouterr().out.split(".")[0]))
    )
    callback = AtomicCheckpointCallback(tmp_path)
    stop_by_signal(signal.SIGTERM, [at("step", 2, lambda: signal.raise_signal(signal.SIGTERM)), callback])
    assert [(number, len(files), line) for number, files, line in calls] == [(signal.SIGTERM, 1, "Stopped by SIGTERM")]


def test_a_handler_of_sigterm_that_raises_decides_how_the_program_ends(tmp_path: Path):
    signal.signal(signal.SIGTERM, raise_mine)
    with pytest.raises(Mine):
        learn_all(
            make_model(), [at("step", 2, lambda: signal.raise_signal(signal.SIGTERM)), AtomicCheckpointCallback(tmp_path)]
        )
    assert len(names(tmp_path)) == 1


@each_signal
@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, raise_mine], ids=["ignored", "default", "own"])
@pytest.mark.parametrize("how", ["ends", "stops"])
def test_handlers_are_as_they_were_after_training(handler: Any, how: str, number: int, tmp_path: Path):
    signal.signal(number, handler)
    during: list[Any] = []
    look = Each(step=lambda callback: during.append(signal.getsignal(number)))
    saver = AtomicCheckpointCallback(tmp_path)
    learn_all(make_model(), [look, saver] if how == "ends" else [look, StopAt(50), saver])
    assert set(during) == {saver._on_signal}
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("where", ["start", "step", "end"])
def test_handlers_are_as_they_were_after_an_error(where: str, tmp_path: Path, handlers: dict[int, Any]):
    with pytest.raises(Mine):
        learn_all(make_model(), [at(where, 2, raise_mine), AtomicCheckpointCallback(tmp_path)])
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@each_signal
@pytest.mark.parametrize("is_same", [True, False])
def test_signals_act_as_ever_after_trainings_that_ended_by_errors(number: int, is_same: bool, tmp_path: Path):
    """With one callback for all of them, or one for each; and while another training is on, they stop it."""
    signal.signal(number, raise_mine)
    model, saver = make_model(), AtomicCheckpointCallback(tmp_path)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            learn_all(model, [at("step", model._n_updates + 1, lambda: 1 / 0), saver])
        with pytest.raises(Mine):
            signal.raise_signal(number)
        with pytest.raises(ZeroDivisionError):
            learn_all(model, [at("step", model._n_updates + 1, lambda: 1 / 0), saver])
        saver = saver if is_same else AtomicCheckpointCallback(tmp_path)
    n_updates = model._n_updates
    kill = at("step", n_updates + 1, lambda: signal.raise_signal(number))
    with pytest.raises((KeyboardInterrupt, Mine)):
        learn_all(model, [kill, saver], total=300)
    assert model._n_updates == n_updates + 1
    with pytest.raises(Mine):
        signal.raise_signal(number)
    assert signal.getsignal(number) is raise_mine


def test_handlers_are_left_alone_outside_of_the_main_thread(tmp_path: Path, handlers: dict[int, Any], whole: REINFORCE):
    found: list[Any] = []

    def look(callback: Any) -> None:
        found.append({number: signal.getsignal(number) for number in handlers})

    def train() -> None:
        found.append(learn_all(make_model(), [Each(step=look), AtomicCheckpointCallback(tmp_path, every_n_updates=1)]))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    *during, model = found
    assert len(during) >= TOTAL and all(handlers_then == handlers for handlers_then in during)
    np.testing.assert_array_equal(weights(model), weights(whole))
    assert len(names(tmp_path)) == 3


def test_a_run_that_is_stopped_on_a_full_disk_names_the_checkpoint_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, whole: REINFORCE
):
    """An older one, with as many steps as are left from there."""

    def fill_and_stop() -> None:
        monkeypatch.setattr(callbacks, "open", FullDisk(1000), raising=False)
        signal.raise_signal(signal.SIGTERM)

    stop_by_signal(signal.SIGTERM, [at("step", 3, fill_and_stop), AtomicCheckpointCallback(tmp_path, every_n_updates=2)])
    monkeypatch.undo()
    resumed = eval(next_line(capsys.readouterr().out), dict(REINFORCE=REINFORCE, env=RandomLengthEnv(9)))
    assert resumed._n_updates == whole._n_updates
    np.testing.assert_array_equal(weights(resumed), weights(whole))


def test_a_run_that_is_stopped_on_a_full_disk_without_a_checkpoint_names_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(callbacks, "open", FullDisk(1000), raising=False)
    kill = at("step", 3, lambda: signal.raise_signal(signal.SIGTERM))
    stop_by_signal(signal.SIGTERM, [kill, AtomicCheckpointCallback(tmp_path)])
    printed = capsys.readouterr().out
    assert "Stopped by SIGTERM" in printed and "None" not in printed


def test_a_run_that_is_stopped_beside_checkpoints_of_another_names_its_own(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The other has more steps."""
    learn_all(make_model(), AtomicCheckpointCallback(tmp_path), total=200)
    kill = at("step", 2, lambda: signal.raise_signal(signal.SIGTERM))
    stop_by_signal(signal.SIGTERM, [kill, AtomicCheckpointCallback(tmp_path)], make_model(seed=1))
    resumed = eval(next_line(capsys.readouterr().out), dict(REINFORCE=REINFORCE, env=RandomLengthEnv(9)))
    assert resumed.seed == 1
    np.testing.assert_array_equal(weights(resumed), weights(learn_all(make_model(seed=1))))


# What the logs have beyond a checkpoint


def records(content: bytes) -> list[bytes]:
    """The records of an event file, byte for byte, up to one that is cut short."""
    found = []
    while len(content) >= 12 and len(content) >= (size := 16 + struct.unpack("<Q", content[:8])[0]):
        found.append(content[:size])
        content = content[size:]
    return found


def step_of(record: bytes) -> int:
    return Event.FromString(record[12:-4]).step


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """An event file of values, a text and a histogram at steps 0 to 9, some of which come late; beside another file."""
    writer = SummaryWriter(log_dir=str(tmp_path))
    for step in (0, 1, 2, 3, 4, 7, 5, 6, 8, 9):
        # The time is fixed: the last byte of a checksum, which some tests cut off, is to be the same in every run
        writer.add_scalar("value", step / 3, step, walltime=step)
        writer.add_text("text", f"step {step}", step, walltime=step)
        writer.add_histogram("histogram", np.arange(step + 2), step, walltime=step)
    writer.close()
    (path,) = tmp_path.iterdir()
    (tmp_path / "other.txt").write_text("other")
    return path


@pytest.mark.parametrize("last_step", [0, 5, 8])
def test_events_beyond_a_step_are_dropped_and_all_others_stay_byte_for_byte(events: Path, last_step: int):
    before = records(events.read_bytes())
    assert len(before) == 31
    drop_events(events.parent, last_step)
    kept = [record for record in before if step_of(record) <= last_step]
    assert 1 <= len(kept) < 31
    assert events.read_bytes() == b"".join(kept)
    assert names(events.parent) == sorted([events.name, "other.txt"])
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert sorted(value.step for value in accumulator.Scalars("value")) == list(range(last_step + 1))


@pytest.mark.parametrize("n_cut", [1, 5, 13, 40])
@pytest.mark.parametrize("tail", [b"", bytes(50), b"\xff" * 50], ids=["cut", "zeros", "noise"])
def test_an_event_that_was_cut_short_is_dropped(events: Path, n_cut: int, tail: bytes):
    content = events.read_bytes()
    assert content[-n_cut:] != tail[:n_cut]
    events.write_bytes(content[:-n_cut] + tail)
    drop_events(events.parent, 100)
    assert events.read_bytes() == b"".join(records(content)[:-1])


def test_event_files_without_anything_to_drop_are_not_written(events: Path):
    (events.parent / "events.out.tfevents.0.empty").touch()

    def files() -> dict[str, Any]:
        stats = {path: path.stat() for path in events.parent.iterdir()}
        return {path.name: (stat.st_mtime_ns, stat.st_ino, path.read_bytes()) for path, stat in stats.items()}

    before = files()
    drop_events(events.parent, 9)
    assert files() == before


def test_events_go_on_where_a_process_was_killed_while_it_dropped_some(events: Path):
    """TensorBoard reads every file with "tfevents" in its name."""
    unfinished = events.with_name(f".{events.name}.tmp")
    unfinished.write_bytes(events.read_bytes())
    drop_events(events.parent, 5)
    assert not unfinished.exists()


MakeEnv = Callable[[Path, bool], Any]
opened: list[VecEnv] = []


@pytest.fixture(autouse=True)
def closed_files() -> Iterator[None]:
    """``Monitor`` files are closed after each test."""
    yield
    while opened:
        opened.pop().close()


def monitored(folder: Path, override_existing: bool, n_envs: int = 1, vec_env_class: Any = DummyVecEnv) -> VecEnv:
    def make(index: int) -> Callable[[], gym.Env]:
        path = str(folder / str(index))
        return lambda: Monitor(RandomLengthEnv(9), path, override_existing=override_existing)

    opened.append(vec_env_class([make(index) for index in range(n_envs)]))
    return opened[-1]


def vec_monitored(folder: Path, override_existing: bool) -> VecEnv:
    """SB3's ``VecMonitor`` has no argument for it."""
    env = VecMonitor(EpisodeVecEnv([lambda: RandomLengthEnv(9)]))
    header = dict(t_start=env.t_start, env_id="mine")
    env.results_writer = ResultsWriter(str(folder / "all"), header=header, override_existing=override_existing)
    opened.append(env)
    return env


MONITORED: dict[str, tuple[MakeEnv, dict[str, Any]]] = {
    "one": (monitored, {}),
    "members": (lambda folder, override: monitored(folder, override, 3), dict(n_steps=8)),
    "wrapped": (lambda folder, override: VecCheckNan(monitored(folder, override, 1, EpisodeVecEnv)), {}),
    "vec_monitor": (vec_monitored, {}),
}


def rows(folder: Path) -> dict[str, list[str]]:
    """Return and length of each episode in each ``Monitor`` file."""
    found = {}
    for path in sorted(folder.glob("*.monitor.csv")):
        header, names_, *lines = path.read_text().splitlines()
        assert header.startswith("#{") and names_ == "r,l,t"
        found[path.name] = [line.rsplit(",", 1)[0] for line in lines]
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of all that a TensorBoard log has, but of speed, in the order in which they are there."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
        if not name.startswith("time/")
    }


def dump_now_and_then(callback: Any) -> None:
    """Write what is logged until now within a rollout, as an evaluation does."""
    if callback.locals["n_steps"] % 2 == 0:
        callback.logger.record("mine/steps", callback.num_timesteps)
        callback.logger.dump(callback.num_timesteps)


def interrupted(folder: Path, env: Any, n_updates: int = 3, **kwargs: Any) -> Path:
    """Train until a signal stops it, within the rollout after so many updates; the path of the checkpoint."""

    def kill(callback: Any) -> None:
        # When the first episode of the rollout is over
        if callback.model._n_updates == n_updates and callback.locals["dones"].any():
            signal.raise_signal(signal.SIGTERM)

    callbacks_ = [Each(step=dump_now_and_then), Each(step=kill), AtomicCheckpointCallback(folder)]
    stop_by_signal(signal.SIGTERM, callbacks_, make_model(env, **kwargs))
    path = newest_checkpoint(folder)
    assert path is not None
    return path


@pytest.mark.parametrize("name", MONITORED)
@pytest.mark.parametrize("n_updates", [0, 3])
def test_logs_of_a_run_that_goes_on_are_those_of_one_that_did_not_stop(name: str, n_updates: int, tmp_path: Path):
    """Rows of episodes and events: none is there twice, none is missing, and the time of the rows goes on."""
    make_env, kwargs = MONITORED[name]
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()

    log, folder, begun = tmp_path / "whole", tmp_path / "parts", []
    learn_all(make_model(make_env(log, True), tensorboard_log=str(log), **kwargs), Each(step=dump_now_and_then))
    path = interrupted(folder, make_env(folder, True), n_updates, tensorboard_log=str(folder), **kwargs)
    n_rows = sum(map(len, rows(folder).values()))
    look = at("start", n_updates, lambda: begun.append(sum(map(len, rows(folder).values()))))
    dump = Each(step=dump_now_and_then)
    learn_all(REINFORCE.load(path, make_env(folder, False)), [dump, look, AtomicCheckpointCallback(folder)])
    assert rows(folder) == rows(log)
    assert scalars(folder / TENSORBOARD) == scalars(log / TENSORBOARD) != {}
    # The rollout had finished episodes when it was stopped, of which the rows were removed
    assert begun[0] < n_rows
    for path in folder.glob("*.monitor.csv"):
        times = np.loadtxt(path, delimiter=",", skiprows=2)[:, 2]
        assert (np.diff(times) >= 0).all()
    assert len(load_results(str(folder))) == sum(map(len, rows(folder).values()))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """The checkpoint of a run that was stopped, beside its logs."""
    return interrupted(tmp_path, monitored(tmp_path, True), tensorboard_log=str(tmp_path))


def events_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / TENSORBOARD).iterdir()}


def test_nothing_is_removed_when_a_model_has_learned_since_it_was_loaded(parts: Path, tmp_path: Path):
    model = REINFORCE.load(parts, monitored(tmp_path, False))
    model.learn(1, reset_num_timesteps=False)
    before, events_before = (tmp_path / "0.monitor.csv").read_bytes(), events_of(tmp_path)
    learn_all(model, AtomicCheckpointCallback(tmp_path))
    assert (tmp_path / "0.monitor.csv").read_bytes().startswith(before)
    after = events_of(tmp_path)
    assert all(after[name] == content for name, content in events_before.items())


def test_nothing_is_removed_when_a_model_begins_anew(parts: Path, tmp_path: Path):
    before, events_before = (tmp_path / "0.monitor.csv").read_bytes(), events_of(tmp_path)
    REINFORCE.load(parts, monitored(tmp_path, False)).learn(60, AtomicCheckpointCallback(tmp_path / "other"))
    assert (tmp_path / "0.monitor.csv").read_bytes().startswith(before)
    assert events_of(tmp_path) == events_before


def test_nothing_is_removed_by_a_model_that_was_saved_after_it_was_loaded(parts: Path, tmp_path: Path):
    """A file that is no checkpoint has no sizes."""
    REINFORCE.load(parts).save(tmp_path / "model")
    model = REINFORCE.load(tmp_path / "model", monitored(tmp_path, False))
    assert not hasattr(model, "_monitor_sizes")
    before, events_before = (tmp_path / "0.monitor.csv").read_bytes(), events_of(tmp_path)
    learn_all(model, AtomicCheckpointCallback(tmp_path))
    assert (tmp_path / "0.monitor.csv").read_bytes().startswith(before)
    assert all(events_of(tmp_path)[name] == content for name, content in events_before.items())


@pytest.mark.parametrize("n_calls", [0, 1])
def test_a_model_that_is_saved_in_training_has_no_sizes_either(n_calls: int, parts: Path, tmp_path: Path):
    model = REINFORCE.load(parts, monitored(tmp_path, False))
    saved = at("start", 3 + n_calls, lambda: model.save(tmp_path / "model"))
    learn_all(model, [saved, AtomicCheckpointCallback(tmp_path, every_n_updates=1)])
    assert not hasattr(REINFORCE.load(tmp_path / "model"), "_monitor_sizes")


def test_the_log_of_another_run_stays(parts: Path, tmp_path: Path):
    """In the same folder of TensorBoard, where SB3 takes the latest run for the one that goes on."""
    make_model(seed=1, tensorboard_log=str(tmp_path)).learn(TOTAL)
    log = tmp_path / "REINFORCE_1"
    before = {path.name: path.read_bytes() for path in log.iterdir()}
    learn_all(REINFORCE.load(parts, monitored(tmp_path, False)), AtomicCheckpointCallback(tmp_path))
    assert all((log / name).read_bytes() == content for name, content in before.items())


def test_a_monitor_file_that_was_begun_anew_stays(parts: Path, tmp_path: Path):
    model = REINFORCE.load(parts, monitored(tmp_path, True))
    n_before = model.num_timesteps
    learn_all(model, AtomicCheckpointCallback(tmp_path))
    (lines,) = rows(tmp_path).values()
    assert sum(int(line.split(",")[1]) for line in lines) == model.num_timesteps - n_before


def test_a_monitor_file_that_was_begun_anew_stays_though_the_old_one_had_no_rows(tmp_path: Path):
    """Its header may be longer than all of the old one."""
    env = monitored(tmp_path, True)
    path = tmp_path / "0.monitor.csv"
    path.write_text(path.read_text().split("t_start")[0] + 't_start": 1.5, "env_id": "None"}\nr,l,t\n')
    kill = at("step", 0, lambda: signal.raise_signal(signal.SIGTERM), step=1)
    stop_by_signal(signal.SIGTERM, [kill, AtomicCheckpointCallback(tmp_path)], make_model(env))
    model = REINFORCE.load(tmp_path / "checkpoint_0_steps", monitored(tmp_path, True))
    learn_all(model, AtomicCheckpointCallback(tmp_path))
    (lines,) = rows(tmp_path).values()
    assert sum(int(line.split(",")[1]) for line in lines) == model.num_timesteps


def test_a_monitor_file_without_a_header_does_not_stop_training(tmp_path: Path):
    """SB3 writes none with ``override_existing=False``, also where there is no file yet."""
    path = interrupted(tmp_path, monitored(tmp_path, False))
    model = learn_all(REINFORCE.load(path, monitored(tmp_path, False)), AtomicCheckpointCallback(tmp_path))
    lengths = [int(line.split(",")[1]) for line in (tmp_path / "0.monitor.csv").read_text().splitlines()]
    assert sum(lengths) == model.num_timesteps


def test_a_row_that_was_cut_short_is_removed(parts: Path, tmp_path: Path):
    path = tmp_path / "0.monitor.csv"
    path.write_bytes(path.read_bytes()[:-3])
    model = learn_all(REINFORCE.load(parts, monitored(tmp_path, False)), AtomicCheckpointCallback(tmp_path))
    (lines,) = rows(tmp_path).values()
    assert sum(int(line.split(",")[1]) for line in lines) == model.num_timesteps


def test_monitor_files_of_one_name_in_two_folders_are_told_apart(tmp_path: Path):
    def make_env(override_existing: bool) -> VecEnv:
        def make(index: int) -> Callable[[], gym.Env]:
            path = str(tmp_path / str(index) / "0")
            return lambda: Monitor(RandomLengthEnv([9, 3][index]), path, override_existing=override_existing)

        opened.append(DummyVecEnv([make(index) for index in range(2)]))
        return opened[-1]

    with pytest.raises(Mine):
        saver = AtomicCheckpointCallback(tmp_path, every_n_updates=1)
        learn_all(make_model(make_env(True), n_steps=10), [at("end", 3, raise_mine), saver])
    path = newest_checkpoint(tmp_path)
    assert path is not None
    model = learn_all(REINFORCE.load(path, make_env(False)), AtomicCheckpointCallback(tmp_path))
    lengths = [int(line.split(",")[1]) for index in "01" for line in rows(tmp_path / index)["0.monitor.csv"]]
    assert sum(lengths) == model.num_timesteps


def test_what_was_written_between_two_calls_of_learn_stays(tmp_path: Path):
    """As by an evaluation in the training environment: nothing of it comes again."""
    model = learn_all(make_model(monitored(tmp_path, True)), AtomicCheckpointCallback(tmp_path))
    evaluate_policy(model, model.get_env(), 3)  # type: ignore[arg-type]
    before = (tmp_path / "0.monitor.csv").read_bytes()
    learn_all(model, AtomicCheckpointCallback(tmp_path), total=2 * TOTAL)
    assert (tmp_path / "0.monitor.csv").read_bytes().startswith(before)


def test_environments_in_other_processes_are_trained_with_checkpoints(tmp_path: Path):
    """Their files are left alone."""

    def make_env(override_existing: bool) -> VecEnv:
        return monitored(tmp_path, override_existing, 2, subproc)

    learn_all(make_model(make_env(True), n_steps=10), AtomicCheckpointCallback(tmp_path, every_n_updates=1))
    before, path = (tmp_path / "0.monitor.csv").read_bytes(), newest_checkpoint(tmp_path)
    assert path is not None
    learn_all(REINFORCE.load(path, make_env(False)), AtomicCheckpointCallback(tmp_path), total=2 * TOTAL)
    assert (tmp_path / "0.monitor.csv").read_bytes().startswith(before)


def test_a_log_that_cannot_be_cut_does_not_stop_training(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: REINFORCE
):
    """The disk is full: what comes again is there twice, as after any other logger."""
    model = REINFORCE.load(parts, monitored(tmp_path, False))
    monkeypatch.setattr(callbacks, "open", FullDisk(0), raising=False)
    np.testing.assert_array_equal(weights(learn_all(model, AtomicCheckpointCallback(tmp_path))), weights(whole))
