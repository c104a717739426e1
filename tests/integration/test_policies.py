"""Whatever can be done to a policy of A2C by ``policy_kwargs``, or by writing one's own, can be done to one of REINFORCE."""

from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_reinforce import REINFORCE, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_reinforce.baselines import FEATURE_MAPS
from tests.integration.common import (
    CHOICE,
    GRAY_IMAGE,
    OBSERVATIONS,
    PAIR,
    VECTOR,
    assert_same,
    assert_stepped_as_asked,
    logged,
    random_env,
    weights,
)

WIDE_PAIR = spaces.Box(-100, 100, (2,))


def make_model(policy="MlpPolicy", action_space=PAIR, n_envs=1, observation_space=VECTOR, **kwargs):
    env = random_env(n_envs, observation_space, action_space)
    return REINFORCE(policy, env, **(dict(n_steps=16, seed=0) | kwargs))


def collect(model):
    """A rollout that is not learned from."""
    _, callback = model._setup_learn(1)
    assert model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, model.n_steps)


def check_learns(model):
    """Two steps of the length asked for change every parameter of the actor, and leave the model in order."""
    policy, n_updates = model.policy, model._n_updates
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    for _ in range(2):
        model.learn(1, reset_num_timesteps=False)
        if model.target_kl is not None:
            assert_stepped_as_asked(model)
    assert model._n_updates == n_updates + 2
    for name, value in policy.state_dict().items():
        assert th.isfinite(value).all(), name
        if name.startswith(("action_net", "mlp_extractor.policy_net", "pi_features_extractor", "log_std")):
            assert not th.equal(value, before[name]), name
    actions, _ = model.predict(OBSERVATIONS)
    assert all(model.action_space.contains(action) for action in actions)


# The network


@pytest.mark.parametrize(
    "net_arch, hidden",
    [
        (None, [64, 64]),
        ([], []),
        ([4, 6], [4, 6]),
        (dict(pi=[8]), [8]),
        (dict(pi=[8], vf=[]), [8]),
        (dict(pi=[]), []),
        ({}, []),
    ],
    ids=str,
)
def test_net_arch_is_the_actors(net_arch, hidden):
    model = make_model(policy_kwargs=dict(net_arch=net_arch))
    layers = [module for module in model.policy.mlp_extractor.policy_net if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in layers] == hidden
    assert model.policy.action_net.in_features == (hidden or [3])[-1]
    check_learns(model)


def test_behind_a_cnn_there_are_no_hidden_layers_by_default():
    model = make_model("CnnPolicy", observation_space=GRAY_IMAGE)
    assert len(model.policy.mlp_extractor.policy_net) == 0


@pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ReLU, nn.ELU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid])
@pytest.mark.parametrize("normalize_observations", [False, True])
def test_samples_are_around_what_predict_returns_for_every_activation_function(activation_fn, normalize_observations):
    """Acting while collecting and ``predict`` go through different code: both must see the same network."""
    model = make_model(
        normalize_observations=normalize_observations,
        action_space=WIDE_PAIR,
        policy_kwargs=dict(activation_fn=activation_fn),
    )
    activations = [module for module in model.policy.mlp_extractor.policy_net if not isinstance(module, nn.Linear)]
    assert [type(activation) for activation in activations] == [activation_fn] * 2
    check_learns(model)
    with th.no_grad():
        model.policy.log_std.fill_(-20)
    collect(model)
    expected, _ = model.predict(model.rollout_buffer.observations, deterministic=True)
    np.testing.assert_allclose(model.rollout_buffer.actions, expected, atol=1e-5)


# The optimizer


@pytest.mark.parametrize(
    "optimizer_class, optimizer_kwargs",
    [
        (th.optim.Adam, dict(eps=1e-5, betas=(0.8, 0.9))),
        (th.optim.AdamW, None),
        (th.optim.AdamW, dict(weight_decay=0.1)),
        (th.optim.RMSprop, dict(alpha=0.99, eps=1e-5, weight_decay=0)),
        (th.optim.SGD, dict(momentum=0.9)),
    ],
    ids=str,
)
def test_the_optimizer_can_be_chosen(optimizer_class, optimizer_kwargs):
    kwargs = dict(optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs)
    model = make_model(target_kl=None, learning_rate=1e-2, policy_kwargs=kwargs)
    optimizer = model.policy.optimizer
    assert type(optimizer) is optimizer_class
    for name, value in (optimizer_kwargs or {}).items():
        assert optimizer.param_groups[0][name] == value
    check_learns(model)


def test_weight_decay_shrinks_the_weights_and_spares_the_baseline():
    kwargs = dict(optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(weight_decay=10.0))
    step = dict(target_kl=None, learning_rate=1e-2)
    models = [make_model(policy_kwargs=policy_kwargs, **step).learn(1) for policy_kwargs in ({}, kwargs)]
    plain, decayed = (weights(model.policy.mlp_extractor.policy_net).norm() for model in models)
    assert decayed < 0.95 * plain
    assert th.equal(*(model.policy.value_net.weight for model in models))


def test_the_optimizer_follows_a_schedule_of_the_learning_rate():
    model = make_model(target_kl=None, learning_rate=lambda progress: 0.1 * progress, n_steps=50)
    rates = []
    model.learn(400, callback=lambda locals_, _: rates.append(rate(locals_["self"])) or True)
    assert rates[0] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    assert 0 <= rate(model) < 0.02


def rate(model):
    return model.policy.optimizer.param_groups[0]["lr"]


def test_a_step_of_target_kl_depends_on_neither_optimizer_nor_learning_rate():
    sgd = dict(optimizer_class=th.optim.SGD, optimizer_kwargs=dict(weight_decay=10.0, momentum=0.9))
    models = [make_model().learn(50), make_model(learning_rate=10.0, policy_kwargs=sgd).learn(50)]
    assert models[0]._n_updates >= 2
    assert th.equal(*(weights(model) for model in models))
    assert not any(model.policy.optimizer.state_dict()["state"] for model in models)


# Features extractors


class SmallExtractor(BaseFeaturesExtractor):
    """One trained layer on flat observations."""

    def __init__(self, observation_space, features_dim=5, bias=True):
        super().__init__(observation_space, features_dim)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(get_flattened_obs_dim(observation_space), features_dim, bias), nn.Tanh()
        )

    def forward(self, observations):
        return self.net(observations)


@pytest.mark.parametrize("baseline", ["linear", "quadratic", "random_features", None])
@pytest.mark.parametrize("normalize_observations", [False, True])
@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_only_the_actor_trains_a_features_extractor(share_features_extractor, normalize_observations, baseline):
    kwargs = dict(
        features_extractor_class=SmallExtractor,
        features_extractor_kwargs=dict(features_dim=6, bias=False),
        share_features_extractor=share_features_extractor,
    )
    model = make_model(normalize_observations=normalize_observations, baseline=baseline, policy_kwargs=kwargs)
    policy = model.policy
    assert policy.features_dim == 6
    # It is where SB3 has it, whatever normalizes the observations
    assert type(policy.features_extractor) is SmallExtractor
    assert (policy.pi_features_extractor is policy.vf_features_extractor) == share_features_extractor
    before = weights(policy.vf_features_extractor)
    check_learns(model)
    # Nothing but the actor has a gradient
    assert th.equal(before, weights(policy.vf_features_extractor)) != share_features_extractor


def test_a_features_extractor_of_other_observations_than_vectors_is_trained():
    kwargs = dict(features_extractor_class=SmallExtractor)
    model = make_model(observation_space=spaces.MultiBinary((2, 3)), policy_kwargs=kwargs)
    before = weights(model.policy.features_extractor)
    model.learn(1)
    assert not th.equal(before, weights(model.policy.features_extractor))


@pytest.mark.parametrize("normalize_observations", [False, True])
def test_the_baseline_is_fitted_to_the_features_as_they_are_after_the_update(normalize_observations):
    kwargs = dict(features_extractor_class=SmallExtractor)
    model = make_model(
        baseline="linear", normalize_observations=normalize_observations, policy_kwargs=kwargs, n_steps=100
    ).learn(1)
    policy, buffer = model.policy, model.rollout_buffer
    observations = buffer.observations
    if normalize_observations:
        observations = (observations - observations.mean(axis=0)) / observations.std(axis=0)
    with th.no_grad():
        features = policy.features_extractor(th.as_tensor(observations)).double().numpy()
        values = policy.predict_values(th.as_tensor(buffer.observations)).numpy().ravel()
    # As ridge regression on standardized features, within the returns
    _, alpha = FEATURE_MAPS["random_features"]
    ridge = make_pipeline(StandardScaler(), Ridge(alpha=alpha * len(features))).fit(features, buffer.returns)
    expected = np.clip(ridge.predict(features), buffer.returns.min(), buffer.returns.max())
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


class FrozenExtractor(SmallExtractor):
    """Its layer is not to be trained."""

    def __init__(self, observation_space, features_dim=5):
        super().__init__(observation_space, features_dim)
        self.requires_grad_(False)


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
@pytest.mark.parametrize("when", ["from_the_beginning", "later"])
@pytest.mark.parametrize("target_kl, optimizer_class", [(0.01, th.optim.Adam), (None, th.optim.Adam), (None, th.optim.AdamW)])
def test_a_frozen_features_extractor_stays_as_it_is(policy, when, target_kl, optimizer_class):
    extractor_class = FrozenExtractor if when == "from_the_beginning" else SmallExtractor
    kwargs = dict(features_extractor_class=extractor_class, optimizer_class=optimizer_class)
    model = make_model(policy, target_kl=target_kl, policy_kwargs=kwargs)
    model.policy.features_extractor.requires_grad_(False)
    before = weights(model.policy.features_extractor)
    head = weights(model.policy.action_net)
    model.learn(100)
    assert model._n_updates >= 3
    assert th.equal(before, weights(model.policy.features_extractor))
    assert not th.equal(head, weights(model.policy.action_net))
    assert model.policy.value_net.weight.any()
    if target_kl is None:
        assert logged(model, "train/kl_divergence_loss") > 0
    else:
        assert_stepped_as_asked(model)


@pytest.mark.parametrize(
    "target_kl",
    [None, 0.01],
)
def test_parameters_that_the_optimizer_was_not_given_stay_as_they_are(target_kl):
    model = make_model(target_kl=target_kl)
    model.policy.optimizer = th.optim.Adam(model.policy.action_net.parameters())
    before, head = weights(model.policy.mlp_extractor), weights(model.policy.action_net)
    model.learn(50)
    assert th.equal(before, weights(model.policy.mlp_extractor))
    assert not th.equal(head, weights(model.policy.action_net))


def test_a_pretrained_features_extractor_is_what_the_policy_acts_with(tmp_path):
    pretrained = SmallExtractor(VECTOR)
    with th.no_grad():
        pretrained.net[1].weight.normal_(std=3)
    kwargs = dict(features_extractor_class=SmallExtractor, log_std_init=-20.0)
    model = make_model(action_space=WIDE_PAIR, normalize_observations=False, policy_kwargs=kwargs)
    model.policy.features_extractor.load_state_dict(pretrained.state_dict())
    with th.no_grad():
        model.policy.action_net.weight.normal_()
    collect(model)
    with th.no_grad():
        features = pretrained(th.as_tensor(model.rollout_buffer.observations))
        expected = model.policy.action_net(model.policy.mlp_extractor.forward_actor(features)).numpy()
    np.testing.assert_allclose(model.rollout_buffer.actions, expected, atol=1e-5)
    model.save(tmp_path / "model")
    assert_same(dict(REINFORCE.load(tmp_path / "model").policy.features_extractor.state_dict()), dict(pretrained.state_dict()))


# Policies of one's own


class OwnForward:
    """Acts by other means than its distribution."""

    def forward(self, obs, deterministic=False):
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions + 0.5, values, log_prob


class OwnEvaluateActions:
    """Has another log-probability and entropy of actions."""

    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, 2 * log_prob, 3 * entropy


class OwnGetDistribution:
    """Scales the distribution that it returns."""

    def get_distribution(self, obs):
        distribution = super().get_distribution(obs)
        gaussian = distribution.distribution
        distribution.distribution = th.distributions.Normal(10 * gaussian.mean, gaussian.stddev)
        return distribution


class OwnExtractFeatures:
    """Scales the features."""

    def extract_features(self, obs, features_extractor=None):
        features = super().extract_features(obs, features_extractor)
        return tuple(10 * part for part in features) if isinstance(features, tuple) else 10 * features


class OwnActionDistribution:
    """Makes another distribution of what the network returns."""

    def _get_action_dist_from_latent(self, latent_pi, *args):
        return self.action_dist.proba_distribution(10 * self.action_net(latent_pi), self.log_std)


OVERRIDES = [OwnForward, OwnEvaluateActions, OwnGetDistribution, OwnExtractFeatures, OwnActionDistribution]
every_override = pytest.mark.parametrize("override", OVERRIDES)
every_base_policy = pytest.mark.parametrize("base", [MlpPolicy, ActorCriticPolicy])


def make_overriding_model(override, base, share_features_extractor=True, **kwargs):
    policy_class = type(override.__name__, (override, base), {})
    policy_kwargs = dict(share_features_extractor=share_features_extractor, **kwargs.pop("policy_kwargs", {}))
    model = make_model(policy_class, WIDE_PAIR, policy_kwargs=policy_kwargs, **kwargs)
    with th.no_grad():
        # SB3 begins with means near 0, of which nothing can be seen
        model.policy.action_net.weight.normal_(std=0.5)
    return model


@every_override
@every_base_policy
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_what_a_policy_overrides_decides_how_it_acts(override, base, n_envs, share_features_extractor):
    kwargs = dict(n_envs=n_envs, policy_kwargs=dict(log_std_init=-20.0))
    model = make_overriding_model(override, base, share_features_extractor, **kwargs)
    collect(model)
    observations = th.as_tensor(model.rollout_buffer.observations)
    with th.no_grad():
        if override is OwnGetDistribution:
            expected = model.policy.get_distribution(observations).mode()
        else:
            expected, _, _ = model.policy(observations, deterministic=True)
    np.testing.assert_allclose(model.rollout_buffer.actions, expected, atol=1e-4)
    # The policy without it acts in another way
    plain = deepcopy(model.policy)
    plain.__class__ = base
    with th.no_grad():
        difference = (expected - plain(observations, deterministic=True)[0]).abs().max()
    assert difference == 0 if override is OwnEvaluateActions else difference > 0.1


@every_override
@every_base_policy
@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_what_a_policy_overrides_is_what_the_gradient_is_of(override, base, share_features_extractor):
    """The gradient of the loss as it is written down, for log-probabilities and entropies that the policy returns."""
    model = make_overriding_model(override, base, share_features_extractor, ent_coef=0.1, n_envs=2)
    policy, expected = model.policy, []

    class Expect(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            buffer = model.rollout_buffer
            observations, actions, advantages = (
                th.as_tensor(array, dtype=th.float32) for array in (buffer.observations, buffer.actions, buffer.advantages)
            )
            advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
            if override is OwnGetDistribution:
                distribution = policy.get_distribution(observations)
                log_prob, entropy = distribution.log_prob(actions), distribution.entropy()
            else:
                _, log_prob, entropy = policy.evaluate_actions(observations, actions)
            loss = -(advantages * log_prob).mean() - 0.1 * entropy.mean()
            parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
            gradients = th.autograd.grad(loss, parameters, allow_unused=True)
            expected.extend(zip(parameters, gradients, strict=True))

    model.learn(1, callback=Expect())
    assert expected
    for parameter, gradient in expected:
        if gradient is None:
            assert parameter.grad is None
        else:
            th.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@every_override
@every_base_policy
def test_a_step_of_a_policy_that_overrides_something_has_the_divergence_of_target_kl(override, base):
    """As far as its distribution says how it acts."""
    kwargs = dict(target_kl=1e-3, n_steps=100, normalize_observations=False)
    model = make_overriding_model(override, base, **kwargs)
    gaussians = []

    class Note(BaseCallback):
        def _on_step(self):
            return True

        def note(self):
            policy, observations = model.policy, th.as_tensor(model.rollout_buffer.observations)
            with th.no_grad():
                if override is OwnGetDistribution:
                    gaussian = policy.get_distribution(observations).distribution
                else:
                    latent = policy.mlp_extractor.forward_actor(policy.extract_features(observations))
                    gaussian = policy._get_action_dist_from_latent(latent).distribution
            gaussians.append(th.distributions.Normal(gaussian.mean, gaussian.stddev))

        _on_rollout_end = _on_training_end = note

    model.learn(1, callback=Note())
    divergence = th.distributions.kl_divergence(*gaussians).sum(dim=1).mean().item()
    assert_stepped_as_asked(model)
    assert divergence == pytest.approx(1e-3, rel=2e-3)


class NamedPolicy(MlpPolicy):
    """A subclass that fixes some arguments, as the documentation of SB3 suggests."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | dict(net_arch=[7], activation_fn=nn.Tanh))


@pytest.mark.parametrize("baseline", ["linear", "quadratic", "random_features", None])
def test_a_subclass_of_our_own_policy_may_fix_arguments(baseline):
    model = make_model(NamedPolicy, baseline=baseline)
    assert model.policy.net_arch == [7]
    check_learns(model)


@pytest.mark.parametrize("policy", [MlpPolicy, MultiInputPolicy, CnnPolicy])
def test_policy_classes_may_be_given_in_place_of_their_names(policy):
    observation_space = {MlpPolicy: VECTOR, MultiInputPolicy: spaces.Dict(vec=VECTOR), CnnPolicy: GRAY_IMAGE}[policy]
    one, other = (make_model(choice, observation_space=observation_space) for choice in (policy, policy.__name__))
    assert type(one.policy) is type(other.policy) is policy
    assert th.equal(weights(one), weights(other))


# Policies of SB3


class TwoNetworks(nn.Module):
    """Separate actor and critic networks, from the documentation of SB3 ("Custom Policy Network")."""

    def __init__(self, feature_dim, last_layer_dim_pi=16, last_layer_dim_vf=12):
        super().__init__()
        self.latent_dim_pi = last_layer_dim_pi
        self.latent_dim_vf = last_layer_dim_vf
        self.policy_net = nn.Sequential(nn.Linear(feature_dim, last_layer_dim_pi), nn.ReLU())
        self.value_net = nn.Sequential(nn.Linear(feature_dim, last_layer_dim_vf), nn.ReLU())

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features):
        return self.policy_net(features)

    def forward_critic(self, features):
        return self.value_net(features)


class DocumentationPolicy(ActorCriticPolicy):
    """The custom policy in the documentation of SB3: a plain subclass of its ``ActorCriticPolicy``."""

    def __init__(self, observation_space, action_space, lr_schedule, *args, **kwargs):
        kwargs["ortho_init"] = False
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)

    def _build_mlp_extractor(self):
        self.mlp_extractor = TwoNetworks(self.features_dim)


@pytest.mark.parametrize("action_space", [PAIR, CHOICE, spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)], ids=str)
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("baseline", ["linear", "random_features", None])
def test_the_critic_branch_of_a_policy_of_sb3_is_the_feature_map_of_the_baseline(action_space, n_envs, baseline):
    model = make_model(DocumentationPolicy, action_space, n_envs, baseline=baseline)
    critic = weights(model.policy.mlp_extractor.value_net)
    check_learns(model)
    assert th.equal(critic, weights(model.policy.mlp_extractor.value_net))
    observations = th.rand(100, 3)
    with th.no_grad():
        values = model.policy.predict_values(observations).double().ravel().numpy()
        latent = model.policy.mlp_extractor.forward_critic(observations).double()
    if baseline is None:
        assert not values.any()
        return
    assert np.ptp(values) > 1e-3
    # Linear in what the critic branch returns
    design = th.cat([latent, th.ones(100, 1)], dim=1).numpy()
    fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    np.testing.assert_allclose(values, fitted, atol=1e-6)


@pytest.mark.parametrize(
    "policy, observation_space, policy_kwargs",
    [
        (ActorCriticPolicy, VECTOR, dict(net_arch=[8, 4])),
        (ActorCriticPolicy, VECTOR, dict(net_arch=dict(pi=[8], vf=[6, 5]), activation_fn=nn.ELU)),
        (ActorCriticPolicy, VECTOR, dict(net_arch=[], share_features_extractor=False)),
        (ActorCriticCnnPolicy, GRAY_IMAGE, dict(features_extractor_kwargs=dict(features_dim=8))),
        (MultiInputActorCriticPolicy, spaces.Dict(vec=VECTOR, choice=CHOICE), dict(net_arch=[8])),
    ],
    ids=["net_arch", "net_arch_of_each", "no_net_arch", "cnn", "multi_input"],
)
def test_policies_of_sb3_act_as_they_do_in_sb3(policy, observation_space, policy_kwargs):
    kwargs = dict(policy_kwargs=policy_kwargs | dict(log_std_init=-20.0), observation_space=observation_space)
    model = make_model(policy, WIDE_PAIR, target_kl=None, learning_rate=0.0, **kwargs)
    assert type(model.policy) is policy
    with th.no_grad():
        model.policy.action_net.weight.normal_()
    model.learn(50)
    expected, _ = model.predict(model.rollout_buffer.observations, deterministic=True)
    np.testing.assert_allclose(model.rollout_buffer.actions, expected, atol=1e-3)
    if policy_kwargs.get("net_arch") == dict(pi=[8], vf=[6, 5]):
        assert model.policy.value_net.in_features == 5
    model.target_kl = 0.01
    model.policy.log_std.data.fill_(0.0)
    before = weights(model)
    model.learn(1)
    assert not th.equal(before, weights(model))
    assert_stepped_as_asked(model)


def assert_predicts_the_same(policy, other):
    np.testing.assert_array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (policy, other)))
    with th.no_grad():
        values = [one.predict_values(th.as_tensor(OBSERVATIONS)) for one in (policy, other)]
    th.testing.assert_close(*values, check_dtype=False)


def test_a_policy_of_the_users_is_saved_with_the_model(tmp_path):
    model = make_model(DocumentationPolicy).learn(50)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=model.get_env())
    assert_predicts_the_same(model.policy, loaded.policy)
    assert loaded.learn(1)._n_updates == model._n_updates + 1


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(baseline_memory=0.0),
        # Its own class has a plain linear layer, in which there is no room for the memory
        pytest.param({}, marks=pytest.mark.xfail(raises=RuntimeError, strict=True)),
        # Nor has it a critic of actions
        pytest.param(dict(baseline_memory=0.0, advantage="q"), marks=pytest.mark.xfail(raises=RuntimeError, strict=True)),
    ],
    ids=str,
)
def test_a_policy_of_the_users_is_saved_alone(tmp_path, kwargs):
    model = make_model(DocumentationPolicy, **kwargs).learn(50)
    model.policy.save(tmp_path / "policy")
    assert_predicts_the_same(model.policy, DocumentationPolicy.load(tmp_path / "policy"))


@pytest.mark.parametrize("target_kl", [0.01, None])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_policy_learns_the_same_as_it_does_eagerly(backend, target_kl):
    """These back-ends take no compiler. The second prepares first derivatives alone, as the default one does."""
    # Both through PyTorch: NumPy's rounding is another
    models = [make_model(target_kl=target_kl, policy_kwargs=dict(activation_fn=nn.ELU)) for _ in range(2)]
    models[1].policy = th.compile(models[1].policy, backend=backend)
    for model in models:
        model.learn(100)
    th.testing.assert_close(*(weights(model.policy) for model in models), rtol=1e-4, atol=1e-5)


# Actor-critics


ACTOR_CRITICS = {
    "plain": {},
    "gsde": dict(use_sde=True, sde_sample_freq=4),
    "gsde_squashed": dict(use_sde=True, action_space=WIDE_PAIR, policy_kwargs=dict(squash_output=True)),
    "sb3": dict(policy=ActorCriticPolicy),
    "sb3_gsde_squashed": dict(
        policy=ActorCriticPolicy, use_sde=True, action_space=WIDE_PAIR, policy_kwargs=dict(squash_output=True)
    ),
    "sb3_documentation": dict(policy=DocumentationPolicy, action_space=CHOICE),
    "separate_extractors": dict(policy_kwargs=dict(features_extractor_class=SmallExtractor, share_features_extractor=False)),
    "own_evaluate_actions": dict(policy=type("OwnLogProbabilities", (OwnEvaluateActions, MlpPolicy), {})),
    "optimizer": dict(target_kl=None, learning_rate=1e-2),
}


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("advantage", ["q", "advantage", "td"])
@pytest.mark.parametrize("kwargs", [pytest.param(kwargs, id=name) for name, kwargs in ACTOR_CRITICS.items()])
def test_every_advantage_function_works_with_every_kind_of_policy(kwargs, advantage, n_envs):
    model = make_model(n_envs=n_envs, advantage=advantage, **kwargs)
    # The first batch of a critic of actions moves nothing
    check_learns(model.learn(1))
    buffer = model.rollout_buffer
    assert np.isfinite(buffer.advantages).all() and buffer.values.any()
    if advantage != "td":
        assert buffer.action_values.any()


@pytest.mark.parametrize("squash_output", [False, True])
def test_actions_are_valued_by_where_they_are_between_their_bounds(squash_output):
    """Those of a policy that squashes are within [-1, 1] before they are scaled to the bounds, those of others within them."""
    kwargs = dict(use_sde=True, policy_kwargs=dict(squash_output=squash_output, log_std_init=2.0))
    model = make_model(action_space=WIDE_PAIR, advantage="q", n_steps=100, **kwargs).learn(1)
    features = model.policy.action_value_net.features
    actions = model.rollout_buffer.actions
    found = features.encode(th.as_tensor(actions))[:, :2].numpy()
    expected = actions if squash_output else np.clip(actions, -100, 100) / 100
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.abs(found).max() <= 1


def test_a_compiled_policy_has_its_critic_of_actions():
    models = [make_model(advantage="q", policy_kwargs=dict(activation_fn=nn.ELU)) for _ in range(2)]
    models[1].policy = th.compile(models[1].policy, backend="eager")
    for model in models:
        model.learn(100)
        assert model.rollout_buffer.action_values.any()
    th.testing.assert_close(*(weights(model.policy) for model in models), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("advantage", ["monte_carlo", "q", "advantage", "td"])
@pytest.mark.parametrize("policy", ["MlpPolicy", DocumentationPolicy])
def test_policies_learn_in_pieces_as_in_one_piece_from_several_environments(policy, advantage):
    whole, pieces = (make_model(policy, n_envs=3, advantage=advantage) for _ in range(2))
    while pieces._n_updates < 4:
        pieces.learn(1, reset_num_timesteps=False)
    whole.learn(pieces.num_timesteps)
    assert whole._n_updates == 4
    assert_same(dict(whole.get_parameters()), dict(pieces.get_parameters()))


# Generalized state-dependent exploration


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("sde_sample_freq", [-1, 4])
@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {},
        dict(full_std=False),
        dict(use_expln=True),
        dict(squash_output=True),
        dict(squash_output=True, full_std=False, use_expln=True),
        dict(net_arch=[]),
        dict(log_std_init=-2.0, share_features_extractor=False),
    ],
    ids=str,
)
def test_state_dependent_exploration_takes_all_the_options_of_sb3(policy_kwargs, sde_sample_freq, n_envs):
    model = make_model(
        n_envs=n_envs,
        action_space=spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32)),
        use_sde=True,
        sde_sample_freq=sde_sample_freq,
        ent_coef=0.01,
        policy_kwargs=policy_kwargs,
    )
    check_learns(model)


@pytest.mark.parametrize("full_std", [True, False])
def test_full_std_has_a_parameter_for_each_unit_and_action(full_std):
    model = make_model(use_sde=True, policy_kwargs=dict(full_std=full_std, net_arch=[4]))
    assert model.policy.log_std.shape == (4, 2 if full_std else 1)


class FixedLength(gym.Env):
    """The same observation at each of 30 steps."""

    observation_space = VECTOR
    action_space = WIDE_PAIR

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_steps = 0
        return np.ones(3, np.float32), {}

    def step(self, action):
        self.n_steps += 1
        return np.ones(3, np.float32), 0.0, self.n_steps == 30, False, {}


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("sde_sample_freq, n_expected", [(-1, 1), (1, 30), (10, 3)])
def test_the_noise_of_squashed_actions_is_drawn_every_sde_sample_freq_steps(sde_sample_freq, n_expected, n_envs):
    """Through PyTorch, unlike that of others. With one observation, actions change with the noise alone."""
    env = DummyVecEnv([FixedLength] * n_envs)
    kwargs = dict(use_sde=True, sde_sample_freq=sde_sample_freq, policy_kwargs=dict(squash_output=True))
    model = REINFORCE("MlpPolicy", env, n_episodes=2 * n_envs, seed=0, **kwargs).learn(1)
    episodes = model.rollout_buffer.actions.reshape(2 * n_envs, 30, 2)
    assert [len(np.unique(episode, axis=0)) for episode in episodes] == [n_expected] * len(episodes)
    assert len(np.unique(episodes[:, 0], axis=0)) == len(episodes)


def test_squashing_without_state_dependent_exploration_is_refused():
    with pytest.raises((AssertionError, ValueError), match="squash_output=True is only available when using gSDE"):
        make_model(policy_kwargs=dict(squash_output=True))


# Batch normalization and dropout are on in the update, and off while acting and predicting


class BatchNormDropout(BaseFeaturesExtractor):
    """Flat observations through batch normalization and dropout."""

    def __init__(self, observation_space):
        super().__init__(observation_space, get_flattened_obs_dim(observation_space))
        self.flatten = nn.Flatten()
        self.batch_norm = nn.BatchNorm1d(self.features_dim)
        self.dropout = nn.Dropout(0.5)

    def forward(self, observations):
        return self.dropout(self.batch_norm(self.flatten(observations)))


@pytest.fixture(params=[(PAIR, True), (PAIR, False), (CHOICE, True), (CHOICE, False)], ids=str)
def moody(request):
    """A model with batch normalization and dropout."""
    action_space, share_features_extractor = request.param
    kwargs = dict(features_extractor_class=BatchNormDropout, share_features_extractor=share_features_extractor)
    return make_model(action_space=action_space, policy_kwargs=kwargs)


def batch_norm_statistics(model):
    extractors = (model.policy.pi_features_extractor, model.policy.vf_features_extractor)
    return [deepcopy(dict(extractor.batch_norm.state_dict())) for extractor in extractors]


def test_an_update_changes_the_statistics_of_batch_normalization_once(moody):
    (before, _), _ = batch_norm_statistics(moody), moody.learn(1)
    after, _ = batch_norm_statistics(moody)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert not th.equal(before[name], after[name]), name
    assert after["num_batches_tracked"] == before["num_batches_tracked"] + 1


def test_the_statistics_of_batch_normalization_are_those_of_the_batch(moody):
    moody.learn(1)
    after, _ = batch_norm_statistics(moody)
    # PyTorch gives a new batch a weight of 0.1
    expected = 0.1 * moody.rollout_buffer.observations.mean(axis=0)
    np.testing.assert_allclose(after["running_mean"], expected, rtol=1e-4, atol=1e-6)


def test_collecting_leaves_the_statistics_of_batch_normalization_alone(moody):
    before = batch_norm_statistics(moody)
    for _ in range(2):
        collect(moody)
    assert not moody.policy.training
    assert_same(before, batch_norm_statistics(moody))


def test_predicting_is_deterministic_with_dropout_and_changes_nothing(moody):
    moody.learn(50)
    before = batch_norm_statistics(moody)
    first, _ = moody.predict(OBSERVATIONS, deterministic=True)
    with th.no_grad():
        value = moody.policy.predict_values(th.as_tensor(OBSERVATIONS))
    for _ in range(3):
        np.testing.assert_array_equal(first, moody.predict(OBSERVATIONS, deterministic=True)[0])
        with th.no_grad():
            assert th.equal(value, moody.policy.predict_values(th.as_tensor(OBSERVATIONS)))
    assert_same(before, batch_norm_statistics(moody))


def test_one_pass_of_the_update_is_in_training_mode_and_all_else_is_not(moody):
    modes = []
    moody.policy.pi_features_extractor.register_forward_hook(lambda module, *_: modes.append(module.training))
    collect(moody)
    assert modes and not any(modes)
    modes.clear()
    moody.train()
    assert modes.count(True) == 1
    assert modes[0]


# The divergence of a step, from what policies say of themselves


class SequenceExtractor(BaseFeaturesExtractor):
    """Looks at a vector as at a sequence of numbers."""

    def __init__(self, observation_space, kind):
        super().__init__(observation_space, 8)
        self.embed = nn.Linear(1, 8)
        self.layer = (
            nn.GRU(8, 8, batch_first=True) if kind == "gru" else nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        )

    def forward(self, observations):
        sequence = self.layer(self.embed(observations.unsqueeze(2)))
        return (sequence[0] if isinstance(sequence, tuple) else sequence).mean(dim=1)


def sequences(kind):
    return dict(policy_kwargs=dict(features_extractor_class=SequenceExtractor, features_extractor_kwargs=dict(kind=kind)))


SEPARATE = dict(share_features_extractor=False)
IMAGE_AND_VECTOR = spaces.Dict(vec=VECTOR, img=GRAY_IMAGE)
POLICIES = {
    "gaussian": {},
    "categorical": dict(action_space=CHOICE),
    "multi_categorical": dict(action_space=spaces.MultiDiscrete([2, 3])),
    "bernoulli": dict(action_space=spaces.MultiBinary(2)),
    "no_hidden_layers": dict(policy_kwargs=dict(net_arch=[])),
    "relu": dict(policy_kwargs=dict(activation_fn=nn.ReLU)),
    "separate_extractors": dict(policy_kwargs=dict(features_extractor_class=SmallExtractor, **SEPARATE)),
    "frozen_extractor": dict(policy_kwargs=dict(features_extractor_class=FrozenExtractor)),
    "batch_norm_dropout": dict(policy_kwargs=dict(features_extractor_class=BatchNormDropout)),
    "batch_norm_dropout_of_sb3": dict(policy=ActorCriticPolicy, policy_kwargs=dict(features_extractor_class=BatchNormDropout)),
    "gru": sequences("gru"),
    "transformer": sequences("transformer"),
    "sb3": dict(policy=ActorCriticPolicy),
    "sb3_separate_extractors": dict(
        policy=ActorCriticPolicy, policy_kwargs=dict(features_extractor_class=SmallExtractor, **SEPARATE)
    ),
    "sb3_documentation": dict(policy=DocumentationPolicy, action_space=CHOICE),
    "gsde": dict(use_sde=True),
    "gsde_squashed": dict(use_sde=True, policy_kwargs=dict(squash_output=True)),
    "gsde_sb3": dict(policy=ActorCriticPolicy, use_sde=True, sde_sample_freq=4, policy_kwargs=dict(full_std=False)),
    "cnn": dict(policy="CnnPolicy", observation_space=GRAY_IMAGE),
    "cnn_separate_extractors": dict(policy="CnnPolicy", observation_space=GRAY_IMAGE, policy_kwargs=SEPARATE),
    "cnn_sb3": dict(policy=ActorCriticCnnPolicy, observation_space=GRAY_IMAGE, action_space=CHOICE),
    "multi_input": dict(policy="MultiInputPolicy", observation_space=IMAGE_AND_VECTOR),
    "multi_input_separate_extractors": dict(
        policy="MultiInputPolicy", observation_space=IMAGE_AND_VECTOR, action_space=CHOICE, policy_kwargs=SEPARATE
    ),
    "multi_input_sb3": dict(policy=MultiInputActorCriticPolicy, observation_space=IMAGE_AND_VECTOR),
}


class DistributionParameters(BaseCallback):
    """Notes the parameters of the distributions of the actions of a batch before and after the step, in float64."""

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
        if isinstance(parts, th.distributions.Normal):
            self.noted.append([("normal", parts.mean.double(), parts.stddev.double())])
        elif isinstance(parts, th.distributions.Bernoulli):
            self.noted.append([("bernoulli", parts.logits.double())])
        else:
            parts = parts if isinstance(parts, list) else [parts]
            self.noted.append([("categorical", part.logits.double()) for part in parts])

    _on_rollout_end = _on_training_end = note

    def divergence(self):
        """KL(before || after), summed over the dimensions of the action, mean over the batch."""
        total = 0.0
        for (kind, *old), (_, *new) in zip(*self.noted, strict=True):
            if kind == "normal":
                (m, s), (n, t) = old, new
                each = th.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5
            elif kind == "bernoulli":
                (p, q) = (logits.sigmoid() for logits in (*old, *new))
                each = p * th.log(p / q) + (1 - p) * th.log((1 - p) / (1 - q))
            else:
                (p, q) = (logits.softmax(dim=1) for logits in (*old, *new))
                each = p * th.log(p / q)
            total += each.sum(dim=1).mean().item()
        return total


@pytest.mark.parametrize("kwargs", [pytest.param(kwargs, id=name) for name, kwargs in POLICIES.items()])
def test_the_new_policy_has_the_divergence_asked_for_from_the_one_that_collected_the_batch(kwargs):
    """Over the whole batch, as it acts, without what the statistics of the observations then change."""
    callback = DistributionParameters()
    model = make_model(n_envs=2, target_kl=0.02, n_steps=50, normalize_observations=False, **kwargs)
    before = {name: value.clone() for name, value in model.policy.named_parameters() if value.requires_grad}
    model.learn(1, callback=callback)
    assert model._n_updates == 1
    assert callback.divergence() == pytest.approx(0.02, rel=2e-3)
    assert_stepped_as_asked(model)
    # The actor moves, and nothing else does
    actor = ("action_net", "mlp_extractor.policy_net", "log_std", "features_extractor")
    for name, value in model.policy.named_parameters():
        assert th.isfinite(value).all(), name
        if name in before:
            assert th.equal(value, before[name]) != name.startswith(actor), name


@pytest.mark.parametrize("validate_args", [True, False])
@pytest.mark.parametrize(
    "action_space, make_extreme",
    [
        pytest.param(CHOICE, lambda policy: policy.action_net.bias[0].add_(20), id="improbable_actions"),
        pytest.param(CHOICE, lambda policy: policy.action_net.bias[0].add_(60), id="hardly_possible_actions"),
        pytest.param(CHOICE, lambda policy: policy.action_net.bias[0].add_(200), id="impossible_actions"),
        pytest.param(PAIR, lambda policy: policy.log_std.fill_(-10), id="little_noise"),
        pytest.param(PAIR, lambda policy: policy.log_std.fill_(-20), id="next_to_no_noise"),
        pytest.param(PAIR, lambda policy: policy.log_std.fill_(20), id="much_noise"),
    ],
)
def test_a_step_of_an_extreme_policy_is_no_longer_than_asked_for_and_leaves_it_finite(
    action_space, make_extreme, validate_args
):
    """Whether PyTorch checks its distributions or not, as after ``torch.compile``."""
    th.distributions.Distribution.set_default_validate_args(validate_args)
    model = make_model(action_space=action_space, n_steps=100, target_kl=0.01)
    with th.no_grad():
        make_extreme(model.policy)
    model.learn(1)
    assert model._n_updates == 1
    assert 0 <= logged(model, "train/kl_divergence_loss") <= 1.001 * 0.01
    assert th.isfinite(weights(model)).all()
