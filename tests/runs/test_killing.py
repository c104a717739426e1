"""A training process that is killed at any moment resumes from its newest checkpoint as if it had never been killed."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE, AtomicCheckpointCallback, newest_checkpoint
from tests.envs import RandomLengthEnv
from tests.runs.common import assert_same_parameters, monitor_rows, scalars, start_process

pytestmark = pytest.mark.slow
TOTAL = 900
N_ENVS = 2


class Progress(BaseCallback):
    """Writes the number of steps to a file, in place."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def _on_training_start(self) -> None:
        self.file = open(self.path, "w")

    def _on_step(self) -> bool:
        self.file.seek(0)
        self.file.write(f"{self.num_timesteps:8}")
        self.file.flush()
        return True


def train(folder: Path) -> None:
    """Train until ``TOTAL`` steps in a new folder, or from its newest checkpoint."""
    th.set_num_threads(1)
    checkpoints, tensorboard = folder / "checkpoints", folder / "tensorboard"
    checkpoint = newest_checkpoint(checkpoints)

    def make_env(index: int) -> Monitor:
        return Monitor(RandomLengthEnv(20), str(folder / str(index)), override_existing=checkpoint is None)

    env = DummyVecEnv([lambda index=index: make_env(index) for index in range(N_ENVS)])  # type: ignore[misc]
    if checkpoint is None:
        shutil.rmtree(tensorboard, ignore_errors=True)
        kwargs: dict[str, Any] = dict(n_steps=15, seed=4, policy_kwargs=dict(net_arch=[8]), tensorboard_log=str(tensorboard))
        model = REINFORCE("MlpPolicy", env, **kwargs)
    else:
        model = REINFORCE.load(checkpoint, env)
    callbacks = [Progress(folder / "progress"), AtomicCheckpointCallback(checkpoints, every_n_updates=1)]
    model.learn(TOTAL - model.num_timesteps, callbacks, reset_num_timesteps=False)
    model.save(folder / "model")


def kill_at(process: Any, folder: Path, n_steps: int, seconds: float) -> int:
    """Kill a process some time after a number of steps, and return its number of steps."""
    progress, deadline = folder / "progress", time.monotonic() + 300
    while process.is_alive() and time.monotonic() < deadline:
        if progress.exists() and int(progress.read_text() or 0) >= n_steps:
            break
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL and not (folder / "model.zip").exists()
    return int(progress.read_text() or 0)


def assert_same_runs(folder: Path, whole: Path) -> None:
    model, expected = (REINFORCE.load(path / "model") for path in (folder, whole))
    assert_same_parameters(model, expected)
    for name in ("num_timesteps", "_n_updates", "_next_episode", "_n_iterations"):
        assert getattr(model, name) == getattr(expected, name) > 0
    assert monitor_rows(folder) == monitor_rows(whole)
    found, of_whole = (scalars(log) for path in (folder, whole) for log in (path / "tensorboard").iterdir())
    assert found == of_whole and len(found["train/kl_divergence_loss"]) == expected._n_updates - 1
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert len(names) <= 3 and all(name.endswith("_steps.zip") for name in names)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not killed."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


@pytest.mark.parametrize("spoil", ["nothing", "truncated_checkpoint"])
def test_a_run_that_is_killed_5_times_resumes_exactly(spoil: str, whole: Path, tmp_path: Path):
    """Also if the newest checkpoint is incomplete."""
    rng = np.random.default_rng(1)
    # The first one is within the first rollout
    targets = np.sort([2, *rng.integers(30, int(0.7 * TOTAL), 4)])
    killed_at, loaded = [], []
    for target in targets:
        process = start_process(train, tmp_path)
        killed_at.append(kill_at(process, tmp_path, target, rng.uniform(0, 0.02)))
        newest = newest_checkpoint(tmp_path / "checkpoints")
        if spoil == "truncated_checkpoint" and newest is not None:
            os.truncate(newest, rng.integers(newest.stat().st_size))
            newest = newest_checkpoint(tmp_path / "checkpoints")
        loaded.append(0 if newest is None else REINFORCE.load(newest).num_timesteps)
        (tmp_path / "progress").unlink()
    process = start_process(train, tmp_path)
    process.join(timeout=300)
    assert process.exitcode == 0
    assert all(target <= n_steps < TOTAL for target, n_steps in zip(targets, killed_at, strict=True))
    assert max(loaded) > 0 and all(n_loaded <= n_steps for n_loaded, n_steps in zip(loaded, killed_at, strict=True))
    assert_same_runs(tmp_path, whole)
