"""Acting: both actors agree with each other and with the distributions of the policy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_reinforce import CnnPolicy, MlpPolicy
from sb3_reinforce.episodes.acting import (
    Actor,
    EpisodeNoise,
    MlpActor,
    make_actor,
    overrides,
    sample_discrete,
)
from sb3_reinforce.episodes.schedule import episode_rng

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3, 2))
ACTIONS: dict[str, spaces.Space] = {
    "box": spaces.Box(-1, 1, (2, 2)),
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([3, 2, 4]),
    "multi-binary": spaces.MultiBinary(3),
}
both_actors = pytest.mark.parametrize("actor", [Actor, MlpActor])


def make_policy(
    action_space: spaces.Space,
    cls: type[ActorCriticPolicy] = MlpPolicy,
    observation_space: spaces.Space = OBSERVATIONS,
    **kwargs: Any,
) -> Any:
    """Make a policy in evaluation mode with random weights."""
    th.manual_seed(0)
    defaults = dict(normalize_observations=True) if issubclass(cls, MlpPolicy) else {}
    policy = cls(observation_space, action_space, lambda _: 1e-3, **(defaults | kwargs))
    for parameter in policy.parameters():
        parameter.data += 0.3 * th.randn_like(parameter)
    policy.set_training_mode(False)
    return policy


def make_noise(n_envs: int, seed: int = 0, sde_sample_freq: int = -1) -> EpisodeNoise:
    """Noise of the first episodes."""
    noise = EpisodeNoise(n_envs, seed, sde_sample_freq)
    noise.begin(range(n_envs), np.arange(n_envs))
    return noise


def observations(n_envs: int = 5) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(n_envs, *OBSERVATIONS.shape)).astype(np.float32) * 3 + 1


# Two actors ------------------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "relu": dict(activation_fn=nn.ReLU),
    "tanh": dict(activation_fn=nn.Tanh),
    "no hidden layer": dict(net_arch=[]),
    "not normalized": dict(normalize_observations=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("space", [*ACTIONS, "gsde"])
def test_both_actors_sample_the_same_actions(space: str, variant: str):
    """Also of large numbers, which are normalized before they are rounded to float32."""
    kwargs: dict[str, Any] = dict(use_sde=True, log_std_init=-1) if space == "gsde" else {}
    action_space = ACTIONS["box" if space == "gsde" else space]
    for n_envs, dtype, offset in ((1, np.float32, 0), (2, np.float64, 1e12), (7, np.int64, 10**9), (5, np.float16, 9)):
        policy = make_policy(action_space, **VARIANTS[variant], **kwargs)
        if variant != "not normalized":
            policy.observation_normalizer.update((observations(50) + offset).astype(dtype))
        fast, general = make_actor(policy, make_noise(n_envs, 0, 2)), Actor(policy, make_noise(n_envs, 0, 2))
        assert type(fast) is MlpActor
        for _ in range(3):
            obs = (observations(n_envs) + offset).astype(dtype)
            by_numpy, by_torch = fast(obs), general(obs)
            np.testing.assert_array_equal(obs, (observations(n_envs) + offset).astype(dtype))
            for one, other in zip(by_numpy, by_torch, strict=True):
                assert one.shape == other.shape == (n_envs, *(action_space.shape or ()))
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net_arch", [[], [5]])
@pytest.mark.parametrize("kind", ["discrete", "multi-discrete", "bits"])
def test_both_actors_sample_the_same_actions_without_observed_numbers(kind: str, net_arch: list[int]):
    space = ACTIONS.get(kind, spaces.MultiBinary([2, 3]))
    policy = make_policy(ACTIONS["box"], observation_space=space, net_arch=net_arch)
    for n_envs in (1, 7):
        obs = np.array([space.sample() for _ in range(n_envs)])
        fast, general = make_actor(policy, make_noise(n_envs)), Actor(policy, make_noise(n_envs))
        assert type(fast) is MlpActor
        np.testing.assert_allclose(fast(obs)[0], general(obs)[0], rtol=1e-4, atol=1e-5)


class Custom(MlpPolicy):
    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        return super()._get_action_dist_from_latent(latent_pi * 2)


class Compiled:
    """Stands in for a policy that was compiled by PyTorch."""

    def __init__(self, policy: Any):
        self._orig_mod = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._orig_mod, name)


def changed(change: Callable[[Any], Any]) -> Any:
    policy = make_policy(ACTIONS["box"])
    change(policy)
    return policy


IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
OTHERS: dict[str, Callable[[], Any]] = {
    "squashed gSDE": lambda: make_policy(ACTIONS["box"], use_sde=True, squash_output=True),
    "custom distribution": lambda: make_policy(ACTIONS["box"], Custom),
    "compiled": lambda: Compiled(make_policy(ACTIONS["box"], Custom)),
    "other activation": lambda: make_policy(ACTIONS["box"], activation_fn=nn.ELU),
    "discrete, gSDE": lambda: make_policy(ACTIONS["box"], observation_space=spaces.Discrete(3), use_sde=True),
    "images": lambda: make_policy(ACTIONS["box"], CnnPolicy, IMAGE),
    "hook": lambda: changed(lambda policy: policy.action_net.register_forward_hook(lambda module, args, output: output + 1)),
    "no bias": lambda: changed(lambda policy: setattr(policy, "action_net", nn.Linear(64, 4, bias=False))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_other_policies_act_with_pytorch(name: str):
    policy = OTHERS[name]()
    assert type(make_actor(policy, make_noise(1))) is Actor
    assert overrides(policy, "forward", "_get_action_dist_from_latent") == (name in ("custom distribution", "compiled"))


class OwnForward(MlpPolicy):
    def forward(self, obs: th.Tensor, deterministic: bool = False) -> Any:
        values = th.zeros(len(obs), 1)
        return th.rand(len(obs), 2, 2), values, values[:, 0]


class Uniform(DiagGaussianDistribution):
    def sample(self) -> th.Tensor:
        return th.rand_like(self.distribution.mean)


def with_uniform() -> Any:
    policy = make_policy(ACTIONS["box"])
    policy.action_dist = Uniform(4)
    return policy


@pytest.mark.parametrize(
    "make", [lambda: make_policy(ACTIONS["box"], OwnForward), with_uniform], ids=["forward", "distribution"]
)
def test_samples_of_the_user_are_drawn_from_pytorch_seeded_by_the_episode(make: Callable[[], Any]):
    policy, obs = make(), observations(2)
    state = th.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        act = Actor(policy, make_noise(2, seed))
        runs.append([act(obs)[0] for _ in range(2)])
    assert th.equal(th.get_rng_state(), state)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    assert not np.array_equal(*runs[0])


# Noise -----------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.data())
def test_noise_depends_on_seed_number_and_step_of_the_episode(seed: int, n_envs: int, data: st.DataObject):
    noise = EpisodeNoise(n_envs, seed)
    numbers, ages = np.zeros((2, n_envs), dtype=int)
    noise.begin(range(n_envs), numbers)
    expected = {0: episode_rng(seed, 0).standard_normal((120, 3), dtype=np.float32)}
    for _ in range(data.draw(st.integers(1, 3))):
        for _ in range(data.draw(st.integers(1, 35))):
            rows = noise.draw(DiagGaussianDistribution, 3)
            np.testing.assert_array_equal(rows, [expected[numbers[i]][ages[i]] for i in range(n_envs)])
            ages += 1
        started = data.draw(st.sets(st.integers(0, n_envs - 1)))
        for env_idx in started:
            numbers[env_idx] = data.draw(st.integers(0, 10))
            ages[env_idx] = 0
            rng = episode_rng(seed, int(numbers[env_idx]))
            expected[numbers[env_idx]] = rng.standard_normal((120, 3), dtype=np.float32)
        noise.begin(started, numbers)


@given(st.integers(0, 100), st.sampled_from([-1, 1, 3]), st.lists(st.sampled_from(["step", 0, 1]), max_size=12))
def test_gsde_matrices_are_scaled_normal_numbers_of_the_episode(seed: int, sde_sample_freq: int, events: list):
    noise = EpisodeNoise(2, seed, sde_sample_freq)
    distribution, log_std = StateDependentNoiseDistribution(2), th.tensor([[0.0, 0.5]] * 3)
    std = distribution.get_std(log_std).numpy()
    numbers, ages = np.array([0, 1]), [0, 0]
    noise.begin([0, 1], numbers)
    for event in [*events, "step"]:
        if event != "step":
            numbers[event], ages[event] = numbers.max() + 1, 0
            noise.begin([event], numbers)
            continue
        expected = []
        for env_idx in range(2):
            n_draws = 1 if sde_sample_freq == -1 else 1 + ages[env_idx] // sde_sample_freq
            rng = episode_rng(seed, int(numbers[env_idx]))
            expected.append([std * rng.standard_normal((3, 2), dtype=np.float32) for _ in range(n_draws)][-1])
            ages[env_idx] += 1
        np.testing.assert_array_equal(noise.draw_matrices(distribution, log_std), expected)
        # That of predict()
        np.testing.assert_array_equal(distribution.exploration_mat, expected[0])


@pytest.mark.parametrize("distribution", [CategoricalDistribution, MultiCategoricalDistribution, BernoulliDistribution])
def test_noise_of_discrete_actions_has_double_precision(distribution: type[Distribution]):
    """Gumbel noise of float32 is at most 16, which would change the frequency of rare actions."""
    assert make_noise(1).draw(distribution, 3).dtype == np.float64


@both_actors
@pytest.mark.parametrize("space", ACTIONS)
def test_frequencies_of_actions_follow_the_policy(space: str, actor: type[Actor]):
    """Chi-squared (discrete) and Kolmogorov-Smirnov (continuous) tests with a fixed seed, p above 0.001."""
    policy, obs = make_policy(ACTIONS[space]), np.repeat(observations(1), 2000, axis=0)
    actions = actor(policy, make_noise(2000))(obs)[0].reshape(2000, -1)
    distribution: Any = policy.get_distribution(th.as_tensor(obs[:1]))
    if space == "box":
        mean, std = (values.detach().numpy() for values in (distribution.distribution.mean, distribution.distribution.stddev))
        assert stats.kstest((actions - mean) / std, "norm").pvalue.min() > 1e-3
        return
    rows, counts = np.unique(actions, axis=0, return_counts=True)
    values = rows[:, 0] if space == "discrete" else rows
    expected = 2000 * np.exp([distribution.log_prob(th.as_tensor(value)[None].float()).item() for value in values])
    common = expected > 5
    chi_squared = np.sum((counts[common] - expected[common]) ** 2 / expected[common])
    assert stats.chi2(common.sum()).sf(chi_squared) > 1e-3


# Formulas --------------------------------------------------------------------------------------------------------------------

numbers = st.floats(-50, 50, width=32)


@given(st.data(), st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_discrete_actions_have_the_largest_sum_of_logit_and_noise(data: st.DataObject, n_envs: int, dims: list[int]):
    logits, noise = (data.draw(arrays(np.float64, (n_envs, sum(dims)), elements=numbers)) for _ in range(2))
    expected = []
    for env_idx in range(n_envs):
        row, start = [], 0
        for dim in dims:
            sums = [logits[env_idx, start + action] + noise[env_idx, start + action] for action in range(dim)]
            row.append(max(range(dim), key=lambda action: sums[action]))
            start += dim
        expected.append(row)
    np.testing.assert_array_equal(sample_discrete(MultiCategoricalDistribution(dims), logits, noise), expected)
    found = sample_discrete(CategoricalDistribution(dims[0]), logits[:, : dims[0]], noise[:, : dims[0]])
    np.testing.assert_array_equal(found, np.array(expected)[:, 0])
    bits = [[int(logit + n > 0) for logit, n in zip(*rows, strict=True)] for rows in zip(logits, noise, strict=True)]
    np.testing.assert_array_equal(sample_discrete(BernoulliDistribution(sum(dims)), logits, noise), bits)


@both_actors
def test_the_environment_gets_clipped_or_unscaled_actions(actor: type[Actor]):
    low, high = np.array([-0.1, -np.inf], dtype=np.float32), np.array([0.1, 0.2], dtype=np.float32)
    sampled, clipped = actor(make_policy(spaces.Box(low, high)), make_noise(50))(observations(50))
    np.testing.assert_array_equal(clipped, np.clip(sampled, low, high))
    assert np.any(sampled != clipped)
    sampled, passed = actor(make_policy(ACTIONS["discrete"]), make_noise(5))(observations())
    np.testing.assert_array_equal(passed, sampled)
    assert not np.shares_memory(passed, sampled)
    squashed = make_policy(spaces.Box(0, 10, (2,)), use_sde=True, squash_output=True)
    sampled, unscaled = make_actor(squashed, make_noise(5))(observations())
    assert np.abs(sampled).max() <= 1
    np.testing.assert_allclose(unscaled, 5 * (sampled + 1), rtol=1e-5)
