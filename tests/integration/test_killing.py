"""Training processes that are killed, at any moment, go on from their newest checkpoint as if nobody had killed them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_reinforce import REINFORCE, newest_checkpoint
from tests.integration.common import assert_same_parameters, start_process
from tests.integration.killed_training import N_ENVS, TOTAL, train

ROOT = Path(__file__).parent.parent.parent


class Program:
    """A training in an interpreter of its own."""

    def __init__(self, folder: Path, full_disk_seed: int | None = None):
        options = [] if full_disk_seed is None else ["--full-disk-seed", str(full_disk_seed)]
        command = [sys.executable, "-m", "tests.integration.killed_training", str(folder), *options]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int:
        """Its exit code, or minus the signal that has ended it."""
        return self.process.wait(timeout=300)


class Fork:
    """A training in a process that begins with what takes two seconds to import."""

    def __init__(self, folder: Path, full_disk_seed: int | None = None):
        self.process = start_process(train, folder, full_disk_seed)

    def is_running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)

    def wait(self) -> int:
        self.process.join(timeout=300)
        return self.process.exitcode


def steps_taken(folder: Path) -> int:
    try:
        return int((folder / "progress").read_text() or 0)
    except FileNotFoundError:
        return 0


def kill_at(process: Any, folder: Path, n_steps: int, seconds: float) -> int:
    """Kill a training some time after it has taken so many steps; the steps it had taken by then."""
    deadline = time.monotonic() + 300
    while process.is_running() and steps_taken(folder) < n_steps and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "It ended before it was killed"
    assert not (folder / "model.zip").exists()
    return steps_taken(folder)


def rows(folder: Path) -> list[list[str]]:
    """Return and length of each episode of each environment."""
    found = []
    for index in range(N_ENVS):
        header, names, *lines = (folder / f"{index}.monitor.csv").read_text().splitlines()
        assert header.startswith("#{") and names == "r,l,t"
        found.append([line.rsplit(",", 1)[0] for line in lines])
        times = [float(line.rsplit(",", 1)[1]) for line in lines]
        assert times == sorted(times)
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of all that TensorBoard shows, but of speed."""
    (log,) = (folder / "tensorboard").iterdir()
    assert all(path.name.startswith("events.out.tfevents.") for path in log.iterdir())
    # All of them, however many there are
    accumulator = EventAccumulator(str(log), size_guidance=dict(scalars=0))
    accumulator.Reload()
    names = set(accumulator.Tags()["scalars"]) - {"time/fps", "time/between_rollouts"}
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)] for name in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a training that nobody has killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert Program(folder).wait() == 0
    yield folder


def assert_same_runs(folder: Path, whole: Path) -> None:
    model, expected = (REINFORCE.load(path / "model") for path in (folder, whole))
    assert_same_parameters(model, expected)
    for name in ("num_timesteps", "_n_updates", "_next_episode", "_n_iterations"):
        assert getattr(model, name) == getattr(expected, name) > 0
    assert rows(folder) == rows(whole)
    assert scalars(folder) == scalars(whole)
    assert len(scalars(folder)["train/kl_divergence_loss"]) == expected._n_updates - 1
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert len(names) <= 3 and all(name.endswith("_steps.zip") for name in names)


def cut_newest(folder: Path, rng: np.random.Generator) -> None:
    """Cut the newest checkpoint short, as if it were not written in full."""
    path = newest_checkpoint(folder / "checkpoints")
    if path is not None:
        os.truncate(path, rng.integers(path.stat().st_size))


def assert_killed_training_goes_on(start: Any, spoil: str, n_kills: int, folder: Path, whole: Path, seed: int) -> None:
    """
    Kill a training again and again, at random moments, and let the last one end.

    :param start: makes a process
    :param spoil: "newest_cut" to cut the newest checkpoint after each kill, "full_disk" for a disk that often is full
    :param n_kills: the first one is within the first rollout
    """
    rng = np.random.default_rng(seed)
    targets = np.sort([2, *rng.integers(30, int(0.7 * TOTAL), n_kills - 1)])
    killed_at, loaded = [], []
    for target in [*targets, None]:
        process = start(folder, int(rng.integers(1000)) if spoil == "full_disk" else None)
        if target is None:
            assert process.wait() == 0
            break
        killed_at.append(kill_at(process, folder, target, rng.uniform(0, 0.02)))
        if spoil == "newest_cut":
            cut_newest(folder, rng)
        newest = newest_checkpoint(folder / "checkpoints")
        loaded.append(0 if newest is None else REINFORCE.load(newest).num_timesteps)
        (folder / "progress").unlink(missing_ok=True)
    # In the middle of training, each of them: not before its first step, and not after its last
    assert all(target <= n_steps < TOTAL for target, n_steps in zip(targets, killed_at, strict=True))
    assert max(loaded) > 0
    if spoil == "nothing":
        assert loaded == sorted(loaded)
    assert all(n_loaded <= n_steps for n_loaded, n_steps in zip(loaded, killed_at, strict=True))
    assert_same_runs(folder, whole)


def test_the_same_training_twice_is_the_same(whole: Path, tmp_path: Path):
    """Also in a process of the other kind."""
    assert Fork(tmp_path).wait() == 0
    assert_same_runs(tmp_path, whole)


@pytest.mark.parametrize("spoil", ["nothing", "newest_cut", "full_disk"])
def test_a_training_that_is_killed_5_times_goes_on(spoil: str, whole: Path, tmp_path: Path):
    assert_killed_training_goes_on(Fork, spoil, 5, tmp_path, whole, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["nothing", "newest_cut", "full_disk"])
@pytest.mark.parametrize("start", [Program, Fork])
def test_a_training_that_is_killed_20_times_goes_on(start: Any, spoil: str, whole: Path, tmp_path: Path):
    assert_killed_training_goes_on(start, spoil, 20, tmp_path, whole, seed=2)
