"""Policies: the baseline as critic, initialization, and the combination with other policy classes."""

import io
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_reinforce import REINFORCE, CnnPolicy, MlpPolicy
from sb3_reinforce.baselines import ActionValues, LinearBaseline
from sb3_reinforce.policies import BaselinePolicy, with_baseline
from tests.envs import RandomEnv
from tests.runs.common import CustomActorCriticPolicy, assert_same_parameters

VECTOR = spaces.Box(-np.inf, np.inf, (3,))
CONTINUOUS = spaces.Box(-1, 1, (2,))


def schedule(_: float) -> float:
    return 1e-3


def features_of(policy: Any, observations: Any) -> th.Tensor:
    return policy.baseline_features(policy.evaluate_observations(observations)[1], th.zeros(len(observations)))


# The actor -------------------------------------------------------------------------------------------------------------------


def test_policy_defaults():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule)
    layers = [*policy.mlp_extractor.policy_net, policy.action_net]
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert [layer.out_features for layer in layers[::2]] == [64, 64, 2]
    assert policy.ortho_init and policy.observation_normalizer is not None and policy.action_value_net is None
    assert not policy.mlp_extractor.value_net and policy.value_net.memory == 0.6
    assert th.equal(policy.log_std, th.full((2,), 0.5))
    group = policy.optimizer.param_groups[0]
    assert (type(policy.optimizer), group["betas"], group["eps"]) == (th.optim.Adam, (0.9, 0.999), 1e-5)
    assert not policy.value_net.weight.any()


@pytest.mark.parametrize("kwargs", [{}, dict(action_values=True), dict(baseline=None)], ids=str)
def test_the_optimizer_has_the_parameters_of_the_actor(kwargs: dict[str, Any]):
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, **kwargs)
    held = [id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]]
    actor = [policy.log_std, *policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    assert sorted(held) == sorted(map(id, actor)) == sorted(map(id, policy.parameters()))


def test_without_ortho_init_the_actor_has_glorot_weights_and_zero_biases():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, net_arch=[200], ortho_init=False)
    for layer in (policy.mlp_extractor.policy_net[0], policy.action_net):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


@pytest.mark.parametrize("policy_class", [MlpPolicy, with_baseline(ActorCriticPolicy)], ids=["MlpPolicy", "ActorCriticPolicy"])
@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_all_methods_normalize_observations_once(share_features_extractor: bool, policy_class: Any):
    kwargs: dict[str, Any] = dict(share_features_extractor=share_features_extractor)
    policy, plain = (
        policy_class(VECTOR, CONTINUOUS, schedule, normalize_observations=normalize, **kwargs) for normalize in (True, False)
    )
    policy.observation_normalizer.update(np.random.default_rng(0).normal(size=(50, 3)) * 3 + 2)
    plain.load_state_dict(policy.state_dict(), strict=False)
    for one in (policy, plain):
        one.value_net.weight.fill_(1.0)
    raw, actions = th.randn(6, 3) * 3 + 2, th.randn(6, 2)
    normalized = policy.observation_normalizer(raw)
    assert not th.allclose(raw, normalized)
    pairs = [
        (policy.evaluate_actions(raw, actions), plain.evaluate_actions(normalized, actions)),
        (policy.predict_values(raw), plain.predict_values(normalized)),
        (policy(raw, deterministic=True), plain(normalized, deterministic=True)),
        (policy.get_distribution(raw).distribution.mean, plain.get_distribution(normalized).distribution.mean),
        (policy.evaluate_observations(raw)[0].distribution.mean, plain.get_distribution(normalized).distribution.mean),
        (policy.evaluate_observations(raw)[1], normalized),
        (features_of(policy, raw), features_of(plain, normalized)),
        (features_of(policy, raw)[:, :3], normalized),
    ]
    for found, expected in pairs:
        th.testing.assert_close(found, expected)
    predicted = [one.predict(x.numpy(), deterministic=True)[0] for one, x in ((policy, raw), (plain, normalized))]
    np.testing.assert_allclose(*predicted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("was_trained", [False, True])
@pytest.mark.parametrize("has_statistics", [False, True])
def test_statistics_are_updated_unless_the_policy_was_trained_before_it_had_any(has_statistics: bool, was_trained: bool):
    policy, stream, batch = MlpPolicy(VECTOR, CONTINUOUS, schedule), io.BytesIO(), np.ones((5, 3), np.float32)
    if has_statistics:
        policy.update_statistics(batch)
    if was_trained:
        nn.init.normal_(policy.action_net.weight)
    policy.save(stream)
    stream.seek(0)
    for one in (policy, MlpPolicy.load(stream)):
        one.update_statistics(batch)
        *_, count = one.observation_normalizer.statistics()
        assert count == (0 if was_trained and not has_statistics else 5 + 5 * has_statistics)
    MlpPolicy(VECTOR, CONTINUOUS, schedule, normalize_observations=False).update_statistics(batch)


# The baseline ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "kwargs", "n_features"),
    [
        ("linear", {}, 3),
        ("linear", dict(time=True), 4),
        ("random_features", {}, 132),
        ("random_features", dict(time=False, n_units=7), 10),
    ],
)
def test_the_baseline_is_fitted_to_features_of_states_and_times(baseline: Any, kwargs: dict[str, Any], n_features: int):
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, baseline=baseline, baseline_memory=0.0, baseline_kwargs=kwargs, gamma=0.9)
    assert type(policy.value_net) is LinearBaseline
    observations = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    features = features_of(policy, th.as_tensor(observations))
    assert features.shape == (50, n_features)
    np.testing.assert_array_equal(features[:, :3], observations)
    returns = observations @ [1, 2, 3] + 4
    policy.value_net.fit(features.numpy(), returns)
    values = policy.predict_values(th.as_tensor(observations)).numpy().flatten()
    if baseline == "linear":
        np.testing.assert_allclose(values, returns, rtol=1e-6)
    else:
        assert np.corrcoef(values, returns)[0, 1] > 0.9
    # Fit returns that depend on the time, in units of 10 steps
    states, n_steps = th.as_tensor(observations), th.arange(50)
    features = policy.baseline_features(policy.evaluate_observations(states)[1], n_steps)
    policy.value_net.fit(features.numpy(), 2 * n_steps.numpy() / 10)
    later, start = (policy.predict_values(states, *given).flatten() for given in ([n_steps], []))
    assert th.equal(start, policy.predict_values(states, th.zeros(50)).flatten())
    assert (features.shape[1] == n_features) and th.equal(later, start) == (n_features in (3, 10))
    if kwargs == dict(time=True):
        np.testing.assert_allclose(later, n_steps / 5, atol=1e-6)


def test_without_a_baseline_all_values_stay_0():
    model = make_model(MlpPolicy, baseline=None).learn(60)
    assert th.equal(model.policy.predict_values(th.randn(5, 3)), th.zeros(5, 1, dtype=th.float64))
    assert not model.rollout_buffer.values.any()


@pytest.mark.parametrize("policy_class", [MlpPolicy, with_baseline(ActorCriticPolicy)], ids=["MlpPolicy", "ActorCriticPolicy"])
def test_baseline_kwargs_set_ridge_and_units_and_are_saved(policy_class: Any):
    kwargs = dict(ridge=0.5, n_units=7, time=True)
    policy, stream = policy_class(VECTOR, CONTINUOUS, schedule, baseline_kwargs=kwargs, gamma=0.75), io.BytesIO()
    policy.save(stream)
    stream.seek(0)
    for one in (policy, policy_class.load(stream)):
        features = one.value_net.features
        assert (features.out_features, features.time_unit, one.value_net.ridge) == (11, 4.0, 0.5)


def test_chunks_bound_the_memory_of_images_and_batch_normalization_sees_the_whole_batch():
    assert MlpPolicy(VECTOR, CONTINUOUS, schedule).chunk_size() > 1e4
    assert 50 < CnnPolicy(spaces.Box(0, 255, (4, 84, 84), dtype=np.uint8), CONTINUOUS, schedule).chunk_size() < 100
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule)
    policy.mlp_extractor.policy_net.append(nn.BatchNorm1d(policy.mlp_extractor.latent_dim_pi))
    assert policy.chunk_size() > 1e18


# Action values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
@pytest.mark.parametrize("advantage", ["monte_carlo", "q", "advantage", "td"])
def test_only_advantage_functions_that_use_them_have_action_values(policy: Any, advantage: Any):
    policy = REINFORCE(policy, RandomEnv(VECTOR, CONTINUOUS, 5), advantage=advantage).policy
    is_used = advantage in ("q", "advantage")
    assert (type(policy.action_value_net) is ActionValues) == is_used
    assert any("action_value_net" in name for name in policy.state_dict()) == is_used
    assert type(policy.value_net) is LinearBaseline


@pytest.mark.parametrize("width", [3, 500])
@pytest.mark.parametrize("baseline", ["linear", "random_features"])
@pytest.mark.parametrize("extractor", ["flat", "learned"])
def test_action_values_have_the_features_and_settings_of_the_baseline(extractor: str, baseline: Any, width: int):
    class Learned(BaseFeaturesExtractor):
        def __init__(self, observation_space: spaces.Space):
            super().__init__(observation_space, width)
            self.layer = nn.Linear(width, width)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.layer(observations)

    extractor_class = Learned if extractor == "learned" else FlattenExtractor
    kwargs: dict[str, Any] = dict(baseline=baseline, baseline_memory=0.3, features_extractor_class=extractor_class)
    space = spaces.Box(-1, 1, (width,))
    policy = MlpPolicy(space, spaces.Discrete(3), schedule, action_values=True, **kwargs)
    critic = policy.action_value_net
    assert critic is not None
    features = features_of(policy, th.rand(5, width))
    assert critic.n_joint == (features.shape[1] + 1) * 4 - 1
    assert critic.predict(features, th.zeros(5, 1)).shape == (5, 1)
    for name in ("ridge", "memory", "truncate"):
        assert getattr(critic.linear, name) == getattr(policy.value_net, name), name
    assert (critic.linear.memory, critic.linear.truncate) == (0.3, extractor == "learned")
    assert (critic.linear.ridge == 0) == (baseline == "linear" and extractor == "flat")
    with_ridge = MlpPolicy(space, CONTINUOUS, schedule, action_values=True, baseline_kwargs=dict(ridge=7.0), **kwargs)
    assert with_ridge.action_value_net.linear.ridge == with_ridge.value_net.ridge == 7.0


# Combination with other policy classes ---------------------------------------------------------------------------------------


class Plain(ActorCriticPolicy):
    """A subclass without anything of its own."""


class FixedSignature(ActorCriticPolicy):
    """Takes what SB3's algorithms pass, and nothing else."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Any, use_sde: bool = False):
        super().__init__(observation_space, action_space, lr_schedule, net_arch=[9], use_sde=use_sde)


FOREIGN: list[Any] = [Plain, CustomActorCriticPolicy, FixedSignature]
every_foreign_policy = pytest.mark.parametrize("policy_class", FOREIGN)


def make_model(policy_class: Any, **kwargs: Any) -> REINFORCE:
    env = RandomEnv(spaces.Box(-1, 1, (3,)), CONTINUOUS, 7)
    return REINFORCE(policy_class, env, n_steps=20, seed=0, **kwargs)


@every_foreign_policy
@pytest.mark.parametrize("kwargs", [{}, dict(baseline=None), dict(advantage="q")], ids=str)
def test_any_policy_class_is_combined_with_the_baseline(policy_class: Any, kwargs: dict[str, Any]):
    model = make_model(policy_class, **kwargs)
    policy = model.policy
    assert isinstance(policy, policy_class) and isinstance(policy, BaselinePolicy)
    assert model.policy_class is policy_class
    assert type(policy).__name__ == policy_class.__name__
    assert model.normalize_observations is False and policy.observation_normalizer is None
    assert type(policy.value_net) is LinearBaseline
    before, critic = policy.parameters_to_vector(), deepcopy(policy.mlp_extractor.value_net.state_dict())
    model.learn(60)
    assert model._n_updates >= 2
    assert not np.array_equal(policy.parameters_to_vector(), before)
    # The features of the baseline are fixed
    for name, value in policy.mlp_extractor.value_net.state_dict().items():
        assert th.equal(value, critic[name])


def test_a_fixed_signature_gets_the_arguments_of_sb3_alone(tmp_path: Path):
    model = make_model(FixedSignature, baseline="linear", baseline_memory=0.3, baseline_kwargs=dict(ridge=2.0)).learn(20)
    model.save(tmp_path / "model")
    for one in (model, REINFORCE.load(tmp_path / "model")):
        assert one.policy.net_arch == [9]
        assert (one.policy.value_net.memory, one.policy.value_net.ridge) == (0.3, 2.0)
        assert_same_parameters(one, model)
    with pytest.raises(TypeError, match="activation_fn"):
        make_model(FixedSignature, policy_kwargs=dict(activation_fn=nn.ReLU))


@every_foreign_policy
@pytest.mark.parametrize(
    "copied",
    [
        deepcopy,
        lambda policy: cloudpickle.loads(cloudpickle.dumps(policy)),
        lambda policy: pickle.loads(pickle.dumps(policy)),
    ],
    ids=["deepcopy", "cloudpickle", "pickle"],
)
def test_a_combined_policy_can_be_copied_and_pickled(policy_class: Any, copied: Any):
    policy = make_model(policy_class).learn(20).policy
    twin, observations = copied(policy), np.ones((2, 3), np.float32)
    assert isinstance(twin, policy_class)
    np.testing.assert_array_equal(*(one.predict(observations, deterministic=True)[0] for one in (policy, twin)))
    assert th.equal(*(one.predict_values(th.as_tensor(observations)) for one in (policy, twin)))


def test_observation_statistics_need_a_policy_of_this_package():
    with pytest.raises(ValueError, match="normalize_observations must be False, except with the policies of sb3_reinforce"):
        make_model(Plain, normalize_observations=True)


def test_the_optimizer_of_a_policy_is_kept():
    class OnlyHead(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.optimizer = th.optim.SGD(self.action_net.parameters(), lr=lr_schedule(1))

    policy = make_model(OnlyHead).policy
    assert type(policy.optimizer) is th.optim.SGD
    (group,) = policy.optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, policy.action_net.parameters()))
