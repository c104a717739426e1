"""The example, ``examples/lunar_lander.py``, with short episodes, many checkpoints and no video: tests kill it."""

import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import lunar_lander
from stable_baselines3.common.callbacks import EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env

from sb3_reinforce import AtomicCheckpointCallback


def make_short_env(*args: Any, env_kwargs: dict[str, Any], **kwargs: Any) -> Any:
    return make_vec_env(*args, env_kwargs=env_kwargs | dict(max_episode_steps=50), **kwargs)


def main(*arguments: str, printed: Path) -> None:
    """
    :param arguments: of the example
    :param printed: file for what it prints
    """
    changes: Any = lunar_lander
    changes.make_vec_env = make_short_env
    changes.AtomicCheckpointCallback = partial(AtomicCheckpointCallback, every_n_updates=1)
    changes.EveryNTimesteps = lambda n_steps, callback: EveryNTimesteps(1500, callback)
    changes.record_video = lambda model, path: 0.0
    sys.argv = ["lunar_lander.py", *arguments]
    with open(printed, "w") as file, redirect_stdout(file):
        lunar_lander.main()
