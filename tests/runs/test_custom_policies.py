"""``policy_kwargs`` and custom policies: what works with A2C works with REINFORCE."""

from copy import deepcopy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_reinforce import REINFORCE, MlpPolicy
from tests.runs.common import (
    CHOICE,
    GRAY_IMAGE,
    OBSERVATIONS,
    PAIR,
    VECTOR,
    CustomActorCriticPolicy,
    assert_same,
    assert_stepped_as_asked,
    check_learns_and_predicts,
    logged,
    random_env,
    weights,
)

WIDE_PAIR = spaces.Box(-100, 100, (2,))


def make_model(policy="MlpPolicy", action_space=PAIR, n_envs=1, observation_space=VECTOR, **kwargs):
    env = random_env(n_envs, observation_space, action_space)
    return REINFORCE(policy, env, **(dict(n_steps=16, seed=0) | kwargs))


def collect(model):
    """Collect a rollout without learning from it."""
    _, callback = model._setup_learn(1)
    assert model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, model.n_steps)


# Features extractors ---------------------------------------------------------------------------------------------------------


class SmallExtractor(BaseFeaturesExtractor):
    """One trained layer on flat observations."""

    def __init__(self, observation_space, features_dim=5):
        super().__init__(observation_space, features_dim)
        layer = nn.Linear(get_flattened_obs_dim(observation_space), features_dim)
        self.net = nn.Sequential(nn.Flatten(), layer, nn.Tanh())

    def forward(self, observations):
        return self.net(observations)


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
@pytest.mark.parametrize("target_kl", [0.01, None])
@pytest.mark.parametrize("how", ["frozen", "not in the optimizer"])
def test_parameters_that_are_frozen_or_not_in_the_optimizer_do_not_change(policy, target_kl, how):
    kwargs = dict(features_extractor_class=SmallExtractor, optimizer_class=th.optim.AdamW)
    model = make_model(policy, target_kl=target_kl, policy_kwargs=kwargs)
    if how == "frozen":
        model.policy.features_extractor.requires_grad_(False)
    else:
        model.policy.optimizer = th.optim.Adam(model.policy.action_net.parameters())
    before, head = weights(model.policy.features_extractor), weights(model.policy.action_net)
    model.learn(60)
    assert th.equal(before, weights(model.policy.features_extractor))
    assert not th.equal(head, weights(model.policy.action_net))
    if target_kl is None:
        assert logged(model, "train/kl_divergence_loss") > 0
    else:
        assert_stepped_as_asked(model)


# Overridden methods ----------------------------------------------------------------------------------------------------------


class OwnForward:
    def forward(self, obs, deterministic=False):
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions + 0.5, values, log_prob


class OwnEvaluateActions:
    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, 2 * log_prob, 3 * entropy


class OwnGetDistribution:
    def get_distribution(self, obs):
        distribution = super().get_distribution(obs)
        gaussian = distribution.distribution
        distribution.distribution = th.distributions.Normal(10 * gaussian.mean, gaussian.stddev)
        return distribution


class OwnExtractFeatures:
    def extract_features(self, obs):
        features = super().extract_features(obs)
        return tuple(10 * part for part in features) if isinstance(features, tuple) else 10 * features


class OwnActionDistribution:
    """Standard deviations that depend on the state."""

    def _get_action_dist_from_latent(self, latent_pi, *args):
        mean = self.action_net(latent_pi)
        return self.action_dist.proba_distribution(10 * mean, self.log_std + 0.1 * mean.tanh())


OVERRIDES = [OwnForward, OwnEvaluateActions, OwnGetDistribution, OwnExtractFeatures, OwnActionDistribution]
every_override = pytest.mark.parametrize("override", OVERRIDES)
every_base = pytest.mark.parametrize("base", [MlpPolicy, ActorCriticPolicy])


def make_overriding_model(override, base, **kwargs):
    model = make_model(type(override.__name__, (override, base), {}), WIDE_PAIR, **kwargs)
    with th.no_grad():
        # SB3's initial means are almost 0
        model.policy.action_net.weight.normal_(std=0.5)
    return model


@every_override
@every_base
@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_overridden_methods_decide_how_a_policy_acts(override, base, share_features_extractor):
    kwargs = dict(policy_kwargs=dict(log_std_init=-20.0, share_features_extractor=share_features_extractor))
    model = make_overriding_model(override, base, n_envs=2, **kwargs)
    plain = make_model(base, WIDE_PAIR, n_envs=2, **kwargs)
    plain.set_parameters(model.get_parameters())
    collect(model)
    observations = th.as_tensor(model.rollout_buffer.observations)
    with th.no_grad():
        if override is OwnGetDistribution:
            expected = model.policy.get_distribution(observations).mode()
        else:
            expected, _, _ = model.policy(observations, deterministic=True)
        difference = (expected - plain.policy(observations, deterministic=True)[0]).abs().max()
    np.testing.assert_allclose(model.rollout_buffer.actions, expected, atol=1e-4)
    assert difference == 0 if override is OwnEvaluateActions else difference > 0.1


@every_override
@every_base
def test_the_gradient_uses_overridden_log_probabilities_and_entropies(override, base):
    model, expected = make_overriding_model(override, base, ent_coef=0.1, target_kl=0.01, cg_damping=0.1, n_envs=2), []

    class Expect(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            buffer, policy = model.rollout_buffer, model.policy
            arrays = (buffer.observations, buffer.actions, buffer.advantages)
            observations, actions, advantages = (th.as_tensor(array, dtype=th.float32) for array in arrays)
            advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
            if override is OwnGetDistribution:
                distribution = policy.get_distribution(observations)
                log_prob, entropy = distribution.log_prob(actions), distribution.entropy()
            else:
                _, log_prob, entropy = policy.evaluate_actions(observations, actions)
            parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
            loss = -(advantages * log_prob).mean() - 0.1 * entropy.mean()
            expected.extend(zip(parameters, th.autograd.grad(loss, parameters, allow_unused=True), strict=True))

    model.learn(1, callback=Expect())
    assert expected
    for parameter, gradient in expected:
        if gradient is None:
            assert parameter.grad is None
        else:
            th.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


# SB3's policies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action_space", [PAIR, CHOICE, spaces.MultiBinary(2)], ids=str)
def test_the_custom_policy_of_sb3s_documentation_learns(action_space):
    """The features of the baseline are made from the output of its critic branch."""
    model = make_model(CustomActorCriticPolicy, action_space, n_envs=3)
    check_learns_and_predicts(model)
    observations = th.rand(200, 3)
    with th.no_grad():
        values = model.policy.predict_values(observations)
        expected = model.policy.value_net(model.policy.mlp_extractor.forward_critic(observations))
    assert values.max() - values.min() > 1e-3
    th.testing.assert_close(values, expected)


@pytest.mark.parametrize("backend, kwargs", [("eager", dict(advantage="q")), ("aot_eager", dict(target_kl=None))], ids=str)
def test_a_compiled_policy_learns_the_same_and_is_saved(backend, kwargs, tmp_path):
    """These back-ends need no compiler. The activation function makes both policies act with PyTorch."""
    models = [make_model(policy_kwargs=dict(activation_fn=nn.ELU), **kwargs) for _ in range(2)]
    models[1].policy = th.compile(models[1].policy, backend=backend)
    for model in models:
        model.learn(60)
    th.testing.assert_close(*(weights(model.policy) for model in models), rtol=1e-4, atol=1e-5)
    models[1].save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model")
    np.testing.assert_array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (models[1], loaded)))


# Batch normalization and dropout ---------------------------------------------------------------------------------------------


class BatchNormDropout(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, get_flattened_obs_dim(observation_space))
        self.flatten = nn.Flatten()
        self.batch_norm = nn.BatchNorm1d(self.features_dim)
        self.dropout = nn.Dropout(0.5)

    def forward(self, observations):
        return self.dropout(self.batch_norm(self.flatten(observations)))


@pytest.mark.parametrize("policy, share", [("MlpPolicy", True), ("MlpPolicy", False), (ActorCriticPolicy, True)])
def test_one_pass_of_the_update_is_in_training_mode_and_nothing_else(policy, share):
    kwargs = dict(features_extractor_class=BatchNormDropout, share_features_extractor=share)
    model, modes = make_model(policy, normalize_observations=False, policy_kwargs=kwargs), []
    extractor = model.policy.pi_features_extractor
    extractor.register_forward_hook(lambda module, *_: modes.append(module.training))
    before = deepcopy(dict(extractor.batch_norm.state_dict()))
    collect(model)
    assert modes and not any(modes)
    assert_same(before, dict(extractor.batch_norm.state_dict()))
    modes.clear()
    model.train()
    assert modes[0] and modes.count(True) == 1
    after = deepcopy(dict(extractor.batch_norm.state_dict()))
    assert after["num_batches_tracked"] == before["num_batches_tracked"] + 1
    # PyTorch gives a new batch a weight of 0.1
    expected = 0.1 * model.rollout_buffer.observations.mean(axis=0)
    np.testing.assert_allclose(after["running_mean"], expected, rtol=1e-4, atol=1e-6)
    first, second = (model.predict(OBSERVATIONS, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert_same(after, dict(extractor.batch_norm.state_dict()))


# The divergence of a step ----------------------------------------------------------------------------------------------------


class SequenceExtractor(BaseFeaturesExtractor):
    """Treats a vector as a sequence of numbers."""

    def __init__(self, observation_space, kind):
        super().__init__(observation_space, 8)
        self.embed = nn.Linear(1, 8)
        transformer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layer = nn.GRU(8, 8, batch_first=True) if kind == "gru" else transformer

    def forward(self, observations):
        sequence = self.layer(self.embed(observations.unsqueeze(2)))
        return (sequence[0] if isinstance(sequence, tuple) else sequence).mean(dim=1)


def extractor(extractor_class, share_features_extractor=True, **kwargs):
    return dict(
        policy_kwargs=dict(
            features_extractor_class=extractor_class,
            features_extractor_kwargs=kwargs,
            share_features_extractor=share_features_extractor,
        )
    )


IMAGE_AND_VECTOR = spaces.Dict(vec=VECTOR, img=GRAY_IMAGE)
POLICIES = {
    "gaussian": {},
    "categorical": dict(action_space=CHOICE),
    "multi_categorical": dict(action_space=spaces.MultiDiscrete([2, 3])),
    "bernoulli": dict(action_space=spaces.MultiBinary(2)),
    "no_hidden_layers": dict(policy_kwargs=dict(net_arch=[])),
    "separate_extractors": extractor(SmallExtractor, share_features_extractor=False),
    "batch_norm_dropout": extractor(BatchNormDropout),
    "gru": extractor(SequenceExtractor, kind="gru"),
    "transformer": extractor(SequenceExtractor, kind="transformer"),
    "sb3": dict(policy=ActorCriticPolicy),
    "sb3_documentation": dict(policy=CustomActorCriticPolicy, action_space=CHOICE, advantage="td"),
    "own_distribution": dict(policy=type("Own", (OwnActionDistribution, ActorCriticPolicy), {})),
    "gsde": dict(use_sde=True, advantage="td"),
    "gsde_squashed": dict(use_sde=True, policy_kwargs=dict(squash_output=True, use_expln=True)),
    "gsde_no_layers": dict(use_sde=True, policy_kwargs=dict(net_arch=[], share_features_extractor=False)),
    "gsde_sb3": dict(policy=ActorCriticPolicy, use_sde=True, sde_sample_freq=4, policy_kwargs=dict(full_std=False)),
    "cnn": dict(policy="CnnPolicy", observation_space=GRAY_IMAGE),
    "multi_input": dict(policy="MultiInputPolicy", observation_space=IMAGE_AND_VECTOR),
    "short": dict(target_kl=1e-4),
    "long": dict(target_kl=1.0),
    "little_damping": dict(cg_damping=1e-4),
    "much_damping": dict(cg_damping=1e9),
    "little_noise": dict(policy_kwargs=dict(log_std_init=-8.0)),
}


def in_double_precision(distribution):
    names = ("loc", "scale") if isinstance(distribution, th.distributions.Normal) else ("logits",)
    return type(distribution)(**{name: getattr(distribution, name).double() for name in names})


class Distributions(BaseCallback):
    """Action distributions in the states of the batch before and after the step."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def _on_step(self):
        return True

    def note(self):
        policy = self.model.policy
        assert not policy.training
        with th.no_grad():
            parts = policy.get_distribution(obs_as_tensor(self.model.rollout_buffer.observations, "cpu")).distribution
        self.noted.append([in_double_precision(part) for part in (parts if isinstance(parts, list) else [parts])])

    _on_rollout_end = _on_training_end = note

    def divergence(self):
        """KL(before || after), summed over action dimensions, mean over the batch."""
        parts = [th.distributions.kl_divergence(*pair) for pair in zip(*self.noted, strict=True)]
        return sum(part.sum().item() for part in parts) / len(parts[0])


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_has_the_divergence_of_target_kl_and_changes_the_actor_alone(name):
    callback, kwargs = Distributions(), dict(target_kl=0.02) | POLICIES[name]
    model = make_model(n_envs=2, n_steps=50, normalize_observations=False, **kwargs)
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.learn(1, callback=callback)
    assert callback.divergence() == pytest.approx(kwargs["target_kl"], rel=0.01)
    assert_stepped_as_asked(model)
    actor = ("action_net", "mlp_extractor.policy_net", "log_std", "features_extractor")
    for parameter, value in model.policy.named_parameters():
        assert th.isfinite(value).all(), parameter
        assert th.equal(value, before[parameter]) != parameter.startswith(actor), parameter
