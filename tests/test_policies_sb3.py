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
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.dqn import MlpPolicy as DQNPolicy
from torch import nn

from sb3_reinforce import REINFORCE, CnnPolicy, MlpPolicy, MultiInputPolicy
from tests.envs import RandomEnv

VECTOR = spaces.Box(-1, 1, (3,))
PAIR = spaces.Box(-1, 1, (2,))
CHOICE = spaces.Discrete(3)
OBSERVATIONS = np.random.default_rng(0).uniform(-1, 1, (10, 3)).astype(np.float32)


def make_model(policy="MlpPolicy", action_space=PAIR, n_envs=1, observation_space=VECTOR, **kwargs):
    env = DummyVecEnv([lambda: RandomEnv(observation_space, action_space, 7)] * n_envs)
    return REINFORCE(policy, env, **(dict(n_steps=16, seed=0, learning_rate=1e-2) | kwargs))


def parameters(module):
    return th.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def collect(model):
    """A rollout that is not learned from."""
    _, callback = model._setup_learn(1)
    assert model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, model.n_steps)


def check_learns(model):
    """Two updates change every parameter of the actor, and leave the model in order."""
    policy = model.policy
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    model.learn(1)
    model.learn(1, reset_num_timesteps=False)
    assert model._n_updates == 2
    for name, value in policy.state_dict().items():
        assert th.isfinite(value).all(), name
        if name.startswith(("action_net", "mlp_extractor.policy_net", "pi_features_extractor", "log_std")):
            assert not th.equal(value, before[name]), name
    actions, _ = model.predict(OBSERVATIONS)
    assert all(model.action_space.contains(action) for action in actions)


class TestNetwork:
    @pytest.mark.parametrize(
        "net_arch, hidden",
        [
            (None, [64, 64]),
            ([], []),
            ([4], [4]),
            ([4, 6], [4, 6]),
            (dict(pi=[8]), [8]),
            (dict(pi=[8], vf=[]), [8]),
            (dict(pi=[]), []),
            ({}, []),
        ],
        ids=str,
    )
    def test_net_arch_is_the_actors(self, net_arch, hidden):
        model = make_model(policy_kwargs=dict(net_arch=net_arch))
        layers = [module for module in model.policy.mlp_extractor.policy_net if isinstance(module, nn.Linear)]
        assert [layer.out_features for layer in layers] == hidden
        assert model.policy.action_net.in_features == (hidden or [3])[-1]
        check_learns(model)

    @pytest.mark.parametrize("net_arch", [dict(pi=[8], vf=[8]), dict(vf=[8])], ids=str)
    def test_a_critic_in_net_arch_is_ignored_with_a_warning(self, net_arch):
        with pytest.warns(UserWarning, match="'vf' is ignored"):
            model = make_model(baseline="linear", policy_kwargs=dict(net_arch=net_arch))
        assert model.policy.value_net.in_features == 3
        check_learns(model)

    def test_behind_a_cnn_there_are_no_hidden_layers_by_default(self):
        model = make_model("CnnPolicy", observation_space=spaces.Box(0, 255, (36, 36, 1), np.uint8))
        assert len(model.policy.mlp_extractor.policy_net) == 0

    @pytest.mark.parametrize("activation_fn", [nn.Tanh, nn.ReLU, nn.ELU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid])
    @pytest.mark.parametrize("action_space", [PAIR, CHOICE], ids=["box", "discrete"])
    def test_activation_functions(self, activation_fn, action_space):
        model = make_model(action_space=action_space, policy_kwargs=dict(activation_fn=activation_fn))
        activations = [module for module in model.policy.mlp_extractor.policy_net if not isinstance(module, nn.Linear)]
        assert [type(activation) for activation in activations] == [activation_fn] * 2
        check_learns(model)

    @pytest.mark.parametrize("normalize_observations", [False, True])
    def test_the_mean_of_sampled_actions_is_what_predict_returns(self, normalize_observations):
        """Acting while collecting and ``predict`` go through different code: both must see the same network."""
        for activation_fn in (nn.ReLU, nn.Tanh, nn.ELU):
            model = make_model(
                normalize_observations=normalize_observations,
                action_space=spaces.Box(-100, 100, (2,)),
                policy_kwargs=dict(activation_fn=activation_fn),
            )
            model.learn(100)
            with th.no_grad():
                model.policy.log_std.fill_(-20)
            collect(model)
            expected, _ = model.predict(model.rollout_buffer.observations, deterministic=True)
            np.testing.assert_allclose(model.rollout_buffer.actions, expected, atol=1e-5)

    def test_the_initialisation_is_that_of_sb3_by_default(self):
        policy = make_model().policy
        hidden = policy.mlp_extractor.policy_net[0].weight.detach()
        th.testing.assert_close(hidden.T @ hidden, 2 * th.eye(3))
        output = policy.action_net.weight.detach()
        th.testing.assert_close(output @ output.T, 1e-4 * th.eye(2))
        assert not policy.action_net.bias.any()

    def test_the_initialisation_is_glorots_if_it_is_not_orthogonal(self):
        policy = make_model(policy_kwargs=dict(net_arch=[50, 50], ortho_init=False)).policy
        for layer in (*policy.mlp_extractor.policy_net, policy.action_net):
            if isinstance(layer, nn.Linear):
                bound = np.sqrt(6 / (layer.in_features + layer.out_features))
                assert 0.9 * bound < layer.weight.abs().max() <= bound
                assert not layer.bias.any()

    def test_the_initial_log_std_can_be_given(self):
        policy = make_model(policy_kwargs=dict(log_std_init=-1.5)).policy
        assert th.equal(policy.log_std.detach(), th.full((2,), -1.5))


class TestOptimiser:
    @pytest.mark.parametrize(
        "optimizer_class, optimizer_kwargs",
        [
            (th.optim.Adam, None),
            (th.optim.Adam, dict(eps=1e-5, betas=(0.8, 0.9))),
            (th.optim.AdamW, None),
            (th.optim.AdamW, dict(weight_decay=0.1)),
            (th.optim.RMSprop, dict(alpha=0.99, eps=1e-5, weight_decay=0)),
            (th.optim.SGD, dict(momentum=0.9)),
        ],
        ids=str,
    )
    def test_class_and_arguments(self, optimizer_class, optimizer_kwargs):
        kwargs = dict(optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs)
        model = make_model(policy_kwargs=kwargs)
        optimizer = model.policy.optimizer
        assert type(optimizer) is optimizer_class
        for name, value in (optimizer_kwargs or {}).items():
            assert optimizer.param_groups[0][name] == value
        check_learns(model)

    def test_adam_keeps_the_epsilon_of_pytorch(self):
        assert make_model().policy.optimizer.param_groups[0]["eps"] == 1e-8

    def test_holds_all_parameters_and_none_of_the_baseline(self):
        policy = make_model().policy
        held = [id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]]
        assert sorted(held) == sorted(map(id, policy.parameters()))
        assert not list(policy.value_net.parameters())

    def test_weight_decay_shrinks_the_weights_and_spares_the_baseline(self):
        kwargs = dict(optimizer_class=th.optim.AdamW, optimizer_kwargs=dict(weight_decay=10.0))
        models = [make_model(policy_kwargs=policy_kwargs).learn(1) for policy_kwargs in ({}, kwargs)]
        plain, decayed = (parameters(model.policy.mlp_extractor.policy_net).norm() for model in models)
        assert decayed < 0.95 * plain
        assert th.equal(*(model.policy.value_net.weight for model in models))

    def test_follows_a_schedule_of_the_learning_rate(self):
        model = make_model(learning_rate=lambda progress: 0.1 * progress, n_steps=50)
        rates = []
        model.learn(400, callback=lambda locals_, _: rates.append(rate(locals_["self"])) or True)
        assert rates[0] == pytest.approx(0.1)
        assert rates == sorted(rates, reverse=True)
        assert 0 <= rate(model) < 0.02


def rate(model):
    return model.policy.optimizer.param_groups[0]["lr"]


class SmallExtractor(BaseFeaturesExtractor):
    """One trained layer on flat observations."""

    def __init__(self, observation_space, features_dim=5, bias=True):
        super().__init__(observation_space, features_dim)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(get_flattened_obs_dim(observation_space), features_dim, bias), nn.Tanh()
        )

    def forward(self, observations):
        return self.net(observations)


class TestFeaturesExtractor:
    @pytest.mark.parametrize("baseline", ["linear", "quadratic", "random", None])
    @pytest.mark.parametrize("normalize_observations", [False, True])
    @pytest.mark.parametrize("share_features_extractor", [False, True])
    def test_custom(self, share_features_extractor, normalize_observations, baseline):
        kwargs = dict(
            features_extractor_class=SmallExtractor,
            features_extractor_kwargs=dict(features_dim=6, bias=False),
            share_features_extractor=share_features_extractor,
        )
        model = make_model(normalize_observations=normalize_observations, baseline=baseline, policy_kwargs=kwargs)
        policy = model.policy
        assert policy.features_dim == 6
        assert (policy.pi_features_extractor is policy.vf_features_extractor) == share_features_extractor
        before = parameters(policy.vf_features_extractor)
        check_learns(model)
        # Nothing but the actor has a gradient
        assert th.equal(before, parameters(policy.vf_features_extractor)) != share_features_extractor

    def test_of_observations_that_are_no_vectors(self):
        kwargs = dict(features_extractor_class=SmallExtractor)
        model = make_model(observation_space=spaces.MultiBinary((2, 3)), policy_kwargs=kwargs)
        before = parameters(model.policy.features_extractor)
        model.learn(1)
        assert not th.equal(before, parameters(model.policy.features_extractor))

    def test_the_baseline_is_fitted_to_the_features_as_they_are_after_the_update(self):
        kwargs = dict(features_extractor_class=SmallExtractor)
        model = make_model(baseline="linear", policy_kwargs=kwargs, n_steps=100).learn(1)
        policy, buffer = model.policy, model.rollout_buffer
        with th.no_grad():
            features = policy.features_extractor(th.as_tensor(buffer.observations)).double().numpy()
            values = policy.predict_values(th.as_tensor(buffer.observations)).numpy().ravel()
        # As ridge regression on standardised features, within the returns
        ridge = make_pipeline(StandardScaler(), Ridge(alpha=1e-3 * len(features))).fit(features, buffer.returns)
        expected = np.clip(ridge.predict(features), buffer.returns.min(), buffer.returns.max())
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


class NamedPolicy(MlpPolicy):
    """A subclass that fixes some arguments, as the documentation of SB3 suggests."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | dict(net_arch=[7], activation_fn=nn.Tanh))


class ScaledPolicy(MlpPolicy):
    """A subclass that changes what the policy does: actions are ten times as large as those of the network."""

    def _get_action_dist_from_latent(self, latent_pi):
        return self.action_dist.proba_distribution(10 * self.action_net(latent_pi), self.log_std)


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


class TestCustomPolicy:
    @pytest.mark.parametrize("baseline", ["linear", "quadratic", "random", None])
    def test_subclass_of_our_own(self, baseline):
        model = make_model(NamedPolicy, baseline=baseline, normalize_observations=True)
        assert model.policy.net_arch == [7]
        check_learns(model)

    @pytest.mark.parametrize("policy", [MlpPolicy, MultiInputPolicy, CnnPolicy])
    def test_classes_may_be_given_in_place_of_their_names(self, policy):
        observation_space = {
            MlpPolicy: VECTOR,
            MultiInputPolicy: spaces.Dict(vec=VECTOR),
            CnnPolicy: spaces.Box(0, 255, (36, 36, 1), np.uint8),
        }[policy]
        one, other = (make_model(choice, observation_space=observation_space) for choice in (policy, policy.__name__))
        assert type(one.policy) is type(other.policy) is policy
        assert th.equal(parameters(one.policy), parameters(other.policy))

    @pytest.mark.parametrize("policy", [ScaledPolicy, "MlpPolicy"])
    def test_what_a_subclass_overrides_is_used_when_acting(self, policy):
        model = make_model(policy, action_space=spaces.Box(-100, 100, (2,)), policy_kwargs=dict(log_std_init=-20.0))
        with th.no_grad():
            model.policy.action_net.bias.copy_(th.tensor([1.0, -1.0]))
            model.policy.action_net.weight.zero_()
        model.learn(1)
        scale = 10 if policy is ScaledPolicy else 1
        np.testing.assert_allclose(
            model.rollout_buffer.actions, [[scale, -scale]] * len(model.rollout_buffer.actions), rtol=1e-4
        )

    @pytest.mark.parametrize("action_space", [PAIR, CHOICE, spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)], ids=str)
    @pytest.mark.parametrize("n_envs", [1, 3])
    @pytest.mark.parametrize("baseline", ["linear", "random", None])
    def test_of_the_documentation_of_sb3(self, action_space, n_envs, baseline):
        model = make_model(DocumentationPolicy, action_space, n_envs, baseline=baseline)
        assert model.policy.value_net.in_features == 12
        critic = parameters(model.policy.mlp_extractor.value_net)
        check_learns(model)
        # The critic branch is a fixed feature map, and the baseline on it is fitted to the returns
        assert th.equal(critic, parameters(model.policy.mlp_extractor.value_net))
        assert bool(model.policy.value_net.weight.any()) == (baseline is not None)

    @staticmethod
    def check_same(policy, other):
        np.testing.assert_array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (policy, other)))
        with th.no_grad():
            values = [one.predict_values(th.as_tensor(OBSERVATIONS)) for one in (policy, other)]
        th.testing.assert_close(*values, check_dtype=False)

    def test_of_the_documentation_of_sb3_is_saved_with_the_model(self, tmp_path):
        model = make_model(DocumentationPolicy).learn(50)
        model.save(tmp_path / "model")
        loaded = REINFORCE.load(tmp_path / "model", env=model.get_env())
        self.check_same(model.policy, loaded.policy)
        assert loaded.learn(1)._n_updates == model._n_updates + 1

    @pytest.mark.parametrize(
        "kwargs",
        [
            dict(baseline_memory=0.0),
            # Its own class has a plain linear layer, in which there is no room for the memory
            pytest.param({}, marks=pytest.mark.xfail(raises=RuntimeError, strict=True)),
        ],
        ids=str,
    )
    def test_of_the_documentation_of_sb3_is_saved_alone(self, tmp_path, kwargs):
        model = make_model(DocumentationPolicy, **kwargs).learn(50)
        model.policy.save(tmp_path / "policy")
        self.check_same(model.policy, DocumentationPolicy.load(tmp_path / "policy"))

    def test_of_sb3_itself_learns(self):
        check_learns(make_model(ActorCriticPolicy))

    @pytest.mark.parametrize("kwargs", [dict(baseline="quadratic"), dict(normalize_observations=True)], ids=str)
    def test_of_sb3_itself_has_no_feature_maps_of_ours(self, kwargs):
        (name,) = kwargs
        with pytest.raises(ValueError, match=f"{name} must be .* with ActorCriticPolicy"):
            make_model(ActorCriticPolicy, **kwargs)

    def test_that_is_no_actor_critic_is_refused(self):
        with pytest.raises(ValueError, match="policy_class must be a subclass of SB3's ActorCriticPolicy"):
            make_model(DQNPolicy, CHOICE)

    def test_of_an_unknown_name_is_refused(self):
        with pytest.raises(ValueError, match="Policy MlpLstmPolicy unknown"):
            make_model("MlpLstmPolicy")


class TestStateDependentExploration:
    @pytest.mark.parametrize("n_envs", [1, 3])
    @pytest.mark.parametrize("sde_sample_freq", [-1, 1, 4])
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
    def test_learns(self, policy_kwargs, sde_sample_freq, n_envs):
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
    def test_full_std_has_a_parameter_for_each_unit_and_action(self, full_std):
        model = make_model(use_sde=True, policy_kwargs=dict(full_std=full_std, net_arch=[4]))
        assert model.policy.log_std.shape == (4, 2 if full_std else 1)

    def test_squashed_actions_reach_the_environment_within_its_bounds_without_clipping(self):
        received = []

        class Recorder(gym.ActionWrapper):
            def action(self, action):
                received.append(action)
                return action

        low, high = np.array([-2, 0], np.float32), np.array([4, 1], np.float32)
        env = Recorder(RandomEnv(VECTOR, spaces.Box(low, high), 7))
        kwargs = dict(squash_output=True, log_std_init=0.0)
        model = REINFORCE("MlpPolicy", env, n_steps=64, use_sde=True, sde_sample_freq=1, seed=0, policy_kwargs=kwargs).learn(1)
        stored = model.rollout_buffer.actions
        assert np.all(np.abs(stored) <= 1)
        assert np.ptp(stored) > 1
        np.testing.assert_allclose(np.array(received), low + (stored + 1) / 2 * (high - low), atol=1e-5)

    @pytest.mark.parametrize("sde_sample_freq, n_expected", [(-1, 1), (1, 30), (10, 3)])
    def test_the_noise_is_drawn_every_sde_sample_freq_steps(self, sde_sample_freq, n_expected):
        class ThirtySteps(RandomEnv):
            def reset(self, **kwargs):
                obs, info = super().reset(**kwargs)
                self.remaining = 30
                return obs, info

        env = ThirtySteps(VECTOR, PAIR, 30)
        model = REINFORCE("MlpPolicy", env, n_episodes=1, seed=0, use_sde=True, sde_sample_freq=sde_sample_freq)
        matrices = []

        def note_noise(locals_, _):
            matrices.append(model.policy.action_dist.exploration_mat.clone())
            return True

        model.learn(1, callback=note_noise)
        assert len(matrices) == 30
        assert len({tuple(matrix.flatten().tolist()) for matrix in matrices}) == n_expected

    def test_each_environment_has_noise_of_its_own(self):
        model = make_model(n_envs=3, use_sde=True)
        model.learn(1)
        assert model.policy.action_dist.exploration_matrices.shape[0] == 3
        assert not th.equal(*model.policy.action_dist.exploration_matrices[:2])

    def test_squashing_without_it_is_refused(self):
        with pytest.raises((AssertionError, ValueError), match="squash_output=True is only available when using gSDE"):
            make_model(policy_kwargs=dict(squash_output=True))


class BatchNormDropout(BaseFeaturesExtractor):
    """Flat observations through batch normalisation and dropout."""

    def __init__(self, observation_space):
        super().__init__(observation_space, get_flattened_obs_dim(observation_space))
        self.flatten = nn.Flatten()
        self.batch_norm = nn.BatchNorm1d(self.features_dim)
        self.dropout = nn.Dropout(0.5)

    def forward(self, observations):
        return self.dropout(self.batch_norm(self.flatten(observations)))


@pytest.mark.parametrize("action_space", [PAIR, CHOICE], ids=["box", "discrete"])
@pytest.mark.parametrize("share_features_extractor", [True, False])
class TestTrainAndEvaluationMode:
    """Batch normalisation and dropout are on while learning, and off while acting and predicting."""

    @pytest.fixture
    def model(self, action_space, share_features_extractor):
        kwargs = dict(features_extractor_class=BatchNormDropout, share_features_extractor=share_features_extractor)
        return make_model(action_space=action_space, policy_kwargs=kwargs)

    @staticmethod
    def statistics(model):
        policy = model.policy
        extractors = (policy.pi_features_extractor, policy.vf_features_extractor)
        # Behind the observation normaliser
        return [deepcopy(dict(extractor.extractor.batch_norm.state_dict())) for extractor in extractors]

    def test_learning_changes_the_statistics_once_an_update(self, model):
        (before, _), _ = self.statistics(model), model.learn(1)
        after, _ = self.statistics(model)
        for name in ("weight", "bias", "running_mean", "running_var"):
            assert not th.equal(before[name], after[name]), name
        assert after["num_batches_tracked"] == before["num_batches_tracked"] + 1

    def test_the_statistics_are_those_of_the_batch(self, model):
        model.learn(1)
        after, _ = self.statistics(model)
        # PyTorch gives a new batch a weight of 0.1
        expected = 0.1 * model.rollout_buffer.observations.mean(axis=0)
        np.testing.assert_allclose(after["running_mean"], expected, rtol=1e-4, atol=1e-6)

    def test_collecting_leaves_the_statistics_alone(self, model):
        before = self.statistics(model)
        for _ in range(2):
            collect(model)
        assert not model.policy.training
        for old, new in zip(before, self.statistics(model), strict=True):
            assert all(th.equal(old[name], new[name]) for name in old)

    def test_predicting_is_deterministic_and_leaves_the_statistics_alone(self, model):
        model.learn(50)
        before = self.statistics(model)
        first, _ = model.predict(OBSERVATIONS, deterministic=True)
        for _ in range(5):
            np.testing.assert_array_equal(first, model.predict(OBSERVATIONS, deterministic=True)[0])
        for old, new in zip(before, self.statistics(model), strict=True):
            assert all(th.equal(old[name], new[name]) for name in old)

    def test_values_are_predicted_without_dropout(self, model):
        model.learn(50)
        with th.no_grad():
            values = [model.policy.predict_values(th.as_tensor(OBSERVATIONS)) for _ in range(3)]
        assert th.equal(values[0], values[1]) and th.equal(values[0], values[2])

    def test_the_update_is_made_in_training_mode_and_all_else_in_evaluation_mode(self, model):
        modes = []
        model.policy.pi_features_extractor.register_forward_hook(lambda module, *_: modes.append(module.training))
        collect(model)
        assert modes and not any(modes)
        modes.clear()
        model.train()
        assert modes.count(True) == 1
        assert modes[0]
