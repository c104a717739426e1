"""Acting: both ways to sample agree with each other and with the distributions of the policy."""

import tracemalloc
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from scipy import stats
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_reinforce import MlpPolicy, sampling
from sb3_reinforce.sampling import (
    Actor,
    MlpActor,
    all_finite,
    bernoulli_actions,
    categorical_actions,
    gaussian_actions,
    make_actor,
    multi_categorical_actions,
    reset_noise,
    torch_seeded_from,
)

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3, 2))
ACTIONS = {
    "box": spaces.Box(-1, 1, (2, 2)),
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([3, 2, 4]),
    "multi-binary": spaces.MultiBinary(3),
}


def make_policy(action_space: spaces.Space, cls: type[ActorCriticPolicy] = MlpPolicy, **kwargs: object) -> ActorCriticPolicy:
    th.manual_seed(0)
    policy = cls(OBSERVATIONS, action_space, lambda _: 1e-3, **kwargs)
    for parameter in policy.parameters():
        parameter.data += 0.3 * th.randn_like(parameter)
    policy.set_training_mode(False)
    return policy


def observations(n_envs: int = 5) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(n_envs, *OBSERVATIONS.shape)).astype(np.float32) * 3 + 1


VARIANTS = {
    "default": {},
    "tanh": dict(activation_fn=nn.Tanh),
    "no hidden layer": dict(net_arch=[]),
    "not normalised": dict(normalize_observations=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("space", ACTIONS)
def test_the_fast_actor_chooses_the_actions_of_the_general_one(space: str, variant: str):
    policy = make_policy(ACTIONS[space], **VARIANTS[variant])
    if policy.normalize_observations:
        policy.observation_normalizer.update(observations(50))
    for n_envs in range(1, 20):
        fast = make_actor(policy, np.random.default_rng(n_envs))
        general = Actor(policy, np.random.default_rng(n_envs))
        assert type(fast) is MlpActor
        for _ in range(3):
            obs = observations(n_envs)
            by_numpy, by_torch = fast(obs), general(obs)
            assert by_numpy[0].shape == by_torch[0].shape == (n_envs, *ACTIONS[space].shape)
            for one, other in zip(by_numpy[:2], by_torch[:2], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_matrices", [1, 2, 5])
@pytest.mark.parametrize("n_envs", [1, 2, 5])
def test_the_fast_actor_has_the_noise_of_gsde_as_well(n_envs: int, n_matrices: int, variant: str):
    """Whichever matrices there are: one for each environment, or another number of them, when SB3 takes one for all."""
    policy = make_policy(ACTIONS["box"], use_sde=True, log_std_init=-1, **VARIANTS[variant])
    rng = np.random.default_rng(0)
    fast, general = make_actor(policy, rng), Actor(policy, rng)
    assert type(fast) is MlpActor
    obs = observations(n_envs)
    chosen = []
    for seed in range(2):
        # The actor has to follow when the matrices change
        reset_noise(policy, n_matrices, np.random.default_rng(seed))
        for by_numpy, by_torch in zip(fast(obs)[:2], general(obs)[:2], strict=True):
            np.testing.assert_allclose(by_numpy, by_torch, rtol=1e-5, atol=1e-5)
        chosen.append(fast(obs)[0])
    assert np.abs(chosen[0] - chosen[1]).min() > 1e-3


@pytest.mark.parametrize("actor", [Actor, MlpActor])
@pytest.mark.parametrize("space", ACTIONS)
def test_noise_is_never_used_twice(space: str, actor: type[Actor], monkeypatch: pytest.MonkeyPatch):
    """Also where one block of noise ends and the next begins."""
    monkeypatch.setattr(sampling, "_STEPS_OF_NOISE", 3)
    policy = make_policy(ACTIONS[space])
    act = actor(policy, np.random.default_rng(0))
    obs = np.repeat(observations(1), 500, axis=0)
    steps = [act(obs)[0].reshape(500, -1) for _ in range(8)]
    correlations = np.corrcoef([(step - step.mean(axis=0)).flatten() for step in steps])
    # Five times what independent noise shows
    assert np.abs(correlations - np.eye(8)).max() < 5 / np.sqrt(500)


class Custom(MlpPolicy):
    """A policy of its own making."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor):
        return super()._get_action_dist_from_latent(latent_pi * 2)


class Extractor(MlpPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(nn.LayerNorm(self.mlp_extractor.latent_dim_pi))


@pytest.mark.parametrize(
    "policy",
    [
        lambda: make_policy(ACTIONS["box"], use_sde=True, squash_output=True),
        lambda: make_policy(ACTIONS["box"], Custom),
        lambda: make_policy(ACTIONS["box"], Extractor),
        lambda: make_policy(ACTIONS["box"], activation_fn=nn.ELU),
    ],
    ids=["squashed gSDE", "custom distribution", "custom extractor", "other activation"],
)
def test_everything_else_takes_the_general_path(policy: Callable[[], ActorCriticPolicy]):
    assert type(make_actor(policy(), np.random.default_rng(0))) is Actor


def test_hooks_take_the_general_path():
    policy = make_policy(ACTIONS["box"])
    policy.action_net.register_forward_hook(lambda module, args, output: output + 1)
    assert type(make_actor(policy, np.random.default_rng(0))) is Actor


@pytest.mark.parametrize("actor", [Actor, MlpActor])
@pytest.mark.parametrize("space", ACTIONS)
def test_frequencies_are_those_of_the_policy(space: str, actor: type[Actor]):
    """Chi-squared (discrete) and Kolmogorov-Smirnov (continuous) tests with a fixed seed, p above 0.001."""
    policy = make_policy(ACTIONS[space])
    obs = np.repeat(observations(1), 4000, axis=0)
    actions = actor(policy, np.random.default_rng(0))(obs)[0].reshape(4000, -1)
    distribution = policy.get_distribution(th.as_tensor(obs[:1])).distribution
    for column in range(actions.shape[1]):
        values = actions[:, column]
        if space == "box":
            mean, std = distribution.mean[0, column].item(), distribution.stddev[0, column].item()
            assert stats.kstest(values, stats.norm(mean, std).cdf).pvalue > 1e-3
        else:
            if space == "multi-binary":
                p = distribution.probs[0, column].item()
                probs = [1 - p, p]
            else:
                part = distribution if space == "discrete" else distribution[column]
                probs = part.probs[0].tolist()
            counts = np.bincount(values, minlength=len(probs))
            assert stats.chisquare(counts, 4000 * np.array(probs) / sum(probs)).pvalue > 1e-3


def test_formulas():
    mean, std, noise = np.array([[1.0, 2.0]]), np.array([0.5, 3.0]), np.array([[2.0, -1.0]])
    np.testing.assert_array_equal(gaussian_actions(mean, std, noise), [[2, -1]])
    np.testing.assert_array_equal(categorical_actions(np.array([[0.0, 1], [0, 1]]), np.array([[2.0, 0], [0, 0]])), [0, 1])
    logits = np.array([[0.0, 1, 5, 4, 3]])
    np.testing.assert_array_equal(multi_categorical_actions(logits, np.zeros((1, 5)), [2, 3]), [[1, 0]])
    np.testing.assert_array_equal(bernoulli_actions(np.array([[1.0, 1.0]]), np.array([[-0.9, -1.1]])), [[1, 0]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_all_finite(value: float, dtype: type):
    for position in range(6):
        values = np.ones((2, 3), dtype=dtype)
        assert all_finite(values)
        values[np.unravel_index(position, (2, 3))] = value
        assert not all_finite(values)
        assert not all_finite(values.T)


@pytest.mark.filterwarnings("error")
def test_all_finite_of_values_whose_squares_overflow_and_of_other_types():
    for dtype in (np.float16, np.float32, np.float64):
        assert all_finite(np.full(10, np.finfo(dtype).max))
        assert not all_finite(np.array([np.finfo(dtype).max, np.nan]))
    for values in (np.zeros(3, dtype=np.uint8), np.zeros((0, 2)), np.array(["a"]), np.array([True])):
        assert all_finite(values)


@pytest.mark.parametrize("actor", [Actor, MlpActor])
@pytest.mark.parametrize("space", ACTIONS)
def test_output_that_is_not_finite_is_refused(space: str, actor: type[Actor]):
    policy = make_policy(ACTIONS[space])
    policy.action_net.weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"(?s)policy's output is not finite.*nan"):
        actor(policy, np.random.default_rng(0))(observations())


def test_gsde_output_that_is_not_finite_is_refused():
    policy = make_policy(ACTIONS["box"], use_sde=True)
    policy.action_net.weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"(?s)policy's output is not finite.*nan"):
        make_actor(policy, np.random.default_rng(0))(observations(1))


def test_the_environment_gets_clipped_actions():
    low, high = np.array([-0.1, -np.inf], dtype=np.float32), np.array([0.1, 0.2], dtype=np.float32)
    sampled, clipped, _ = make_actor(make_policy(spaces.Box(low, high)), np.random.default_rng(0))(observations(50))
    np.testing.assert_array_equal(clipped, np.clip(sampled, low, high))
    assert np.any(sampled != clipped)


def test_the_environment_gets_unscaled_actions_when_they_are_squashed():
    policy = make_policy(spaces.Box(0, 10, (2,)), use_sde=True, squash_output=True)
    policy.reset_noise(5)
    sampled, unscaled, _ = make_actor(policy, np.random.default_rng(0))(observations())
    np.testing.assert_allclose(unscaled, 5 * (sampled + 1), rtol=1e-5)


def test_discrete_actions_are_passed_on():
    sampled, passed, _ = make_actor(make_policy(ACTIONS["discrete"]), np.random.default_rng(0))(observations())
    assert passed is sampled


def test_torch_is_seeded_for_a_while_only():
    before = th.get_rng_state()
    device = th.device("cpu")
    draws = []
    for seed in (0, 0, 1):
        with torch_seeded_from(np.random.default_rng(seed), device):
            draws.append(th.randn(3))
    assert th.equal(draws[0], draws[1])
    assert not th.equal(draws[0], draws[2])
    assert th.equal(th.get_rng_state(), before)


def test_exploration_matrices_follow_the_generator():
    policy = make_policy(ACTIONS["box"], use_sde=True)
    matrices = []
    for seed in (0, 0, 1):
        reset_noise(policy, 3, np.random.default_rng(seed))
        matrices.append(policy.action_dist.exploration_matrices)
    assert matrices[0].shape[0] == 3
    assert th.equal(matrices[0], matrices[1])
    assert not th.equal(matrices[0], matrices[2])


@pytest.mark.parametrize("use_sde", [False, True])
def test_training_is_the_same_on_both_paths(use_sde: bool, monkeypatch: pytest.MonkeyPatch):
    from sb3_reinforce import REINFORCE

    def weights() -> np.ndarray:
        model = REINFORCE(
            "MlpPolicy",
            gym.make("Pendulum-v1"),
            n_steps=400,
            seed=0,
            normalize_observations=True,
            use_sde=use_sde,
            sde_sample_freq=8,
        )
        model.learn(1600)
        return th.cat([parameter.flatten() for parameter in model.policy.parameters()]).detach().numpy()

    fast = weights()
    monkeypatch.setattr(MlpActor, "can_act_for", lambda policy: False)
    np.testing.assert_allclose(weights(), fast, atol=1e-4)


def test_a_large_action_space_does_not_draw_noise_for_hundreds_of_steps():
    policy = make_policy(spaces.Discrete(20_000))
    act = make_actor(policy, np.random.default_rng(0))
    tracemalloc.start()
    act(observations(16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


class OwnFeatures(MlpPolicy):
    """Extracts features in its own way, which SB3's forward() and evaluate_actions() follow."""

    def extract_features(self, obs: th.Tensor, features_extractor: nn.Module | None = None) -> th.Tensor:
        return super().extract_features(obs, features_extractor) + 5


def test_a_policy_with_its_own_way_to_extract_features_acts_as_it_learns():
    policy = make_policy(ACTIONS["box"], OwnFeatures)
    obs = observations(3000)
    actions, _, values = make_actor(policy, np.random.default_rng(0))(obs)
    with th.no_grad():
        features = policy.extract_features(th.as_tensor(obs))
        mean = policy.action_net(policy.mlp_extractor.forward_actor(features)).numpy()
        expected, _, _ = policy.evaluate_actions(th.as_tensor(obs), th.as_tensor(actions).reshape(len(obs), -1))
    noise = (actions.reshape(len(obs), -1) - mean) / policy.log_std.exp().detach().numpy()
    assert np.abs(noise.mean(axis=0)).max() < 0.1
    np.testing.assert_allclose(values, expected.numpy().flatten())


@pytest.mark.parametrize("actor", [Actor, MlpActor])
def test_a_standard_deviation_that_is_not_finite_is_refused(actor: type[Actor]):
    policy = make_policy(ACTIONS["box"])
    policy.log_std.data[0] = np.nan
    with pytest.raises(ValueError, match=r"(?s)policy's output is not finite"):
        actor(policy, np.random.default_rng(0))(observations())


def test_layers_without_bias_take_the_general_path():
    policy = make_policy(ACTIONS["box"])
    policy.action_net = nn.Linear(policy.mlp_extractor.latent_dim_pi, 4, bias=False)
    assert type(make_actor(policy, np.random.default_rng(0))) is Actor
