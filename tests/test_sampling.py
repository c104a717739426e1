"""Acting: both ways to sample agree with each other and with the distributions of the policy."""

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from scipy import stats
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_reinforce import MlpPolicy
from sb3_reinforce.sampling import (
    Actor,
    MlpActor,
    actions_for_env,
    bernoulli_actions,
    categorical_actions,
    gaussian_actions,
    make_actor,
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
    "normalised": dict(normalize_observations=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("space", ACTIONS)
def test_the_fast_actor_chooses_the_actions_of_the_general_one(space: str, variant: str):
    policy = make_policy(ACTIONS[space], **VARIANTS[variant])
    if variant == "normalised":
        policy.observation_normalizer.update(observations(50))
    fast = make_actor(policy)
    assert type(fast) is MlpActor
    for seed in range(20):
        obs = observations(seed + 1)
        by_numpy = fast(obs, np.random.default_rng(seed))
        by_torch = Actor(policy)(obs, np.random.default_rng(seed))
        assert by_numpy.shape == by_torch.shape == (len(obs), *ACTIONS[space].shape)
        np.testing.assert_allclose(by_numpy, by_torch, rtol=1e-5, atol=1e-5)


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
        lambda: make_policy(ACTIONS["box"], use_sde=True),
        lambda: make_policy(ACTIONS["box"], Custom),
        lambda: make_policy(ACTIONS["box"], Extractor),
        lambda: make_policy(ACTIONS["box"], activation_fn=nn.ELU),
    ],
    ids=["gSDE", "custom distribution", "custom extractor", "other activation"],
)
def test_everything_else_takes_the_general_path(policy: Callable[[], ActorCriticPolicy]):
    assert type(make_actor(policy())) is Actor


def test_hooks_take_the_general_path():
    policy = make_policy(ACTIONS["box"])
    policy.action_net.register_forward_hook(lambda module, args, output: output + 1)
    assert type(make_actor(policy)) is Actor


@pytest.mark.parametrize("actor", [Actor, MlpActor])
@pytest.mark.parametrize("space", ACTIONS)
def test_frequencies_are_those_of_the_policy(space: str, actor: type[Actor]):
    """Chi-squared (discrete) and Kolmogorov-Smirnov (continuous) tests with a fixed seed, p above 0.001."""
    policy = make_policy(ACTIONS[space])
    obs = np.repeat(observations(1), 4000, axis=0)
    actions = actor(policy)(obs, np.random.default_rng(0)).reshape(4000, -1)
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


def test_rows_and_dimensions_are_independent():
    rng = np.random.default_rng(0)
    noise = gaussian_actions(np.zeros((2000, 3), dtype=np.float32), np.ones(3, dtype=np.float32), rng)
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(3), atol=0.08)
    assert noise.dtype == np.float32
    bits = bernoulli_actions(np.zeros((2000, 3)), rng)
    np.testing.assert_allclose(np.corrcoef(bits.T), np.eye(3), atol=0.08)
    assert set(np.unique(bits)) == {0, 1}
    choices = categorical_actions(np.array([[0.0, -np.inf]] * 100), rng)
    assert not choices.any()


@pytest.mark.parametrize("actor", [Actor, MlpActor])
@pytest.mark.parametrize("space", ACTIONS)
def test_output_that_is_not_finite_is_refused(space: str, actor: type[Actor]):
    policy = make_policy(ACTIONS[space])
    policy.action_net.weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"(?s)policy's output is not finite.*nan"):
        actor(policy)(observations(), np.random.default_rng(0))


def test_gsde_output_that_is_not_finite_is_refused():
    policy = make_policy(ACTIONS["box"], use_sde=True)
    policy.action_net.weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"(?s)policy's output is not finite.*nan"):
        make_actor(policy)(observations(1), np.random.default_rng(0))


def test_actions_for_env_are_clipped():
    low, high = np.array([-1, -np.inf], dtype=np.float32), np.array([0.5, 2], dtype=np.float32)
    policy = make_policy(spaces.Box(low, high))
    np.testing.assert_array_equal(actions_for_env(policy, np.array([[-3.0, -9.0], [1.0, 5.0]])), [[-1, -9], [0.5, 2]])


def test_actions_for_env_are_unscaled_when_squashed():
    policy = make_policy(spaces.Box(0, 10, (2,)), use_sde=True, squash_output=True)
    np.testing.assert_allclose(actions_for_env(policy, np.array([[-1.0, 0.5]])), [[0, 7.5]])


def test_discrete_actions_are_passed_on():
    actions = np.array([3, 0])
    assert actions_for_env(make_policy(ACTIONS["discrete"]), actions) is actions


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


def test_training_is_the_same_on_both_paths(monkeypatch: pytest.MonkeyPatch):
    from sb3_reinforce import REINFORCE

    def weights() -> np.ndarray:
        model = REINFORCE("MlpPolicy", gym.make("Pendulum-v1"), n_steps=400, seed=0, normalize_observations=True)
        model.learn(1600)
        return th.cat([parameter.flatten() for parameter in model.policy.parameters()]).detach().numpy()

    fast = weights()
    monkeypatch.setattr(MlpActor, "can_act_for", lambda policy: False)
    np.testing.assert_allclose(weights(), fast, atol=1e-4)
