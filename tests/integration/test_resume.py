"""A model that is saved, loaded and trained on is, to the last bit, the one that trained without a stop, and logs the same."""

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
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_reinforce import REINFORCE, InverseTimeDecay
from tests.envs import RandomEnv, RandomLengthEnv
from tests.integration.common import CHOICE, PAIR, VECTOR

#: What depends on the clock
CLOCK = ("time/fps", "time/between_rollouts", "time/time_elapsed")
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICTIONARY = spaces.Dict(vec=VECTOR, choice=CHOICE)
TOTAL = 150


class Succeeds(gym.Wrapper):
    """Episodes that end by themselves are successes; one step of its life may raise."""

    def __init__(self, env: gym.Env, fails_at: int | None = None):
        super().__init__(env)
        self.fails_at = fails_at
        self.n_steps = 0

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        if self.n_steps == self.fails_at:
            raise OSError("The simulator is gone")
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, info | dict(is_success=terminated)


def vectorized(make: Callable[[], gym.Env], n_envs: int, fails_at: int | None = None) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(Succeeds(make(), fails_at))] * n_envs)


def box(n_envs: int, fails_at: int | None = None) -> DummyVecEnv:
    return vectorized(lambda: RandomLengthEnv(9), n_envs, fails_at)


def discrete(n_envs: int, fails_at: int | None = None) -> DummyVecEnv:
    return vectorized(lambda: RandomLengthEnv(9, CHOICE), n_envs, fails_at)


def with_timeouts(n_envs: int, fails_at: int | None = None, observation_space: spaces.Space = VECTOR) -> DummyVecEnv:
    return vectorized(lambda: RandomEnv(observation_space, PAIR, 7), n_envs, fails_at)


class DropoutExtractor(FlattenExtractor):
    """An extractor whose gradient depends on what PyTorch draws."""

    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space)
        self.dropout = nn.Dropout(0.3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.dropout(super().forward(observations))


def tanh_and_dropout() -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Dropout(0.3))


#: Environments, their number, and arguments of the model; "log_interval" is that of learn()
RUNS: dict[str, tuple[Callable[..., DummyVecEnv], int, dict[str, Any]]] = {
    "box": (box, 1, {}),
    "box_members": (box, 3, dict(n_steps=8)),
    "discrete": (discrete, 1, dict(log_interval=3)),
    "discrete_members": (discrete, 3, dict(n_steps=8, ent_coef=0.01)),
    "timeouts": (with_timeouts, 2, dict(n_steps=10, log_interval=3)),
    "gsde": (box, 2, dict(n_steps=10, use_sde=True, sde_sample_freq=3)),
    "image": (
        partial(with_timeouts, observation_space=IMAGE),
        2,
        dict(policy="CnnPolicy", n_steps=12, policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8))),
    ),
    "dict": (partial(with_timeouts, observation_space=DICTIONARY), 2, dict(policy="MultiInputPolicy", n_steps=10)),
    "dropout_extractor": (
        box,
        1,
        dict(policy_kwargs=dict(features_extractor_class=DropoutExtractor), normalize_observations=False),
    ),
    "dropout_net": (discrete, 2, dict(n_steps=10, policy_kwargs=dict(activation_fn=tanh_and_dropout, net_arch=[8, 8]))),
    "dropout_optimizer": (box, 1, dict(target_kl=None, policy_kwargs=dict(activation_fn=tanh_and_dropout, net_arch=[8]))),
    "policy_of_sb3": (box, 2, dict(policy=ActorCriticPolicy, n_steps=10)),
    "actor_critic": (box, 2, dict(advantage="advantage", n_steps=10)),
    "action_values": (discrete, 1, dict(advantage="q", baseline="quadratic")),
    "target_kl_float": (box, 1, dict(target_kl=0.03)),
    "target_kl_inverse_time": (box, 1, dict(target_kl=InverseTimeDecay(0.05, halving=2))),
    "target_kl_lambda": (box, 1, dict(target_kl=lambda progress: 0.01 + 0.05 * progress**2)),
    "target_kl_linear": (discrete, 2, dict(target_kl=LinearSchedule(0.05, 0.001, 0.9), n_steps=10, log_interval=3)),
    "learning_rate_linear": (box, 1, dict(target_kl=None, learning_rate=LinearSchedule(0.05, 0.001, 0.9))),
    "learning_rate_lambda": (box, 2, dict(target_kl=None, learning_rate=lambda progress: 0.05 * progress, n_steps=10)),
    "n_episodes": (box, 3, dict(n_steps=None, n_episodes=5, log_interval=3)),
    "statistics_of_4_episodes": (with_timeouts, 1, dict(stats_window_size=4)),
}
every_run = pytest.mark.parametrize("name", RUNS)
#: Schedules of the progress look at the end of each call of learn()
SOME = [name for name in RUNS if not any(word in name for word in ("lambda", "linear"))]


class Record(KVWriter):
    """Keeps what is logged, and for which outputs it is not meant."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        values = {key: (repr(value), *key_excluded[key]) for key, value in key_values.items() if key not in CLOCK}
        self.rows.append((step, values))

    def close(self) -> None:
        pass


class Log(BaseCallback):
    """Logs means over what one row is written for, a text for one output only, and numbers of NumPy and PyTorch."""

    def _on_step(self) -> bool:
        self.logger.record_mean("mine/reward", float(self.locals["rewards"].mean()))
        return True

    def _on_rollout_end(self) -> None:
        self.logger.record("mine/text", f"after {self.num_timesteps}", exclude=("tensorboard", "csv"))  # type: ignore[arg-type]
        self.logger.record("mine/return", np.float32(self.model.rollout_buffer.returns.mean()))  # type: ignore[attr-defined]
        self.logger.record_mean("mine/count", np.int64(self.num_timesteps))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models write to a new :class:`Record` with each call of ``learn()``, as they do to SB3's outputs."""
    monkeypatch.setattr(utils, "configure_logger", lambda *_: Logger(None, [Record()]))


class Run:
    """
    A model, and all that it has logged.

    :param name: of the configuration
    :param path: where to load the model from, None for a new one
    :param fails_at: step at which an environment raises
    """

    def __init__(self, name: str, path: Any = None, fails_at: int | None = None):
        make_env, n_envs, kwargs = RUNS[name]
        kwargs = dict(policy="MlpPolicy", n_steps=16, seed=3) | kwargs
        self.name = name
        self.log_interval = kwargs.pop("log_interval", 1)
        self.rows: list[tuple[int, Any]] = []
        env = make_env(n_envs, fails_at)
        self.model = REINFORCE(env=env, **kwargs) if path is None else REINFORCE.load(path, env)
        self.n_loaded = self.model.num_timesteps

    def learn(self, until: int = TOTAL, callback: Any = None) -> "Run":
        """Go on until so many steps."""
        model, is_new = self.model, self.model.num_timesteps == 0
        callbacks = [Log(), *(callback if isinstance(callback, list) else [callback] if callback else [])]
        try:
            model.learn(until - model.num_timesteps, callbacks, self.log_interval, reset_num_timesteps=is_new)
        finally:
            self.rows += model.logger.output_formats[0].rows  # type: ignore[attr-defined]
        return self

    def reload(self, path: Any) -> "Run":
        """What a file of it is loaded as."""
        self.model.save(path)
        return Run(self.name, path)


def bits(state: Any) -> Any:
    """Nested dictionaries and lists with the bytes of tensors and numbers in their place."""
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [bits(value) for value in state]
    if isinstance(state, th.Tensor):
        return state.dtype, tuple(state.shape), state.cpu().numpy().tobytes()
    return repr(state)


def counters(model: REINFORCE) -> dict[str, int]:
    return {name: getattr(model, name) for name in ("num_timesteps", "_n_updates", "_next_episode", "_n_iterations")}


def waiting(model: REINFORCE) -> dict[str, Any]:
    """What is logged, and not written yet."""
    logger = model.logger
    return {
        name: (repr(value), logger.name_to_count[name], logger.name_to_excluded[name])
        for name, value in logger.name_to_value.items()
        if name not in CLOCK
    }


def assert_same_run(resumed: Run, whole: Run) -> None:
    """A run is the rest of another one: it ends in the same state, and has logged the same since it was loaded."""
    assert counters(resumed.model) == counters(whole.model)
    assert bits(resumed.model.get_parameters()) == bits(whole.model.get_parameters())
    for name in ("ep_info_buffer", "ep_success_buffer"):
        statistics, expected = getattr(resumed.model, name), getattr(whole.model, name)
        assert statistics.maxlen == expected.maxlen
        assert list(map(without_time, statistics)) == list(map(without_time, expected))
    assert resumed.rows == [(step, values) for step, values in whole.rows if step > resumed.n_loaded]
    assert waiting(resumed.model) == waiting(whole.model)


def without_time(episode: Any) -> Any:
    return {key: value for key, value in episode.items() if key != "t"} if isinstance(episode, dict) else episode


class SaveAt(BaseCallback):
    """Saves at the beginning and at the end of the rollouts before these updates."""

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


class StopAt(BaseCallback):
    """Stops training at so many calls."""

    def __init__(self, n_calls: int):
        super().__init__()
        self.last = n_calls

    def _on_step(self) -> bool:
        return self.n_calls < self.last


@every_run
def test_a_file_of_any_moment_goes_on_as_the_run_that_did_not_stop(name: str, tmp_path: Any):
    """Saved at the beginning, within and at the end of rollouts; and saving changes nothing."""
    whole = Run(name).learn()
    assert whole.model._n_updates >= 5 and len(whole.rows) >= 2
    n_calls = TOTAL // RUNS[name][1]
    within = CheckpointCallback(n_calls // 3, tmp_path, name_prefix="within")
    saving = Run(name).learn(callback=[within, SaveAt(tmp_path, (0, 3))])
    assert_same_run(saving, whole)

    paths = sorted(tmp_path.glob("*.zip"))
    assert len(paths) >= 6
    n_updates = set()
    for path in paths:
        resumed = Run(name, path)
        n_updates.add(resumed.model._n_updates)
        assert_same_run(resumed.learn(), whole)
    assert len(n_updates) >= 3


@every_run
def test_a_run_in_pieces_goes_on_from_a_file_between_them(name: str, tmp_path: Any):
    whole = Run(name).learn(60)
    resumed = whole.reload(tmp_path / "model")
    assert_same_run(resumed.learn(), whole.learn())


@pytest.mark.parametrize("are_loaded", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_pieces_log_what_one_call_logs(name: str, are_loaded: bool, tmp_path: Any):
    """Each is one rollout; in this process, or loaded from a file."""
    whole, piece = Run(name).learn(), Run(name)
    rows, n_pieces = [], 0
    while piece.model.num_timesteps < TOTAL:
        if are_loaded and n_pieces > 0:
            rows, piece = rows + piece.rows, piece.reload(tmp_path / "model")
        piece.learn(piece.model.num_timesteps + 1)
        n_pieces += 1
    assert n_pieces == piece.model._n_updates >= 5
    piece.rows, piece.n_loaded = rows + piece.rows, 0
    assert_same_run(piece, whole)


@every_run
def test_a_run_that_was_stopped_within_rollouts_goes_on_each_time(name: str, tmp_path: Any):
    """By a callback, twice in a row, and saved after ``learn()`` has returned."""
    whole = Run(name).learn()
    n_calls = TOTAL // RUNS[name][1]
    stopped = Run(name).learn(callback=StopAt(n_calls // 2))
    n_stopped = stopped.model.num_timesteps
    first = stopped.reload(tmp_path / "first")
    # The steps of the rollout do not count in the file, and are not taken from the model that was saved
    assert 0 < first.n_loaded < n_stopped == stopped.model.num_timesteps
    first.learn(callback=StopAt(n_calls // 4))
    second = first.reload(tmp_path / "second")
    assert second.n_loaded >= first.n_loaded
    assert_same_run(second.learn(), whole)


@every_run
def test_a_run_whose_environment_has_failed_goes_on(name: str, tmp_path: Any):
    whole = Run(name).learn()
    failed = Run(name, fails_at=TOTAL // RUNS[name][1] // 2)
    with pytest.raises(RuntimeError, match="The simulator is gone"):
        failed.learn()
    resumed = failed.reload(tmp_path / "model")
    assert 0 < resumed.n_loaded <= failed.model.num_timesteps < TOTAL
    assert_same_run(resumed.learn(), whole)
