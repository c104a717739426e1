"""
A training that ``test_killing.py`` kills: it begins in a folder, or goes on from the newest checkpoint there.

    python -m tests.integration.killed_training FOLDER [--full-disk-seed N]

``FOLDER/progress`` has the steps taken until now. ``FOLDER/model.zip`` is there when training is done.
"""

import argparse
import builtins
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE, AtomicCheckpointCallback, newest_checkpoint
from tests.envs import RandomLengthEnv

TOTAL = 900
N_ENVS = 2


class Progress(BaseCallback):
    """Writes the number of steps into a file, in place."""

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


def fill_the_disk(folder: Path, seed: int) -> None:
    """Two of three files that are written into a folder from now on take some bytes, and then there is no space left."""
    rng, whole_open = np.random.default_rng(seed), builtins.open

    def write_some(file: Any, content: bytes) -> None:
        type(file).write(file, content[: rng.integers(len(content))])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class FullFile:
        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> "FullFile":
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            write_some(self.file, content)

    def open_on_full_disk(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = whole_open(path, mode, *args, **kwargs)
        is_full = mode == "wb" and Path(path).parent == folder and rng.random() < 2 / 3
        return FullFile(file) if is_full else file

    builtins.open = open_on_full_disk


def train(folder: Path, full_disk_seed: int | None = None) -> None:
    """
    :param folder: for all files of the run
    :param full_disk_seed: of the moments at which the disk is full, None if it never is
    """
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
    if full_disk_seed is not None:
        fill_the_disk(checkpoints, full_disk_seed)
    callbacks = [Progress(folder / "progress"), AtomicCheckpointCallback(checkpoints, every_n_updates=1)]
    model.learn(TOTAL - model.num_timesteps, callbacks, reset_num_timesteps=False)
    model.save(folder / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full-disk-seed", type=int)
    arguments = parser.parse_args()
    train(arguments.folder, arguments.full_disk_seed)
