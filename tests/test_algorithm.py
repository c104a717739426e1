"""The base class of algorithms of whole episodes: learn, undo, save, load, environments and messages."""

import inspect
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import NormalizeReward
from stable_baselines3 import A2C
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.algorithm import EpisodicAlgorithm
from sb3_reinforce.episodes.schedule import TORCH_LOCK
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from tests.envs import RandomLengthEnv, ScriptedEnv, Simulators
from tests.runs.common import assert_same, scalars, state

#: A model that learns from at least 20 steps in little time
SMALL: dict[str, Any] = dict(n_steps=20, n_episodes=None, seed=0, policy_kwargs=dict(net_arch=[4]))
COUNTERS = ("num_timesteps", "_n_updates", "_next_episode", "_n_iterations")


def make_model(env: Any = None, **kwargs: Any) -> REINFORCE:
    return REINFORCE("MlpPolicy", RandomLengthEnv(9) if env is None else env, **(SMALL | kwargs))


def vector(model: BaseAlgorithm) -> np.ndarray:
    return model.policy.parameters_to_vector()  # type: ignore[attr-defined]


def test_subclasses_implement_policy_and_advantages():
    for method in (EpisodicAlgorithm._make_policy, EpisodicAlgorithm._compute_advantages):
        with pytest.raises(NotImplementedError):
            method(make_model())


@pytest.mark.parametrize("name", ["learn", "save", "load", "set_env", "set_random_seed"])
@pytest.mark.parametrize("algorithm", [EpisodicAlgorithm, REINFORCE])
def test_methods_have_the_signatures_of_sb3(algorithm: type, name: str):
    """Editors show them, and arguments may be given by position."""
    own, sb3 = (inspect.signature(getattr(cls, name)).parameters for cls in (algorithm, A2C))
    assert [(p.name, p.kind) for p in own.values()] == [(p.name, p.kind) for p in sb3.values()]
    # The name of a log is that of the class
    defaults = dict(tb_log_name=None, log_interval=1)
    assert all(parameter.default == defaults.get(parameter.name, sb3[parameter.name].default) for parameter in own.values())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_model(normalize_observations=True).learn(50).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("how", ["keyword argument", "custom object", "custom object by position"])
def test_arguments_of_load_are_checked_however_they_are_given(path: Path, how: str):
    def load(**changes: Any) -> REINFORCE:
        if how == "keyword argument":
            return REINFORCE.load(path, RandomLengthEnv(9), **changes)
        if how == "custom object":
            return REINFORCE.load(path, env=RandomLengthEnv(9), custom_objects=changes)
        return REINFORCE.load(path, RandomLengthEnv(9), "cpu", changes)

    fixed = dict(advantage="q", baseline="linear", baseline_memory=0.0, baseline_kwargs=dict(ridge=0.5))
    for name, value in (fixed | dict(normalize_observations=False)).items():
        with pytest.raises(ValueError, match=f"{name}=.* cannot be given to a model whose policy was fitted with {name}="):
            load(**{name: value})
    for name, value in dict(n_steps=0, gamma=1.5, target_kl=0, learning_rate=-1.0, max_episode_steps=0).items():
        with pytest.raises(ValueError, match=name):
            load(**{name: value})
    # The saved value of a fixed argument is accepted
    model = load(n_steps=40, gamma=0.5, max_episode_steps=5, advantage="monte_carlo").learn(1)
    assert (model.n_steps, model.rollout_buffer.gamma, model.max_episode_steps) == (40, 0.5, 5)
    assert len(model.rollout_buffer.rewards) >= 40 and max(info["l"] for info in model.ep_info_buffer or ()) <= 5


def test_workers_are_not_saved(path: Path):
    make_model(lambda: RandomLengthEnv(9), workers=2).save(path)
    assert REINFORCE.load(path).workers is None
    assert REINFORCE.load(path, lambda: RandomLengthEnv(9), workers=3).workers == 3


# Saving


def test_excluded_arguments_have_their_defaults_in_a_loaded_model(tmp_path: Path):
    model: Any = make_model(stats_window_size=7, n_steps=33)
    model.note = "kept"
    model.save(tmp_path / "model", exclude=["_stats_window_size", "note", "n_steps"], include=["note"])
    loaded: Any = REINFORCE.load(tmp_path / "model", RandomLengthEnv(9))
    assert (loaded._stats_window_size, loaded.n_steps, loaded.n_episodes, loaded.note) == (100, 1000, None, "kept")


# Environments


def test_a_model_needs_an_environment(path: Path):
    model = REINFORCE.load(path)
    before, counters = state(model), [getattr(model, name) for name in COUNTERS]
    assert model.get_env() is None and model.predict(np.zeros(3))[0].shape == (2,)
    with pytest.raises(ValueError, match=r"no environment to learn from: give one to load\(\) or set_env\(\)"):
        model.learn(1)
    assert_same(state(model), before)
    assert [getattr(model, name) for name in COUNTERS] == counters
    model.set_env(RandomLengthEnv(9))
    assert model.learn(1, reset_num_timesteps=False)._n_updates == counters[1] + 1


def test_set_env_and_load_take_what_the_constructor_takes(tmp_path: Path):
    whole = REINFORCE("MlpPolicy", "CartPole-v1", **SMALL).learn(50)
    whole.save(tmp_path / "model")
    whole.learn(50, reset_num_timesteps=False)
    for env in ("CartPole-v1", lambda: gym.make("CartPole-v1"), gym.spec("CartPole-v1")):
        loaded = [REINFORCE.load(tmp_path / "model", env), REINFORCE.load(tmp_path / "model")]
        loaded[1].set_env(env)
        for model in loaded:
            assert type(model.get_env()) is EpisodeVecEnv
            np.testing.assert_array_equal(vector(model.learn(50, reset_num_timesteps=False)), vector(whole))


@pytest.mark.parametrize(
    "env, error",
    [
        (RandomLengthEnv(9, spaces.Discrete(2)), ValueError),
        (RandomLengthEnv(9, spaces.Box(-2, 2, (2,))), ValueError),
        (DummyVecEnv([lambda: RandomLengthEnv(9)] * 2), AssertionError),
    ],
    ids=["kind_of_action", "bounds_of_action", "number"],
)
def test_an_environment_that_does_not_fit_is_refused(path: Path, env: Any, error: type[Exception]):
    model = make_model()
    before = model.get_env()
    with pytest.raises(error, match=r"spaces do not match|number of environments"):
        model.set_env(env)
    assert model.get_env() is before
    if error is ValueError:
        with pytest.raises(ValueError, match="spaces do not match"):
            REINFORCE.load(path, env)


# Schedules


def test_schedules_use_the_progress_at_the_start_of_the_rollout():
    """The first update has progress 1, whatever the size of its batch."""
    seen: list[float] = []

    class Note(BaseCallback):
        def _on_rollout_start(self) -> None:
            starts.append(self.num_timesteps)

        def _on_step(self) -> bool:
            return True

    starts: list[int] = []
    model = make_model(ScriptedEnv([10]), target_kl=lambda progress: seen.append(progress) or 0.01)  # type: ignore[func-returns-value]
    seen.clear()
    model.learn(80, callback=Note()).learn(80, callback=Note(), reset_num_timesteps=False)
    assert seen == pytest.approx([1 - start / total for start, total in zip(starts, [80] * 4 + [160] * 4, strict=True)])


# Messages


MESSAGES: dict[str, tuple[Callable[[], Any], int | None, str]] = {
    "seeded": (lambda: RandomLengthEnv(9), 0, ""),
    "no seed": (lambda: RandomLengthEnv(9), None, "there is no seed for environments (weights and actions use seed="),
    "other VecEnv": (lambda: Simulators([[3], [4]]), 0, "a Simulators does not seed each episode"),
    "both": (lambda: Simulators([[3], [4]]), None, "a Simulators does not seed each episode, and there is no seed"),
    "one wrapped": (lambda: VecNormalize(EpisodeVecEnv([lambda: RandomLengthEnv(9)])), 0, ""),
    "statistics": (lambda: NormalizeReward(RandomLengthEnv(9)), 0, "each NormalizeReward, also those of workers, begins with"),
    "several wrapped": (lambda: VecNormalize(EpisodeVecEnv([lambda: RandomLengthEnv(9)] * 2)), 0, "a VecNormalize steps idle"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_run_that_is_not_reproducible_says_so_once(name: str, capsys: pytest.CaptureFixture, tmp_path: Path):
    make_env, seed, expected = MESSAGES[name]

    def n_messages(model: REINFORCE) -> int:
        capsys.readouterr()
        model.learn(1).learn(1)
        printed = capsys.readouterr().out
        assert expected in printed
        return printed.count("This run is not exactly reproducible: ")

    model = make_model(make_env(), seed=seed, verbose=1, normalize_observations=False)
    assert n_messages(model) == (expected != "")
    model.save(tmp_path / "model")
    assert n_messages(REINFORCE.load(tmp_path / "model", make_env())) == (expected != "")
    expected = ""
    assert n_messages(make_model(make_env(), seed=seed)) == 0


@pytest.mark.parametrize("kwargs", [dict(learning_rate=0.0), dict(policy_kwargs=dict(optimizer_class=th.optim.SGD))])
def test_arguments_of_the_optimizer_are_of_no_effect_with_a_target_kl(kwargs: dict[str, Any], recwarn: Any):
    make_model(target_kl=None, **kwargs)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"learning_rate|optimizer_class of no effect: target_kl sets"):
        make_model(**kwargs)


def test_a_model_is_made_with_the_weights_of_its_seed_while_another_thread_learns():
    """PyTorch's generators are shared by all threads."""
    with TORCH_LOCK, ThreadPoolExecutor(1) as executor:
        model = executor.submit(make_model)
        time.sleep(0.1)
        th.manual_seed(1)
        assert not model.done()
        TORCH_LOCK.release()
        np.testing.assert_array_equal(vector(model.result()), vector(make_model()))
        TORCH_LOCK.acquire()


# Errors


def test_an_update_is_counted_with_the_episodes_of_its_batch():
    model = make_model(ScriptedEnv([10])).learn(40)
    assert [getattr(model, name) for name in COUNTERS] == [40, 2, 4, 2]
    with model._all_or_nothing():
        pass
    assert [getattr(model, name) for name in COUNTERS] == [40, 3, 6, 3]
    # A new run counts its iterations anew, and continues the numbers of episodes
    model.learn(20)
    assert [getattr(model, name) for name in COUNTERS] == [20, 4, 8, 1]


def test_the_next_call_logs_what_is_pending(tmp_path: Path):
    """Times are dropped. A writer of SB3 fails if a value has no list of excluded formats, or the other way round."""
    model = make_model(tensorboard_log=str(tmp_path)).learn(60, log_interval=100)
    assert model._n_iterations >= 3 and "time/between_rollouts" in model.logger.name_to_value
    model.learn(1, log_interval=model._n_iterations + 1, reset_num_timesteps=False)
    assert "train/grad_norm" in scalars(tmp_path / "REINFORCE_1")
