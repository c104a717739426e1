"""Models, policies and parameters that are saved and loaded act and learn as before."""

import base64
import io
import pickle
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common import base_class

from sb3_reinforce import REINFORCE, EpisodeRolloutBuffer, MlpPolicy, newest_checkpoint
from tests.envs import RandomEnv
from tests.runs.common import (
    CHOICE,
    GRAY_IMAGE,
    OBSERVATIONS,
    PAIR,
    VECTOR,
    CustomActorCriticPolicy,
    assert_same,
    assert_same_parameters,
    assert_stepped_as_asked,
    random_env,
)
from tests.test_checks import rewrite

MIXED = spaces.Dict(vec=VECTOR, choice=CHOICE)


class OwnBuffer(EpisodeRolloutBuffer):
    """A rollout buffer of the user."""


class OwnPolicy(MlpPolicy):
    """A policy of the user."""


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_baseline": dict(baseline=None, bootstrap_timeouts=False),
    "gsde_and_action_values": dict(advantage="q", use_sde=True, policy_kwargs=dict(full_std=False, squash_output=True)),
    "separate_features": dict(policy_kwargs=dict(share_features_extractor=False), baseline="linear", baseline_memory=0.0),
    "own_policy_and_buffer": dict(policy=OwnPolicy, rollout_buffer_class=OwnBuffer),
    "policy_of_sb3": dict(policy=CustomActorCriticPolicy, advantage="td"),
    "discrete": dict(action_space=CHOICE, advantage="advantage", baseline_kwargs=dict(n_units=8, ridge=0.1)),
    "rmsprop": dict(target_kl=None, policy_kwargs=dict(optimizer_class=th.optim.RMSprop, optimizer_kwargs=dict(alpha=0.9))),
    "image": dict(policy="CnnPolicy", observation_space=GRAY_IMAGE, action_space=spaces.MultiDiscrete([2, 3]), advantage="q"),
    "dictionary": dict(policy="MultiInputPolicy", observation_space=MIXED),
}
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)


def make_env(n_envs: int = 1, observation_space: Any = VECTOR, action_space: Any = PAIR, **kwargs: Any) -> Any:
    return random_env(n_envs, observation_space, action_space)


def make_model(n_envs: int = 1, policy: Any = "MlpPolicy", **kwargs: Any) -> REINFORCE:
    env = make_env(n_envs, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if not key.endswith("_space")}
    return REINFORCE(policy, env, **(dict(n_steps=16, seed=3) | kwargs))


#: Much state: observation statistics, memory of the baseline, optimizer
MUCH: dict[str, Any] = dict(normalize_observations=True, baseline_memory=0.5, target_kl=None, learning_rate=1e-2)


@pytest.fixture
def trained() -> REINFORCE:
    return make_model(**MUCH).learn(50)


@pytest.fixture
def path(trained: REINFORCE, tmp_path: Path) -> Path:
    trained.save(tmp_path / "model")
    return tmp_path / "model"


def assert_same_predictions(model: Any, other: Any, observations: Any) -> None:
    """Two models, or policies, choose the same actions and predict the same values."""
    for deterministic in (True, False):
        chosen = []
        for one in (model, other):
            th.manual_seed(0)
            if getattr(one, "use_sde", False):
                getattr(one, "policy", one).reset_noise()
            chosen.append(one.predict(observations, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*chosen)
    policies = [getattr(one, "policy", one) for one in (model, other)]
    with th.no_grad():
        assert th.equal(*(policy.predict_values(policy.obs_to_tensor(observations)[0]) for policy in policies))


# Models


@every_configuration
def test_a_loaded_model_acts_and_learns_like_the_saved_one(name: str, tmp_path: Path):
    kwargs = CONFIGURATIONS[name]
    model = make_model(**kwargs).learn(50)
    assert model._n_updates >= 2
    assert bool(model.policy.optimizer.state_dict()["state"]) == (model.target_kl is None)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=make_env(**kwargs))
    assert_same_parameters(model, loaded)
    assert_same_predictions(model, loaded, make_env(**kwargs).reset())
    model.policy.save(tmp_path / "policy.pth")
    policy = type(model.policy).load(tmp_path / "policy.pth")
    assert_same(dict(policy.state_dict()), dict(model.policy.state_dict()))
    assert_same_predictions(policy, model.policy, make_env(**kwargs).reset())
    for one in (model, loaded):
        one.learn(30, reset_num_timesteps=False)
    assert_same_parameters(model, loaded)


def test_a_model_file_has_all_arguments_and_counters(tmp_path: Path):
    given: dict[str, Any] = dict(
        n_steps=None,
        n_episodes=4,
        gamma=0.9,
        learning_rate=0.005,
        ent_coef=0.01,
        target_kl=0.02,
        cg_max_steps=3,
        cg_damping=0.7,
        use_sde=True,
        sde_sample_freq=3,
        rollout_buffer_class=OwnBuffer,
        normalize_advantage=False,
        max_episode_steps=100,
        advantage="advantage",
        baseline="linear",
        baseline_memory=0.25,
        baseline_kwargs=dict(ridge=0.5),
        bootstrap_timeouts=True,
        seed_episodes=False,
        normalize_observations=False,
        tensorboard_log=str(tmp_path / "tensorboard"),
        policy_kwargs=dict(net_arch=[5]),
        verbose=1,
        seed=11,
    )
    parameters = dict(signature(REINFORCE).parameters)
    del parameters["unsupported"]
    # Another machine may have other workers
    others = {"policy", "env", "workers", "rollout_buffer_kwargs", "stats_window_size", "device", "_init_setup_model"}
    assert given.keys() == parameters.keys() - others
    assert not [name for name, value in given.items() if value == parameters[name].default]
    model = REINFORCE("MlpPolicy", RandomEnv(VECTOR, PAIR, 7), stats_window_size=7, **given).learn(50)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model")
    for name, value in given.items():
        assert getattr(loaded, name) == getattr(model, name) == value, name
    for name in ("num_timesteps", "_n_updates", "_next_episode", "_n_iterations", "run_seed"):
        assert getattr(loaded, name) == getattr(model, name) > 0, name
    assert loaded._stats_window_size == 7
    assert loaded.rollout_buffer.gamma == 0.9
    assert loaded.lr_schedule(0.5) == 5e-3


def test_a_loaded_model_can_switch_between_the_two_kinds_of_steps(tmp_path: Path):
    make_model().learn(50).save(tmp_path / "model")
    model = REINFORCE.load(tmp_path / "model", env=random_env(), target_kl=None, learning_rate=1e-2)
    model.learn(50, reset_num_timesteps=False)
    assert model.policy.optimizer.state_dict()["state"]
    model.save(tmp_path / "model")
    model = REINFORCE.load(tmp_path / "model", env=random_env(), target_kl=0.02)
    before = deepcopy(model.policy.optimizer.state_dict())
    model.learn(50, reset_num_timesteps=False)
    assert_stepped_as_asked(model)
    # The state of the optimizer is kept
    assert_same(before, model.policy.optimizer.state_dict())


# Files


def test_saving_only_reads(monkeypatch: pytest.MonkeyPatch):
    """Another thread may save a model that is learning."""
    model, seen = make_model(), []

    def note(*args: Any, data: Any = None, **kwargs: Any) -> None:
        seen.append((dict(vars(model)), data))

    monkeypatch.setattr(base_class, "save_to_zip_file", note)
    model.learn(30, callback=lambda locals_, _: locals_["n_steps"] != 5 or bool([note(), model.save("model")]))
    assert len(seen) >= 4
    for (before, _), (during, data) in zip(seen[::2], seen[1::2], strict=True):
        assert before.keys() == during.keys() and all(during[name] is before[name] for name in before)
        assert data["num_timesteps"] == during["num_timesteps"] - 5


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("name", ["seed", "policy_class", "something_new"])
def test_attributes_are_not_unpickled_to_read_parameters(trained: REINFORCE, tmp_path: Path, name: str):
    path, payload = tmp_path / "checkpoint_50_steps.zip", Payload(tmp_path / "executed")
    trained.save(path)
    serialized = base64.b64encode(pickle.dumps(payload)).decode()
    rewrite(path, {}, **{name: {":type:": "<class 'int'>", ":serialized:": serialized}})
    model = make_model(**MUCH, seed=8)
    model.set_parameters(path)
    assert_same_parameters(model, trained)
    assert newest_checkpoint(tmp_path) == path
    rewrite(path, {}, file_format="other")
    with pytest.raises(ValueError, match="another algorithm"):
        REINFORCE.load(path)
    assert not payload.path.exists()


@pytest.mark.parametrize("part", ["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"])
def test_parameters_with_a_payload_are_refused(trained: REINFORCE, tmp_path: Path, part: str):
    path, payload, file = tmp_path / "model.zip", Payload(tmp_path / "executed"), io.BytesIO()
    trained.save(path)
    th.save({"weight": payload}, file)
    rewrite(path, {part: file.getvalue()})
    before = deepcopy(dict(trained.get_parameters()))
    with pytest.raises(pickle.UnpicklingError):
        trained.set_parameters(path)
    assert_same(before, dict(trained.get_parameters()))
    assert not payload.path.exists()


# Parameters


@pytest.mark.parametrize("source", ["model", "text", "path"])
def test_parameters_are_set_from_a_model_or_a_file(trained: REINFORCE, path: Path, source: str):
    other = make_model(**MUCH, seed=8)
    sources: dict[str, Any] = dict(model=trained.get_parameters(), text=str(path), path=path.with_suffix(".zip"))
    other.set_parameters(sources[source])
    assert_same_parameters(trained, other)
    assert_same_predictions(trained, other, OBSERVATIONS)


def test_the_baseline_keeps_its_unit_of_time_if_gamma_is_replaced(tmp_path: Path):
    model = REINFORCE("MlpPolicy", make_env(), n_steps=40, seed=0).learn(80)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", gamma=0.9)
    obs, n_steps = th.zeros(3, *VECTOR.shape), th.tensor([0, 5, 50])
    assert loaded.gamma == 0.9
    assert th.equal(loaded.policy.predict_values(obs, n_steps), model.policy.predict_values(obs, n_steps))
