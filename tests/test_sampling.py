"""Acting: both ways to sample agree with each other and with the distributions of the policy."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import gymnasium as gym
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
)
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_reinforce import REINFORCE, MlpPolicy, sampling
from sb3_reinforce.episodes.acting import (
    Actor,
    EpisodeNoise,
    MlpActor,
    all_finite,
    bernoulli_actions,
    categorical_actions,
    make_actor,
    multi_categorical_actions,
    state_dependent_noise,
    torch_seeded_from,
    watch_modules,
)
from sb3_reinforce.episodes.schedule import episode_rng, update_rng

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3, 2))
ACTIONS: dict[str, spaces.Space] = {
    "box": spaces.Box(-1, 1, (2, 2)),
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([3, 2, 4]),
    "multi-binary": spaces.MultiBinary(3),
}


def make_policy(
    action_space: spaces.Space,
    cls: type[ActorCriticPolicy] = MlpPolicy,
    observation_space: spaces.Space = OBSERVATIONS,
    **kwargs: Any,
) -> Any:
    th.manual_seed(0)
    policy = cls(observation_space, action_space, lambda _: 1e-3, **kwargs)
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


# Two ways to sample ----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tanh": dict(activation_fn=nn.Tanh),
    "no hidden layer": dict(net_arch=[]),
    "not normalized": dict(normalize_observations=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("space", [*ACTIONS, "gsde"])
def test_the_fast_actor_samples_the_actions_of_the_general_one(space: str, variant: str):
    kwargs: dict[str, Any] = dict(use_sde=True, log_std_init=-1) if space == "gsde" else {}
    action_space = ACTIONS["box" if space == "gsde" else space]
    policy = make_policy(action_space, **VARIANTS[variant], **kwargs)
    if policy.normalize_observations:
        policy.observation_normalizer.update(observations(50))
    for n_envs in (1, 2, 3, 7, 19):
        fast, general = make_actor(policy, make_noise(n_envs, sde_sample_freq=2)), Actor(policy, make_noise(n_envs, 0, 2))
        assert type(fast) is MlpActor
        for _ in range(5):
            obs = observations(n_envs)
            before = obs.copy()
            by_numpy, by_torch = fast(obs), general(obs)
            np.testing.assert_array_equal(obs, before)
            for one, other in zip(by_numpy, by_torch, strict=True):
                assert one.shape == other.shape == (n_envs, *(action_space.shape or ()))
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", ["box", "discrete", "gsde"])
def test_learning_is_the_same_on_both_paths(space: str, monkeypatch: pytest.MonkeyPatch):
    def weights() -> np.ndarray:
        kwargs: dict[str, Any] = dict(use_sde=True, sde_sample_freq=8) if space == "gsde" else {}
        env = gym.make("CartPole-v1" if space == "discrete" else "Pendulum-v1", max_episode_steps=50)
        return REINFORCE("MlpPolicy", env, n_steps=150, seed=0, **kwargs).learn(600).policy.parameters_to_vector()

    fast = weights()
    monkeypatch.setattr(MlpActor, "can_act_for", lambda policy: False)
    np.testing.assert_allclose(weights(), fast, atol=1e-4)


class Custom(MlpPolicy):
    """A policy of its own making."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        return super()._get_action_dist_from_latent(latent_pi * 2)


class Normed(MlpPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(nn.LayerNorm(self.mlp_extractor.latent_dim_pi))


def hooked() -> Any:
    policy = make_policy(ACTIONS["box"])
    policy.action_net.register_forward_hook(lambda module, args, output: output + 1)
    return policy


def without_bias() -> Any:
    policy = make_policy(ACTIONS["box"])
    policy.action_net = nn.Linear(policy.mlp_extractor.latent_dim_pi, 4, bias=False)
    return policy


@pytest.mark.parametrize(
    "policy",
    [
        lambda: make_policy(ACTIONS["box"], use_sde=True, squash_output=True),
        lambda: make_policy(ACTIONS["box"], Custom),
        lambda: make_policy(ACTIONS["box"], Normed),
        lambda: make_policy(ACTIONS["box"], activation_fn=nn.ELU),
        lambda: make_policy(ACTIONS["box"], observation_space=spaces.Discrete(3)),
        hooked,
        without_bias,
    ],
    ids=[
        "squashed gSDE",
        "custom distribution",
        "custom extractor",
        "other activation",
        "discrete observations",
        "forward hook",
        "no bias",
    ],
)
def test_everything_else_takes_the_general_path(policy: Callable[[], Any]):
    assert type(make_actor(policy(), make_noise(1))) is Actor


# Noise -----------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.data())
def test_noise_is_that_of_the_generator_of_the_episode(seed: int, n_envs: int, data: st.DataObject):
    """Whatever episodes the other environments are in, and when they began."""
    noise = EpisodeNoise(n_envs, seed)
    numbers = np.zeros(n_envs, dtype=int)
    ages = np.zeros(n_envs, dtype=int)
    noise.begin(range(n_envs), numbers)
    expected = {0: episode_rng(seed, 0).standard_normal((200, 3), dtype=np.float32)}
    for _ in range(data.draw(st.integers(1, 5))):
        for _ in range(data.draw(st.integers(1, 35))):
            rows = noise.draw(DiagGaussianDistribution, 3)
            np.testing.assert_array_equal(rows, [expected[numbers[i]][ages[i]] for i in range(n_envs)])
            ages += 1
        beginning = data.draw(st.sets(st.integers(0, n_envs - 1)))
        for index in beginning:
            numbers[index] = data.draw(st.integers(0, 10))
            ages[index] = 0
            rng = episode_rng(seed, int(numbers[index]))
            expected[numbers[index]] = rng.standard_normal((200, 3), dtype=np.float32)
        noise.begin(beginning, numbers)


@given(st.integers(0, 100), st.sampled_from([-1, 1, 3]), st.lists(st.sampled_from(["step", 0, 1]), max_size=12))
def test_matrices_are_scaled_normal_numbers_of_the_episode(seed: int, sde_sample_freq: int, events: list):
    noise = EpisodeNoise(2, seed, sde_sample_freq)
    std = np.array([[1.0], [2.0], [3.0]], dtype=np.float32) * np.ones((1, 2), dtype=np.float32)
    numbers, ages = np.array([0, 1]), [0, 0]
    noise.begin([0, 1], numbers)
    for event in [*events, "step"]:
        if event != "step":
            numbers[event], ages[event] = numbers.max() + 1, 0
            noise.begin([event], numbers)
            continue
        expected = []
        for index in range(2):
            n_draws = 1 if sde_sample_freq == -1 else 1 + ages[index] // sde_sample_freq
            rng = episode_rng(seed, int(numbers[index]))
            expected.append([std * rng.standard_normal((3, 2), dtype=np.float32) for _ in range(n_draws)][-1])
            ages[index] += 1
        np.testing.assert_array_equal(noise.draw_matrices(lambda: std), expected)


def test_generators_of_episodes_and_seeds_differ():
    draws = [episode_rng(seed, number).random() for seed in range(30) for number in range(100)]
    assert len(set(draws)) == len(draws)
    assert episode_rng(3, 5).random() == episode_rng(3, 5).random()


def test_updates_have_generators_of_their_own():
    """From seed and number alone, and none of them is that of an episode."""
    pairs = [(seed, number) for seed in range(30) for number in range(100)]
    draws = [rng(*pair).random() for pair in pairs for rng in (update_rng, episode_rng)]
    assert len(set(draws)) == len(draws)
    assert update_rng(3, 5).random() == update_rng(3, 5).random()


@pytest.mark.parametrize("actor", [Actor, MlpActor])
@pytest.mark.parametrize("space", ACTIONS)
def test_noise_is_never_used_twice(space: str, actor: type[Actor], monkeypatch: pytest.MonkeyPatch):
    """Also where one block of noise ends and the next begins."""
    monkeypatch.setattr(sampling, "_STEPS_OF_NOISE", 3)
    act = actor(make_policy(ACTIONS[space]), make_noise(500))
    obs = np.repeat(observations(1), 500, axis=0)
    steps = [act(obs)[0].reshape(500, -1) for _ in range(8)]
    correlations = np.corrcoef([(step - step.mean(axis=0)).flatten() for step in steps])
    # Five times what independent noise shows
    assert np.abs(correlations - np.eye(8)).max() < 5 / np.sqrt(500)


@pytest.mark.parametrize("actor", [Actor, MlpActor])
@pytest.mark.parametrize("space", ACTIONS)
def test_frequencies_are_those_of_the_policy(space: str, actor: type[Actor]):
    """Chi-squared (discrete) and Kolmogorov-Smirnov (continuous) tests with a fixed seed, p above 0.001."""
    policy = make_policy(ACTIONS[space])
    obs = np.repeat(observations(1), 4000, axis=0)
    actions = actor(policy, make_noise(4000))(obs)[0].reshape(4000, -1)
    distribution: Any = policy.get_distribution(th.as_tensor(obs[:1])).distribution
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


def test_a_large_action_space_does_not_draw_noise_for_hundreds_of_steps():
    act = make_actor(make_policy(spaces.Discrete(20_000)), make_noise(1))
    tracemalloc.start()
    act(observations(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 64 steps of float64
    assert peak < 64 * 20_000 * 8


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


# Formulas --------------------------------------------------------------------------------------------------------------------

numbers = st.floats(-50, 50, width=32)


@given(st.data(), st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_discrete_actions_have_the_largest_sum_of_logit_and_noise(data: st.DataObject, n_envs: int, dims: list[int]):
    logits, noise = (data.draw(arrays(np.float64, (n_envs, sum(dims)), elements=numbers)) for _ in range(2))
    expected = []
    for env in range(n_envs):
        row, start = [], 0
        for dim in dims:
            sums = [logits[env, start + action] + noise[env, start + action] for action in range(dim)]
            row.append(max(range(dim), key=lambda action: sums[action]))
            start += dim
        expected.append(row)
    found = multi_categorical_actions(logits, noise, dims)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(categorical_actions(logits[:, : dims[0]], noise[:, : dims[0]]), found[:, 0])
    bits = [[int(logit + n > 0) for logit, n in zip(*rows, strict=True)] for rows in zip(logits, noise, strict=True)]
    np.testing.assert_array_equal(bernoulli_actions(logits, noise), bits)


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_state_dependent_noise_is_linear_in_the_features(data: st.DataObject, n_envs: int, n_features: int, n_actions: int):
    latent = data.draw(arrays(np.float64, (n_envs, n_features), elements=numbers))
    matrices = data.draw(arrays(np.float64, (n_envs, n_features, n_actions), elements=numbers))
    expected = np.zeros((n_envs, n_actions))
    for env, feature, action in np.ndindex(matrices.shape):
        expected[env, action] += latent[env, feature] * matrices[env, feature, action]
    np.testing.assert_allclose(state_dependent_noise(latent, matrices), expected, atol=1e-9)


@given(st.lists(st.floats(width=32), max_size=8), st.sampled_from([np.float16, np.float32, np.float64]))
@pytest.mark.filterwarnings("error")
def test_all_finite_is_what_a_look_at_every_value_says(values: list[float], dtype: type):
    with np.errstate(over="ignore"):
        array = np.array(values).astype(dtype)
    expected = all(np.isfinite(value) for value in array.tolist())
    assert all_finite(array) == expected
    assert all_finite(np.stack([array, array]).T) == expected


@pytest.mark.filterwarnings("error")
def test_all_finite_of_values_whose_squares_overflow_and_of_other_types():
    for dtype in (np.float16, np.float32, np.float64):
        assert all_finite(np.full(10, np.finfo(dtype).max))
        assert not all_finite(np.array([np.finfo(dtype).max, np.nan]))
    for values in (np.zeros(3, dtype=np.uint8), np.zeros((0, 2)), np.array(["a"]), np.array([True])):
        assert all_finite(values)


# Observations of other types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actor", [Actor, MlpActor])
@pytest.mark.parametrize(
    ("dtype", "offset", "scale"),
    [
        (np.float64, 1.7e9, 5.0),
        (np.float64, -1e12, 0.1),
        (np.float32, 100.0, 3.0),
        (np.float16, 10.0, 3.0),
        (np.int64, 10**12, 40.0),
        (np.int16, -300, 40.0),
        (np.uint8, 100, 20.0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_observations_are_normalized_in_their_own_precision_before_they_are_rounded(
    actor: type[Actor], dtype: type, offset: float, scale: float
):
    """As the network without normalization acts on observations that NumPy has normalized in float64."""
    is_integer = np.issubdtype(dtype, np.integer)
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if is_integer else (-np.inf, np.inf)
    space = spaces.Box(low, high, (4,), dtype)  # type: ignore[arg-type]
    kwargs: dict[str, Any] = dict(observation_space=space, log_std_init=-30.0)
    policy, plain = (make_policy(spaces.Box(-100, 100, (2,)), normalize_observations=flag, **kwargs) for flag in (True, False))
    plain.load_state_dict(policy.state_dict(), strict=False)
    for either in (policy, plain):
        either.log_std.data.fill_(-30.0)
    seen = (offset + scale * np.random.default_rng(0).normal(size=(200, 4))).astype(dtype)
    policy.observation_normalizer.update(seen)
    obs = seen[:20]
    normalized = (obs.astype(np.float64) - seen.mean(axis=0, dtype=np.float64)) / np.std(seen.astype(np.float64), axis=0)
    acted = actor(policy, make_noise(20))(obs)[0]
    expected = actor(plain, make_noise(20))(normalized.astype(np.float32))[0]
    np.testing.assert_allclose(acted, expected, rtol=1e-3, atol=1e-3)
    assert np.ptp(expected, axis=0).min() > 0.1


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_both_actors_take_observations_of_any_type_without_normalization(dtype: type):
    space = spaces.Box(-100, 100, (3, 2), dtype)  # type: ignore[arg-type]
    policy = make_policy(ACTIONS["box"], observation_space=space, normalize_observations=False)
    obs = observations(5).astype(dtype)
    fast, general = (actor(policy, make_noise(5))(obs) for actor in (MlpActor, Actor))
    np.testing.assert_allclose(fast[0], general[0], rtol=1e-4, atol=1e-5)


# What is refused, and what the environment gets ------------------------------------------------------------------------------


@pytest.mark.parametrize("actor", [Actor, MlpActor])
@pytest.mark.parametrize("space", [*ACTIONS, "gsde"])
def test_output_that_is_not_finite_is_refused(space: str, actor: type[Actor]):
    policy = make_policy(ACTIONS["box" if space == "gsde" else space], use_sde=space == "gsde")
    policy.action_net.weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"(?s)policy's output is not finite.*nan"):
        actor(policy, make_noise(5))(observations())


@pytest.mark.parametrize("actor", [Actor, MlpActor])
def test_a_standard_deviation_that_is_not_finite_is_refused(actor: type[Actor]):
    policy = make_policy(ACTIONS["box"])
    policy.log_std.data[0] = np.nan
    with pytest.raises(ValueError, match=r"(?s)policy's output is not finite"):
        actor(policy, make_noise(5))(observations())


@pytest.mark.parametrize("actor", [Actor, MlpActor])
def test_the_environment_gets_clipped_actions(actor: type[Actor]):
    low, high = np.array([-0.1, -np.inf], dtype=np.float32), np.array([0.1, 0.2], dtype=np.float32)
    sampled, clipped = actor(make_policy(spaces.Box(low, high)), make_noise(50))(observations(50))
    np.testing.assert_array_equal(clipped, np.clip(sampled, low, high))
    assert np.any(sampled != clipped)


def test_the_environment_gets_unscaled_actions_when_they_are_squashed():
    policy = make_policy(spaces.Box(0, 10, (2,)), use_sde=True, squash_output=True)
    sampled, unscaled = make_actor(policy, make_noise(5))(observations())
    assert np.abs(sampled).max() <= 1
    np.testing.assert_allclose(unscaled, 5 * (sampled + 1), rtol=1e-5)


@pytest.mark.parametrize("actor", [Actor, MlpActor])
def test_discrete_actions_are_passed_on(actor: type[Actor]):
    sampled, passed = actor(make_policy(ACTIONS["discrete"]), make_noise(5))(observations())
    assert passed is sampled


def test_watching_modules_sees_what_is_put_into_them_and_nothing_afterwards():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with watch_modules() as changes:
        module[0].weight.data.fill_(1.0)
        module.load_state_dict(module.state_dict())
        assert not changes
        for change in (
            lambda: setattr(module[0], "weight", nn.Parameter(th.ones(3, 2))),
            lambda: module.__setitem__(0, nn.Linear(2, 3)),
            lambda: setattr(module[1], "running_mean", th.ones(3)),
        ):
            n_before = len(changes)
            change()
            assert len(changes) > n_before
    n_before = len(changes)
    module[0] = nn.Linear(2, 3)
    assert len(changes) == n_before


@pytest.mark.parametrize("distribution", [CategoricalDistribution, BernoulliDistribution])
def test_noise_of_discrete_actions_is_drawn_in_double_precision(distribution: type[Distribution]):
    """The Gumbel noise of float32 ends at 16: rare actions would never be taken, or too often."""
    assert make_noise(1).draw(distribution, 3).dtype == np.float64


def test_hooks_and_replaced_statistics_are_seen_at_the_next_step():
    for change in (
        lambda policy: policy.action_net.register_forward_hook(lambda module, inputs, output: output + 50),
        lambda policy: setattr(policy.observation_normalizer.mean_0, "data", policy.observation_normalizer.mean_0.data + 5),
        lambda policy: policy.observation_normalizer.var_0.fill_(9.0),
    ):
        policy = make_policy(ACTIONS["box"])
        actor = MlpActor(policy, make_noise(1))
        assert actor.is_current(policy)
        change(policy)
        assert not actor.is_current(policy)
