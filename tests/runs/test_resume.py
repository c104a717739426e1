"""A run that is saved, loaded and continued equals the run without a stop to the bit, and logs the same."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common import utils
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_reinforce import REINFORCE
from tests.envs import RandomEnv, RandomLengthEnv
from tests.runs.common import CHOICE, PAIR, VECTOR

IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICTIONARY = spaces.Dict(vec=VECTOR, choice=CHOICE)
TOTAL = 150


class Succeeds(gym.Wrapper):
    """Episodes that terminate are successes."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, info | dict(is_success=terminated)


def tanh_and_dropout() -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Dropout(0.3))


BOX, DISCRETE = partial(RandomLengthEnv, 9), partial(RandomLengthEnv, 9, CHOICE)


def with_timeouts(observation_space: spaces.Space) -> Callable[[], gym.Env]:
    return partial(RandomEnv, observation_space, PAIR, 7)


#: Environment, number of environments, and arguments of the model; "log_interval" is an argument of learn()
RUNS: dict[str, tuple[Callable[[], gym.Env], int, dict[str, Any]]] = {
    "three_environments": (BOX, 3, dict(n_steps=8)),
    "action_values_and_dropout": (
        DISCRETE,
        1,
        dict(advantage="q", log_interval=3, policy_kwargs=dict(activation_fn=tanh_and_dropout, net_arch=[8, 8])),
    ),
    "dictionary_and_timeouts": (
        with_timeouts(DICTIONARY),
        2,
        dict(policy="MultiInputPolicy", n_steps=None, n_episodes=5, stats_window_size=4, bootstrap_timeouts=True),
    ),
    "gsde": (BOX, 2, dict(n_steps=10, use_sde=True, sde_sample_freq=3, log_interval=2)),
    "optimizer_with_schedule": (BOX, 1, dict(target_kl=None, learning_rate=LinearSchedule(0.05, 0.001, 0.9))),
}
MORE: dict[str, tuple[Callable[[], gym.Env], int, dict[str, Any]]] = {
    "image": (
        with_timeouts(IMAGE),
        2,
        dict(policy="CnnPolicy", n_steps=12, policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8))),
    ),
    "advantage": (BOX, 2, dict(advantage="advantage", n_steps=10, ent_coef=0.01)),
    "dropout_and_optimizer": (BOX, 1, dict(target_kl=None, policy_kwargs=dict(activation_fn=tanh_and_dropout, net_arch=[8]))),
}
every_run = pytest.mark.parametrize("name", [*RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])


class Record(KVWriter):
    """Keeps logged values and the outputs that are excluded, without times."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        values = {key: (repr(value), *key_excluded[key]) for key, value in key_values.items() if not is_time(key)}
        self.rows.append((step, values))

    def close(self) -> None:
        pass


def is_time(name: str) -> bool:
    return name in ("time/fps", "time/between_rollouts", "time/time_elapsed")


class Log(BaseCallback):
    """Logs means over several rollouts, a text for one output, and numbers of NumPy."""

    def _on_step(self) -> bool:
        self.logger.record_mean("mine/reward", float(self.locals["rewards"].mean()))
        return True

    def _on_rollout_end(self) -> None:
        self.logger.record("mine/text", f"after {self.num_timesteps}", exclude=("tensorboard", "csv"))  # type: ignore[arg-type]
        self.logger.record("mine/return", np.float32(self.model.rollout_buffer.returns.mean()))  # type: ignore[attr-defined]
        self.logger.record_mean("mine/count", np.int64(self.num_timesteps))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log to a new :class:`Record` in each call of ``learn()``."""
    monkeypatch.setattr(utils, "configure_logger", lambda *_: Logger(None, [Record()]))


class Run:
    """
    A model with everything that it has logged.

    :param name: of the configuration
    :param path: file to load the model from, None for a new one
    """

    def __init__(self, name: str, path: Any = None):
        make_env, n_envs, kwargs = (RUNS | MORE)[name]
        kwargs = dict(policy="MlpPolicy", n_steps=16, seed=3) | kwargs
        self.name = name
        self.log_interval = kwargs.pop("log_interval", 1)
        self.rows: list[tuple[int, Any]] = []
        env = DummyVecEnv([lambda: Monitor(Succeeds(make_env()))] * n_envs)
        self.model = REINFORCE(env=env, **kwargs) if path is None else REINFORCE.load(path, env)
        self.n_loaded = self.model.num_timesteps

    def learn(self, until: int = TOTAL, callback: Any = None) -> "Run":
        """Train until a number of steps."""
        model, is_new = self.model, self.model.num_timesteps == 0
        callbacks = [Log(), *(callback if isinstance(callback, list) else [callback] if callback else [])]
        try:
            model.learn(until - model.num_timesteps, callbacks, self.log_interval, reset_num_timesteps=is_new)
        finally:
            self.rows += model.logger.output_formats[0].rows  # type: ignore[attr-defined]
        return self

    def reload(self, path: Any) -> "Run":
        """Save the model, and load it."""
        self.model.save(path)
        return Run(self.name, path)


def bits(state: Any) -> Any:
    """Nested dictionaries and lists with the bytes of their tensors and numbers."""
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [bits(value) for value in state]
    if isinstance(state, th.Tensor):
        return state.dtype, tuple(state.shape), state.cpu().numpy().tobytes()
    return repr(state)


def summary(model: REINFORCE) -> dict[str, Any]:
    """Parameters, counters, statistics of episodes and pending logs of a model, without times."""
    logger, times = model.logger, {"t"}
    episodes = [{key: info[key] for key in info.keys() - times} for info in model.ep_info_buffer or ()]
    assert model.ep_success_buffer is not None and model.ep_info_buffer is not None
    return dict(
        parameters=[bits(model.get_parameters()), model.damping_scores.tobytes()],
        counters=[getattr(model, name) for name in ("num_timesteps", "_n_updates", "_next_episode", "_n_iterations")],
        episodes=[episodes, list(model.ep_success_buffer), model.ep_info_buffer.maxlen, model.ep_success_buffer.maxlen],
        pending={
            name: (repr(value), logger.name_to_count[name], logger.name_to_excluded[name])
            for name, value in logger.name_to_value.items()
            if not is_time(name)
        },
    )


def assert_same_run(resumed: Run, whole: Run) -> None:
    """Check that a run ends like another one, and has logged the same since it was loaded."""
    assert summary(resumed.model) == summary(whole.model)
    assert resumed.rows == [(step, values) for step, values in whole.rows if step > resumed.n_loaded]


class SaveAt(BaseCallback):
    """Saves at the start and at the end of the rollouts before the given updates."""

    def __init__(self, folder: Any, n_updates: tuple[int, ...]):
        super().__init__()
        self.folder = folder
        self.n_updates = n_updates

    def _save(self, moment: str) -> None:
        if self.model._n_updates in self.n_updates:
            self.model.save(self.folder / f"{moment}_{self.model._n_updates}")

    def _on_rollout_start(self) -> None:
        self._save("start")

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._save("end")


@every_run
def test_files_saved_at_any_moment_resume_exactly(name: str, tmp_path: Any):
    """Before, within and after rollouts. Saving does not change the run."""
    whole = Run(name).learn()
    assert whole.model._n_updates >= 4 and len(whole.rows) >= 1
    n_calls = TOTAL // (RUNS | MORE)[name][1]
    within = CheckpointCallback(n_calls // 2 - 3, tmp_path, name_prefix="within")
    saving = Run(name).learn(callback=[within, SaveAt(tmp_path, (0, 3))])
    assert_same_run(saving, whole)
    paths = sorted(tmp_path.glob("*.zip"))
    assert len(paths) >= 5
    for path in paths:
        assert_same_run(Run(name, path).learn(), whole)


@pytest.mark.parametrize("are_loaded", [False, True])
@pytest.mark.parametrize("name", ["three_environments", "action_values_and_dropout", "dictionary_and_timeouts"])
def test_one_update_per_call_of_learn_equals_one_call(name: str, are_loaded: bool, tmp_path: Any):
    """In one process, or saved and loaded after each update. Rows of the log may have means over several calls."""
    whole, piece = Run(name).learn(), Run(name)
    rows, n_pieces = [], 0
    while piece.model.num_timesteps < TOTAL:
        if are_loaded and n_pieces > 0:
            rows, piece = rows + piece.rows, piece.reload(tmp_path / "model")
        piece.learn(piece.model.num_timesteps + 1)
        n_pieces += 1
    assert n_pieces == piece.model._n_updates >= 4
    piece.rows, piece.n_loaded = rows + piece.rows, 0
    assert_same_run(piece, whole)
