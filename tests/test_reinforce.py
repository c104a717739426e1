"""The algorithm: against the article's, written out once more; its update; what interrupts it; its seeds; its defaults."""

import csv
import io
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecEnv
from torch import nn

import sb3_reinforce
from sb3_reinforce import REINFORCE, MlpPolicy, policies, reinforce
from sb3_reinforce.baselines import LinearBaseline
from sb3_reinforce.episodes.acting import baseline_features
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from sb3_reinforce.natural_gradient import InverseTimeDecay
from sb3_reinforce.policies import action_values_of
from tests.envs import RandomEnv, RandomLengthEnv, ScriptedEnv, Simulators

LANDER = "LunarLanderContinuous-v3"
VECTOR = spaces.Box(-1, 1, (3,))
ADVANTAGES: list[Any] = ["monte_carlo", "q", "advantage", "td"]
every_advantage = pytest.mark.parametrize("advantage", ADVANTAGES)


def weights(model: REINFORCE) -> np.ndarray:
    return np.concatenate([value.numpy().ravel().copy() for value in model.policy.state_dict().values()])


def pendulum(n_steps: int = 50) -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=n_steps)


class Rollouts(BaseCallback):
    """Copies of the buffer at the end of each rollout, and of what the last update left."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[dict[str, Any]] = []
        self.gradients: list[np.ndarray] = []
        self.baselines: list[np.ndarray] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.buffers:
            self.after_update()

    def _on_rollout_end(self) -> None:
        names = ("observations", "actions", "rewards", "episode_starts", "returns", "advantages")
        self.buffers.append({name: getattr(self.model.rollout_buffer, name).copy() for name in names})

    def _on_training_end(self) -> None:
        self.after_update()

    def after_update(self) -> None:
        policy: Any = self.model.policy
        self.gradients.append(np.concatenate([p.grad.numpy().ravel().copy() for p in policy.parameters()]))
        if isinstance(policy.value_net, LinearBaseline):
            self.baselines.append(np.append(policy.value_net.weight.numpy(), policy.value_net.bias.numpy()))


# The article's algorithm -----------------------------------------------------------------------------------------------------

#: The settings of the article, but for the size of its batches
ARTICLE: dict[str, Any] = dict(
    gamma=0.97,
    learning_rate=1e-3,
    ent_coef=0.0,
    target_kl=None,
    normalize_advantage=True,
    baseline="linear",
    baseline_memory=0.0,
    baseline_kwargs=dict(ridge=0.0),
    bootstrap_timeouts=False,
    normalize_observations=False,
    policy_kwargs=dict(net_arch=[32, 32], activation_fn=nn.ReLU, ortho_init=False, log_std_init=0.0),
)


def least_squares(features: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Weights and intercept, as scikit-learn's LinearRegression has them behind a StandardScaler."""
    mean, std = features.mean(axis=0), features.std(axis=0)
    std[std == 0] = np.inf
    slope = np.linalg.lstsq((features - mean) / std, returns - returns.mean(), rcond=1e-6)[0] / std
    return np.append(slope, returns.mean() - mean @ slope)


def with_actions(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """States, actions within [-1, 1], the squares of these, and the products of states with both."""
    clipped = np.clip(actions, -1, 1)
    numbers = np.column_stack([clipped, clipped**2])
    products = [states[:, i] * numbers[:, j] for i in range(states.shape[1]) for j in range(numbers.shape[1])]
    return np.column_stack([states, numbers, *products])


class Article:
    """The article's algorithm as a plain loop, with each of its advantage functions and none of the code of this package."""

    def __init__(self, policy: Any, advantage: str):
        self.advantage = advantage
        self.mean = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        mine = [self.mean[0], self.mean[2], self.mean[4]]
        theirs = [policy.mlp_extractor.policy_net[0], policy.mlp_extractor.policy_net[2], policy.action_net]
        for layer, source in zip(mine, theirs, strict=True):
            layer.load_state_dict(source.state_dict())
        self.log_std = nn.Parameter(th.zeros(2))
        self.parameters = [self.log_std, *self.mean.parameters()]
        self.optimizer = th.optim.Adam(self.parameters, lr=1e-3)
        self.coefficients, self.action_coefficients = np.zeros(9), np.zeros(44 + 1)

    def learn(self, batch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        states, actions = batch["observations"], batch["actions"]
        joint = with_actions(states.astype(np.float64), actions.astype(np.float64))
        values = states @ self.coefficients[:8] + self.coefficients[8]
        action_values = joint @ self.action_coefficients[:44] + self.action_coefficients[44]
        returns, errors = np.zeros((2, len(states)))
        running = next_value = 0.0
        for t in reversed(range(len(states))):
            running = float(batch["rewards"][t]) + 0.97 * running
            returns[t] = running
            errors[t] = float(batch["rewards"][t]) + 0.97 * next_value - values[t]
            next_value = values[t]
            if batch["episode_starts"][t]:
                running = next_value = 0.0
        advantages = {
            "monte_carlo": returns - values,
            "q": action_values,
            "advantage": action_values - values,
            "td": errors,
        }[self.advantage]
        normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        mean = self.mean(th.as_tensor(states))
        squares = (th.as_tensor(actions) - mean) ** 2 / (2 * th.exp(2 * self.log_std))
        log_prob = (-squares - self.log_std - 0.5 * np.log(2 * np.pi)).sum(dim=1)
        loss = -(log_prob * th.as_tensor(normalized, dtype=th.float32)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        gradient = np.concatenate([parameter.grad.numpy().ravel().copy() for parameter in self.parameters])  # type: ignore[union-attr]

        self.coefficients = least_squares(states.astype(np.float64), returns)
        self.action_coefficients = least_squares(joint, returns)
        return returns, advantages, gradient, self.coefficients


@every_advantage
def test_is_the_articles_algorithm(advantage: Any):
    """
    Both see the same episodes; four batches in a row, so that every later step rests on the earlier ones. The advantage
    functions differ in one line, and share critics that are used before they are fitted to a batch.
    """
    rollouts = Rollouts()
    model = REINFORCE("MlpPolicy", LANDER, n_steps=500, seed=3, advantage=advantage, **ARTICLE)
    article = Article(model.policy, advantage)
    model.learn(2000, callback=rollouts)
    assert len(rollouts.buffers) >= 4
    for batch, gradient, baseline in zip(rollouts.buffers, rollouts.gradients, rollouts.baselines, strict=True):
        returns, advantages, expected_gradient, coefficients = article.learn(batch)
        np.testing.assert_allclose(batch["returns"], returns, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(batch["advantages"], advantages, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(baseline, coefficients, rtol=1e-5, atol=1e-5)


def test_algorithm_defaults():
    model: Any = REINFORCE("MlpPolicy", LANDER)
    assert (model.n_steps, model.n_episodes, model.gamma) == (None, 5, 0.99)
    assert str(model.target_kl) == str(InverseTimeDecay(0.0125, halving=50))
    assert (model.cg_max_steps, model.cg_damping) == (5, 10.0)
    assert (model.learning_rate, model.ent_coef, model.normalize_advantage) == (1e-3, 0.0, True)
    assert (model.baseline, model.baseline_memory) == ("random_features", 0.6)
    assert (model.bootstrap_timeouts, model.normalize_observations) == (True, True)
    assert (model.advantage, model.policy.action_values) == ("monte_carlo", False)
    # A policy that is made without the algorithm is the same
    for name in ("baseline", "baseline_memory", "normalize_observations"):
        assert signature(MlpPolicy).parameters[name].default == getattr(model, name) == getattr(model.policy, name)


# The update ------------------------------------------------------------------------------------------------------------------


def cartpole_gradient(**kwargs: Any) -> np.ndarray:
    rollouts = Rollouts()
    REINFORCE("MlpPolicy", "CartPole-v1", n_steps=100, seed=0, baseline=None, **kwargs).learn(100, callback=rollouts)
    return rollouts.gradients[0]


@pytest.mark.parametrize(("target_kl", "advantage"), [(None, "monte_carlo"), (0.01, "monte_carlo"), (0.01, "advantage")])
@pytest.mark.parametrize("space", ["vector", "image", "dictionary"])
def test_a_batch_in_chunks_is_the_same_as_all_at_once(
    space: str, target_kl: float | None, advantage: Any, monkeypatch: pytest.MonkeyPatch
):
    # Otherwise the states of the Fisher matrix are those of a chunk
    monkeypatch.setattr(reinforce, "_FISHER_STATES", 1)
    image = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)
    policy, observation_space = {
        "vector": ("MlpPolicy", VECTOR),
        "image": ("CnnPolicy", image),
        "dictionary": ("MultiInputPolicy", spaces.Dict(image=image, vector=VECTOR)),
    }[space]

    def learn() -> np.ndarray:
        env = RandomEnv(observation_space, spaces.Discrete(3), 8)
        model = REINFORCE(policy, env, n_steps=30, seed=0, ent_coef=0.1, target_kl=target_kl, advantage=advantage)
        return model.learn(90).policy.parameters_to_vector()

    whole = learn()
    monkeypatch.setattr(policies, "_CHUNK", 7 * spaces.flatdim(observation_space))
    np.testing.assert_allclose(learn(), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalize_observations", [False, True])
@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_the_baseline_is_used_and_fitted_with_the_features_of_the_policy_as_it_is(
    normalize_observations: bool, share_features_extractor: bool
):
    """On images, whose features change with every update: whichever pass over them the features come from."""
    space = spaces.Dict(image=spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8), vector=VECTOR)
    # Remembers what the baseline of the policy should
    expected_fit: list[LinearBaseline] = []

    class Check(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.batches: list[Any] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            (batch,) = self.model.rollout_buffer.get()
            expected = self.model.policy.predict_values(batch.observations).detach().flatten()  # type: ignore[arg-type, operator]
            np.testing.assert_allclose(batch.old_values, expected, rtol=1e-4, atol=1e-4)
            # Tensors share the memory of the buffer
            self.batches.append(deepcopy(batch))

        def _on_rollout_start(self) -> None:
            if not self.batches:
                return
            policy: Any = self.model.policy
            batch = self.batches[-1]
            with th.no_grad():
                features = policies.baseline_features(policy, batch.observations)
            if not expected_fit:
                memory = policy.baseline_memory
                expected_fit.append(LinearBaseline(features.shape[1], ridge=1e-3, memory=memory, truncate=True))
            (expected,) = expected_fit
            expected.fit(features.numpy(), batch.returns.numpy())
            found = policy.predict_values(batch.observations).detach()
            np.testing.assert_allclose(found, expected(features), rtol=1e-3, atol=1e-3)

    policy_kwargs = dict(share_features_extractor=share_features_extractor)
    env = RandomEnv(space, spaces.Discrete(3), 8)
    kwargs: dict[str, Any] = dict(n_steps=30, seed=0, bootstrap_timeouts=False, baseline_kwargs=dict(ridge=1e-3))
    kwargs |= dict(normalize_observations=normalize_observations, policy_kwargs=policy_kwargs)
    check = Check()
    REINFORCE("MultiInputPolicy", env, **kwargs).learn(120, callback=check)
    assert len(check.batches) >= 4 and np.ptp(check.batches[-1].old_values.numpy()) > 0


def test_advantages_are_normalized_only_if_asked_for():
    plain, normalized = cartpole_gradient(normalize_advantage=False, ent_coef=0.0), cartpole_gradient(ent_coef=0.0)
    assert np.linalg.norm(plain) > 5 * np.linalg.norm(normalized)


def test_the_entropy_bonus_raises_the_entropy():
    def entropy_loss(ent_coef: float) -> float:
        model = REINFORCE("MlpPolicy", pendulum(), ent_coef=ent_coef, n_steps=200, seed=0).learn(3000)
        return model.logger.name_to_value["train/entropy_loss"]

    assert entropy_loss(1.0) < entropy_loss(0.0) - 0.05


class EqualRewards(ScriptedEnv):
    def step(self, action: np.ndarray) -> Any:
        observation, _, *rest = super().step(action)
        return observation, 1.0, *rest


@pytest.mark.parametrize("target_kl", [None, 0.01])
def test_equal_returns_move_nothing(target_kl: float | None):
    for n_steps in (1, 50):
        model = REINFORCE("MlpPolicy", EqualRewards([1]), n_steps=n_steps, target_kl=target_kl, seed=0)
        before = model.policy.parameters_to_vector()
        model.learn(3 * n_steps)
        np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)
        np.testing.assert_allclose(model.policy.value_net.bias, [1.0])
        assert model.logger.name_to_value["train/kl_divergence_loss"] == 0


def test_the_baseline_of_a_batch_is_the_fit_to_the_one_before():
    kwargs: dict[str, Any] = dict(baseline="linear", baseline_memory=0.0, normalize_observations=False)
    model = REINFORCE("MlpPolicy", LANDER, n_steps=300, seed=0, **kwargs).learn(300)
    assert not model.rollout_buffer.values.any()
    buffer: Any = model.rollout_buffer
    earlier = buffer.observations.copy(), buffer.returns.copy()
    model.learn(300, reset_num_timesteps=False)
    design = np.column_stack([earlier[0], np.ones(len(earlier[0]))]).astype(np.float64)
    coefficients = np.linalg.lstsq(design, earlier[1], rcond=None)[0]
    expected = np.column_stack([buffer.observations, np.ones(len(buffer.observations))]) @ coefficients
    np.testing.assert_allclose(buffer.values, expected, rtol=1e-4, atol=1e-4)


def test_no_baseline_means_that_advantages_are_returns():
    model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=100, baseline=None, normalize_advantage=False).learn(300)
    np.testing.assert_array_equal(model.rollout_buffer.advantages, model.rollout_buffer.returns)


def test_observation_statistics_are_updated_once_a_batch_from_raw_observations():
    model = REINFORCE("MlpPolicy", LANDER, n_steps=300, seed=0)
    seen = []

    def callback(locals_: dict, globals_: dict) -> bool:
        seen.append(model.policy.observation_normalizer.mean_0.numpy().copy())
        return True

    model.learn(300, callback=callback)
    assert not np.any(seen)
    observations: Any = model.rollout_buffer.observations
    np.testing.assert_allclose(model.policy.observation_normalizer.mean_0, observations.mean(0, np.float64), atol=1e-9)
    # The baseline is fitted to what it will see, observations normalized so: least squares with an intercept hit the mean
    values = model.policy.predict_values(th.as_tensor(observations))
    np.testing.assert_allclose(values.mean().item(), model.rollout_buffer.returns.mean(), rtol=1e-4)


# Critics of actions ----------------------------------------------------------------------------------------------------------


class EarlierFits(BaseCallback):
    """
    Works out anew what the critic of actions expects of each batch: a twin of it is fitted to the batches before, in features
    of the policy as it was left by the update to each of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[np.ndarray] = []
        self.expected: list[np.ndarray] = []

    def _on_training_start(self) -> None:
        critic = action_values_of(self.model.policy)
        assert critic is not None
        self.twin = deepcopy(critic)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.found:
            self.twin.fit(self.features(), self.actions, self.returns)

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        (batch,) = buffer.get()
        # Tensors share the memory of the buffer
        self.observations, self.actions = deepcopy(batch.observations), batch.actions.clone()
        self.returns = buffer.returns.copy()
        self.found.append(buffer.action_values)
        self.expected.append(self.twin.predict(self.features(), self.actions).numpy().flatten())

    def features(self) -> th.Tensor:
        with th.no_grad():
            return baseline_features(self.model.policy, self.observations)


@pytest.mark.parametrize("advantage", ["q", "advantage"])
@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy", ActorCriticPolicy])
@pytest.mark.parametrize("action_space", [spaces.Box(-1, 1, (2,)), spaces.Discrete(3)], ids=["Box", "Discrete"])
def test_action_values_are_those_of_the_fits_to_earlier_batches(action_space: spaces.Space, policy: Any, advantage: Any):
    """
    None of its own returns is in what is expected of a batch: nothing at all on the first. The features of a CNN change with
    every update, as do the statistics of observations.
    """
    space = spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8) if policy == "CnnPolicy" else VECTOR
    env = DummyVecEnv([lambda: RandomEnv(space, action_space, 7)] * 2)
    fits = EarlierFits()
    REINFORCE(policy, env, n_steps=20, seed=0, advantage=advantage).learn(200, callback=fits)
    assert len(fits.found) >= 4
    assert not fits.found[0].any() and all(np.ptp(found) > 0 for found in fits.found[1:])
    for found, expected in zip(fits.found, fits.expected, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target_kl", [None, 0.01])
@pytest.mark.parametrize("advantage", ["q", "advantage"])
def test_without_a_critic_that_is_fitted_no_action_is_better_than_another(advantage: Any, target_kl: float | None):
    """The first batch moves nothing, and is what the critic is fitted to."""
    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=50, target_kl=target_kl, seed=0, advantage=advantage)
    before = model.policy.parameters_to_vector()
    model.learn(1)
    np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)
    assert model.policy.action_value_net.linear.weight.any()
    model.learn(1, reset_num_timesteps=False)
    assert not np.array_equal(model.policy.parameters_to_vector(), before)


@every_advantage
@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
def test_what_is_logged_is_how_well_the_critics_that_are_used_have_predicted(policy: Any, advantage: Any):
    """Before they are fitted: the mean squared error, and the share of the variance of returns that they explain."""
    model = REINFORCE(policy, RandomLengthEnv(9), n_steps=50, seed=0, advantage=advantage).learn(200)
    buffer, logged = model.rollout_buffer, model.logger.name_to_value
    assert (buffer.action_values is not None) == (advantage in ("q", "advantage"))
    critics = {"": buffer.action_values if advantage == "q" else buffer.values}
    if advantage == "advantage":
        critics["action_"] = buffer.action_values
    for kind, values in critics.items():
        assert values is not None and np.ptp(values) > 0
        errors = buffer.returns - values
        assert logged[f"train/{kind}value_loss"] == pytest.approx(sum(errors**2) / len(errors))
        assert logged[f"train/{kind}explained_variance"] == pytest.approx(1 - np.var(errors) / np.var(buffer.returns))
    for name in ("action_value_loss", "action_explained_variance"):
        assert (f"train/{name}" in logged) == (advantage == "advantage")


@pytest.mark.parametrize("ortho_init", [True, False])
def test_all_advantages_begin_with_the_same_actor(ortho_init: bool):
    """Otherwise, to compare them with a seed in common is to compare their beginnings, too."""
    actors = []
    for advantage in ADVANTAGES:
        env = RandomEnv(VECTOR, spaces.Box(-1, 1, (2,)), 9)
        kwargs: dict[str, Any] = dict(seed=0, policy_kwargs=dict(ortho_init=ortho_init))
        actors.append(REINFORCE("MlpPolicy", env, advantage=advantage, **kwargs).policy.parameters_to_vector())
    for actor in actors[1:]:
        np.testing.assert_array_equal(actor, actors[0])


# The step --------------------------------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """As a policy might have it that does not use PyTorch's module."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


class WithDropout(MlpPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(Dropout())


class WithBatchNorm(MlpPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(nn.BatchNorm1d(self.mlp_extractor.latent_dim_pi))


class WithStd(ActorCriticPolicy):
    """The action net returns means and logarithms of standard deviations."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Linear(self.mlp_extractor.latent_dim_pi, 4)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))  # type: ignore[call-arg]

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        mean, log_std = self.action_net(latent_pi).chunk(2, dim=1)
        self.action_dist.distribution = th.distributions.Normal(mean, log_std.clamp(-5, 0).exp())
        return self.action_dist


class Attention(BaseFeaturesExtractor):
    """PyTorch has several implementations of it, most of them without second derivatives."""

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        tokens = observations[..., None].expand(-1, -1, 4)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1)


class Steps(BaseCallback):
    """
    Works out the mean divergence of each step anew: that of what the policy returns in the states of the batch with the
    parameters after the step from what it returns with those before it, all else being equal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.divergences: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        policy = self.model.policy
        (batch,) = self.model.rollout_buffer.get()
        self.observations = deepcopy(batch.observations)
        self.before = {name: value.clone() for name, value in policy.state_dict().items()}

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self.after_update()

    def _on_training_end(self) -> None:
        self.after_update()

    def after_update(self) -> None:
        policy: Any = self.model.policy
        after = {name: value.clone() for name, value in policy.state_dict().items()}
        # The statistics of observations are updated after the step
        statistics = {name: value for name, value in self.before.items() if "observation_normalizer" in name}
        # Shared ones have several names
        parameters = {name: self.before[name] for name, _ in policy.named_parameters(remove_duplicate=False)}
        policy.load_state_dict(after | statistics)
        new = self.outputs()
        policy.load_state_dict(after | statistics | parameters)
        self.divergences.append(divergence(self.outputs(), new))
        policy.load_state_dict(after)
        assert self.logger.name_to_value["train/kl_divergence_loss"] == pytest.approx(self.divergences[-1], rel=0.01)

    def outputs(self) -> list[np.ndarray]:
        """Means and standard deviations of Gaussians; for each discrete action, the probabilities of its values."""
        with th.no_grad():
            distribution: Any = self.model.policy.get_distribution(self.observations).distribution  # type: ignore[operator]
        if isinstance(distribution, th.distributions.Normal):
            return [distribution.mean.double().numpy(), distribution.stddev.double().numpy()]
        if isinstance(distribution, th.distributions.Bernoulli):
            ones = distribution.probs.double().numpy()
            return [np.stack([p, 1 - p], axis=1) for p in ones.T]
        parts = distribution if isinstance(distribution, list) else [distribution]
        return [part.probs.double().numpy() for part in parts]


def divergence(old: list[np.ndarray], new: list[np.ndarray]) -> float:
    if old[0].min() >= 0 and np.allclose(old[0].sum(axis=1), 1):
        terms = [p * np.log(p / q) for p, q in zip(old, new, strict=True)]
        return np.concatenate(terms, axis=1).sum(axis=1).mean()
    (mean, std), (other_mean, other_std) = old, new
    gaussian = np.log(other_std / std) + (std**2 + (mean - other_mean) ** 2) / (2 * other_std**2) - 0.5
    return gaussian.sum(axis=1).mean()


BOX, DISCRETE = spaces.Box(-1, 1, (2,)), spaces.Discrete(3)
IMAGE = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)
SQUASHED: dict[str, Any] = dict(use_sde=True, policy_kwargs=dict(squash_output=True))
#: Policy, spaces and arguments
STEPS: dict[str, tuple[Any, spaces.Space, spaces.Space, dict[str, Any]]] = {
    "Box": ("MlpPolicy", VECTOR, BOX, {}),
    "short": ("MlpPolicy", VECTOR, BOX, dict(target_kl=1e-4)),
    "long": ("MlpPolicy", VECTOR, BOX, dict(target_kl=1.0)),
    "little damping": ("MlpPolicy", VECTOR, BOX, dict(cg_damping=1e-4)),
    "much damping": ("MlpPolicy", VECTOR, BOX, dict(cg_damping=1e9)),
    "little noise": ("MlpPolicy", VECTOR, BOX, dict(policy_kwargs=dict(log_std_init=-8.0))),
    "gSDE": ("MlpPolicy", VECTOR, BOX, dict(use_sde=True)),
    "squashed gSDE": ("MlpPolicy", VECTOR, BOX, SQUASHED),
    "Discrete": ("MlpPolicy", VECTOR, DISCRETE, {}),
    "MultiDiscrete": ("MlpPolicy", VECTOR, spaces.MultiDiscrete([2, 3]), {}),
    "MultiBinary": ("MlpPolicy", VECTOR, spaces.MultiBinary(2), {}),
    "images": ("CnnPolicy", IMAGE, DISCRETE, {}),
    "dictionaries": ("MultiInputPolicy", spaces.Dict(image=IMAGE, vector=VECTOR), BOX, {}),
    "dropout": (WithDropout, VECTOR, BOX, {}),
    "batch norm": (WithBatchNorm, VECTOR, BOX, {}),
    "attention": ("MlpPolicy", VECTOR, BOX, dict(policy_kwargs=dict(features_extractor_class=Attention))),
    "SB3's policy": (ActorCriticPolicy, VECTOR, DISCRETE, {}),
    "standard deviations of states": (WithStd, VECTOR, BOX, {}),
}


@pytest.mark.parametrize("case", STEPS)
def test_every_step_has_the_divergence_asked_for(case: str):
    policy, observation_space, action_space, kwargs = STEPS[case]
    kwargs = dict(target_kl=0.01) | kwargs
    steps = Steps()
    REINFORCE(policy, RandomEnv(observation_space, action_space, 8), n_steps=50, seed=0, **kwargs).learn(200, callback=steps)
    assert len(steps.divergences) >= 4
    np.testing.assert_allclose(steps.divergences, kwargs["target_kl"], rtol=0.01)


def dense_fisher(policy: Any, states: th.Tensor) -> np.ndarray:
    """Mean over the states of J^T M J: J of the means and log standard deviations, or of the logits, and their own M."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    n = sum(parameter.numel() for parameter in parameters)
    fisher = np.zeros((n, n))
    for state in states.split(1):
        distribution = policy.get_distribution(state).distribution
        if isinstance(distribution, th.distributions.Normal):
            std = distribution.stddev[0]
            outputs = [*distribution.mean[0], *th.log(std)]
            metric = np.diag([*(1 / std.detach().double().numpy() ** 2), *[2.0] * len(std)])
        else:
            outputs = [*distribution.logits[0]]
            p = distribution.probs[0].detach().double().numpy()
            metric = np.diag(p) - np.outer(p, p)
        rows = [th.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True) for output in outputs]
        jacobian = np.array([np.concatenate([part.double().numpy().ravel() for part in row]) for row in rows])
        fisher += jacobian.T @ metric @ jacobian / len(states)
    return fisher


@pytest.mark.parametrize("damping", [1e-2, 0.1, 1e9])
@pytest.mark.parametrize("net_arch", [[], [4]], ids=str)
@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["Box", "Discrete"])
def test_the_step_is_along_the_damped_natural_gradient(action_space: spaces.Space, net_arch: list[int], damping: float):
    """That of the present policy, by a dense solve in double precision; much damping is the plain gradient."""
    rollouts = Rollouts()
    env = RandomEnv(VECTOR, action_space, 9)
    kwargs: dict[str, Any] = dict(n_steps=20, seed=0, normalize_observations=False, policy_kwargs=dict(net_arch=net_arch))
    model = REINFORCE("MlpPolicy", env, target_kl=1e-3, cg_damping=damping, cg_max_steps=100, **kwargs)
    # Not that of an untrained policy, whose last layer is next to 0
    with th.no_grad():
        model.policy.action_net.weight.normal_()
    before, policy = model.policy.parameters_to_vector(), deepcopy(model.policy)
    model.learn(1, callback=rollouts)
    step = (model.policy.parameters_to_vector() - before).astype(np.float64)
    (gradient,) = rollouts.gradients
    fisher = dense_fisher(policy, th.as_tensor(rollouts.buffers[0]["observations"]))
    natural = -np.linalg.solve(fisher + damping * np.eye(len(fisher)), gradient.astype(np.float64))

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    assert cosine(step, natural) > 0.999
    # The two directions are not the same in the first place
    assert (cosine(natural, -gradient) > 0.999) == (damping == 1e9)


def test_the_step_depends_on_neither_the_learning_rate_nor_the_optimizer():
    def learn(**kwargs: Any) -> np.ndarray:
        return weights(REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=50, seed=0, **kwargs).learn(200))

    expected = learn()
    np.testing.assert_array_equal(learn(learning_rate=0.0), expected)
    np.testing.assert_array_equal(learn(learning_rate=1e9), expected)
    np.testing.assert_array_equal(learn(policy_kwargs=dict(optimizer_class=th.optim.SGD)), expected)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_the_step_does_not_depend_on_the_scale_of_rewards(normalize_advantage: bool, scale: float):
    def learn(scale: float) -> np.ndarray:
        env = gym.wrappers.TransformReward(RandomLengthEnv(9), lambda reward: scale * reward)  # type: ignore[operator]
        kwargs: dict[str, Any] = dict(normalize_advantage=normalize_advantage, baseline="linear")
        return REINFORCE("MlpPolicy", env, n_steps=50, seed=0, **kwargs).learn(200).policy.parameters_to_vector()

    np.testing.assert_allclose(learn(scale), learn(1.0), atol=2e-3)


def test_the_step_leaves_the_state_of_the_optimizer_alone():
    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=50, seed=0)
    before = deepcopy(model.policy.optimizer.state_dict())
    assert same(model.learn(200).policy.optimizer.state_dict(), before)
    assert not before["state"]


@every_advantage
@pytest.mark.parametrize("make_env", [pendulum, lambda: gym.make("CartPole-v1")], ids=["Pendulum", "CartPole"])
def test_learning_in_pieces_is_learning_in_one_piece(make_env: Callable[[], gym.Env], advantage: Any):
    """To the bit, without knowing how much is still to come."""
    whole, pieces = (REINFORCE("MlpPolicy", make_env(), n_steps=100, seed=0, advantage=advantage) for _ in range(2))
    whole.learn(600)
    while pieces.num_timesteps < 600:
        pieces.learn(1, reset_num_timesteps=False)
    assert pieces._n_updates == whole._n_updates >= 4
    np.testing.assert_array_equal(weights(pieces), weights(whole))


@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.SGD])
def test_without_target_kl_the_step_is_that_of_the_optimizer(optimizer_class: type[th.optim.Optimizer]):
    rollouts = Rollouts()
    policy_kwargs = dict(optimizer_class=optimizer_class)
    kwargs: dict[str, Any] = dict(n_steps=50, learning_rate=0.02, target_kl=None, policy_kwargs=policy_kwargs, seed=0)
    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), **kwargs)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in model.policy.parameters()]
    optimizer = optimizer_class(parameters, lr=0.02)  # type: ignore[call-arg]
    model.learn(200, callback=rollouts)
    assert len(rollouts.gradients) >= 4
    for gradient in rollouts.gradients:
        parts = np.split(gradient, np.cumsum([parameter.numel() for parameter in parameters])[:-1])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = th.as_tensor(part).view_as(parameter)
        optimizer.step()
    assert all(map(th.equal, parameters, model.policy.parameters()))


# Steps that are refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_kl", [None, 0.01])
def test_a_gradient_that_is_not_finite_is_not_applied(target_kl: float | None):
    env = ScriptedEnv([4], spoil=lambda what, episode, step, value: 3e38 if what == "reward" else value)
    kwargs: dict[str, Any] = dict(normalize_advantage=False, baseline=None, target_kl=target_kl)
    model = REINFORCE("MlpPolicy", env, n_steps=8, seed=0, **kwargs)
    before = snapshot(model)
    with pytest.raises(ValueError, match="gradient of update 1 is not finite"):
        model.learn(8)
    assert same(snapshot(model), before)


@pytest.mark.parametrize(
    ("env", "rate", "reason"),
    [(ScriptedEnv([4]), 1e30, "output is not finite"), (RandomEnv(VECTOR, DISCRETE, 4), 1e3, "infinitely far")],
)
def test_a_step_that_breaks_the_policy_is_undone(env: gym.Env, rate: float, reason: str):
    model = REINFORCE("MlpPolicy", env, n_steps=8, learning_rate=rate, target_kl=None, seed=0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"Update 1 was undone: lower the learning rate\. .*{reason}"):
        model.learn(8)
    assert same(snapshot(model), before)
    model.learning_rate = 1e-3
    model._setup_lr_schedule()
    assert model.learn(16)._n_updates >= 1


@pytest.mark.parametrize("validate", [True, False])
def test_a_direction_that_is_not_finite_is_not_taken(validate: bool, monkeypatch: pytest.MonkeyPatch):
    """Whether or not PyTorch checks its distributions."""
    monkeypatch.setattr(reinforce, "natural_direction", lambda gradient, *args: th.full_like(gradient, np.nan))
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", validate)
    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=20, seed=0)
    before = snapshot(model)
    with pytest.raises(ValueError, match="Update 1 was undone: no step along its gradient leaves the policy finite"):
        model.learn(1)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("log_std", [-20.0, -30.0])
def test_a_policy_with_next_to_no_noise_stays_finite(log_std: float):
    """Steps that are too short for float32 are none."""
    kwargs: dict[str, Any] = dict(target_kl=0.01, policy_kwargs=dict(log_std_init=log_std))
    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=20, seed=0, **kwargs).learn(60)
    assert np.isfinite(weights(model)).all()
    assert 0 <= model.logger.name_to_value["train/kl_divergence_loss"] <= 0.01001


def test_learning_goes_on_when_a_policy_always_does_the_same():
    """Of a discrete action whose probability is 1, the gradient is next to nothing, but not always nothing."""

    class Bandit(ScriptedEnv):
        action_space = spaces.Discrete(2)

        def step(self, action: np.ndarray) -> Any:
            observation, _, *rest = super().step(action)
            return observation, float(action == 0), *rest

    kwargs: dict[str, Any] = dict(n_steps=100, target_kl=0.01, cg_damping=0.1, seed=0)
    model = REINFORCE("MlpPolicy", Bandit([1]), **kwargs).learn(8000)
    assert model._n_updates == 80
    assert np.isfinite(weights(model)).all()
    assert np.mean(model.rollout_buffer.rewards) > 0.98


def test_a_policy_that_is_never_the_same_twice_is_not_waited_for():
    n_looks = 0

    class Restless(MlpPolicy):
        def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
            nonlocal n_looks
            n_looks += self.action_net.weight.grad is not None
            return super()._get_action_dist_from_latent(latent_pi + th.randn_like(latent_pi))

    REINFORCE(Restless, pendulum(), n_steps=200, target_kl=1e-9, seed=0).learn(1)
    assert 0 < n_looks < 40


class StudentT(MlpPolicy):
    """Not even PyTorch has a divergence of these."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        distribution = DiagGaussianDistribution(self.action_space.shape[0])  # type: ignore[index]
        distribution.distribution = th.distributions.StudentT(5, self.action_net(latent_pi), self.log_std.exp())  # type: ignore[assignment]
        distribution.log_prob = lambda actions: distribution.distribution.log_prob(actions).sum(dim=1)  # type: ignore[method-assign]
        return distribution


def test_a_distribution_without_a_closed_form_divergence_is_learned_without_target_kl():
    model = REINFORCE(StudentT, pendulum(), n_steps=50)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"divergence of a DiagGaussianDistribution .*target_kl must be None"):
        model.learn(1)
    assert same(snapshot(model), before)
    model = REINFORCE(StudentT, pendulum(), n_steps=50, target_kl=None).learn(1)
    assert model._n_updates == 1
    assert "train/kl_divergence_loss" not in model.logger.name_to_value


@pytest.mark.parametrize("value", [np.nan, -1.0, np.inf])
@pytest.mark.parametrize("name", ["learning_rate", "target_kl"])
def test_a_schedule_that_gives_what_is_not_allowed_is_refused(name: str, value: float):
    kwargs: dict[str, Any] = dict(n_steps=8, seed=0, target_kl=None)
    with pytest.raises(ValueError, match=rf"{name} must be finite .* gives {value} at progress_remaining=1.0"):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), **kwargs | {name: lambda progress: value}).learn(8)
    schedule = lambda progress: 0.1 if progress == 1 else value  # noqa: E731
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), **kwargs | {name: schedule}).learn(8)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{name} must be finite .* gives {value} at progress_remaining=0.5"):
        model.learn(8, reset_num_timesteps=False)
    assert same(snapshot(model), before)


def test_a_schedule_counts_the_steps_before_the_batch():
    """Its beginning is for the first update, and no update has the 0 at its end, however long the last episodes are."""
    rates: list[float] = []
    divergences: list[float] = []

    class Rates(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                self.after_update()

        def _on_training_end(self) -> None:
            self.after_update()

        def after_update(self) -> None:
            rates.append(self.model.policy.optimizer.param_groups[0]["lr"])
            divergences.append(self.logger.name_to_value["train/kl_divergence_loss"])

    expected = [1e-3, 1e-3 * (1 - 14 / 30), 1e-3 * (1 - 28 / 30)]
    schedule = LinearSchedule(1e-3, 0.0, 1.0)
    kwargs: dict[str, Any] = dict(n_steps=10, seed=0)
    REINFORCE("MlpPolicy", ScriptedEnv([7]), learning_rate=schedule, target_kl=None, **kwargs).learn(30, callback=Rates())
    assert rates == pytest.approx(expected)
    divergences.clear()
    REINFORCE("MlpPolicy", ScriptedEnv([7]), target_kl=schedule, **kwargs).learn(30, callback=Rates())
    assert divergences == pytest.approx(expected, rel=2e-3)


def test_inverse_time_decay_counts_the_updates_of_the_life_of_a_model(tmp_path: Path):
    """Not those of a call of learn(), and whatever the progress."""

    def divergence(model: REINFORCE, **kwargs: Any) -> float:
        return model.learn(1, **kwargs).logger.name_to_value["train/kl_divergence_loss"]

    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=20, target_kl=InverseTimeDecay(0.02, halving=2), seed=0)
    found = [divergence(model), divergence(model), divergence(model, reset_num_timesteps=False)]
    model.save(tmp_path / "model")
    found.append(divergence(REINFORCE.load(tmp_path / "model", RandomLengthEnv(9))))
    assert found == pytest.approx([0.02, 0.02 / 1.5, 0.02 / 2, 0.02 / 2.5], rel=0.01)


def test_a_divergence_of_0_is_no_step():
    """A schedule may end so; the baseline is fitted all the same."""
    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=20, target_kl=lambda progress: 0.0, seed=0)
    before = model.policy.parameters_to_vector()
    model.learn(1)
    np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)
    assert model.policy.value_net.weight.any()


# Updates that are interrupted ------------------------------------------------------------------------------------------------


def snapshot(model: REINFORCE) -> dict[str, Any]:
    """All that an update changes."""
    return deepcopy(model.get_parameters()) | dict(_n_updates=model._n_updates, _next_episode=model._next_episode)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return th.equal(one, other) if isinstance(one, th.Tensor) else one == other


@contextmanager
def interrupted_at_line(n: int) -> Iterator[list[str]]:
    """Ctrl-C at the n-th line of this package; gives the lines that were run."""
    folder = str(Path(sb3_reinforce.__file__).parent)
    lines: list[str] = []

    def trace_lines(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            lines.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            if len(lines) == n:
                raise KeyboardInterrupt
        return trace_lines

    def trace_calls(frame: Any, event: str, arg: Any) -> Any:
        return trace_lines if frame.f_code.co_filename.startswith(folder) else None

    before = sys.gettrace()
    sys.settrace(trace_calls)
    try:
        yield lines
    finally:
        sys.settrace(before)
        # Python can be interrupted between the end of a with block and its __exit__(), which nobody can help
        th.set_grad_enabled(True)


@pytest.mark.parametrize(
    ("policy", "kwargs"),
    [
        ("MlpPolicy", dict(target_kl=1e-3, cg_max_steps=3)),
        ("MlpPolicy", dict(target_kl=None, baseline="linear", baseline_memory=0.0, normalize_observations=False)),
        (WithBatchNorm, dict(target_kl=None, baseline=None)),
        ("MlpPolicy", dict(target_kl=None, baseline="linear", advantage="advantage")),
    ],
    ids=["natural step", "optimizer's step", "batch norm", "actor-critic"],
)
def test_an_update_that_is_interrupted_at_any_line_is_either_before_it_or_after_it(policy: Any, kwargs: dict[str, Any]):
    """
    Ctrl-C at every line of this package that ``train()`` runs, for the first and for the last time. Afterwards the same update
    can be made as if there had been none.
    """
    kwargs = dict(n_steps=20, learning_rate=0.03, seed=0, policy_kwargs=dict(net_arch=[4])) | kwargs
    model = REINFORCE(policy, RandomLengthEnv(9), **kwargs).learn(40)
    buffer, before = model.rollout_buffer, snapshot(model)
    advantages = buffer.advantages.copy()

    def restore() -> None:
        # A copy: the optimizer keeps the tensors that it is given
        model.set_parameters(deepcopy({name: before[name] for name in ("policy", "policy.optimizer")}))
        model._n_updates, model._next_episode = before["_n_updates"], before["_next_episode"]
        buffer.advantages = advantages.copy()

    with interrupted_at_line(0) as lines:
        model.train()
    after = snapshot(model)
    assert not same(before, after)
    numbered = list(enumerate(lines, start=1))
    last = {line: n for n, line in numbered}
    first = {line: n for n, line in reversed(numbered)}
    n_before = n_after = 0
    for n in sorted({*first.values(), *last.values()}):
        restore()
        with pytest.raises(KeyboardInterrupt), interrupted_at_line(n) as lines:
            model.train()
        found = snapshot(model)
        is_before, is_after = same(found, before), same(found, after)
        assert is_before or is_after, f"at {lines[n - 1]}"
        assert not (is_before and n_after), f"at {lines[n - 1]}"
        n_before, n_after = n_before + is_before, n_after + is_after
    assert n_before > 50 and n_after == 0
    restore()
    model.train()
    assert same(snapshot(model), after)


def test_a_policy_is_in_evaluation_mode_after_an_update_that_was_interrupted(monkeypatch: pytest.MonkeyPatch):
    """Its values would otherwise be those of dropout, and change the statistics of batch normalization."""
    model = REINFORCE(WithBatchNorm, RandomLengthEnv(9), n_steps=20, seed=0)
    monkeypatch.setattr(reinforce, "policy_gradient_loss", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.learn(1)
    assert not any(module.training for module in model.policy.modules())


def once(error: BaseException, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, after: bool = True) -> None:
    """Let a function raise when it is called for the second time, after (or before) it has done its work."""
    function, n_calls = getattr(owner, name), 0

    def raising(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        result = function(*args, **kwargs) if after or n_calls != 2 else None
        if n_calls == 2:
            raise error
        return result

    monkeypatch.setattr(owner, name, raising)


POINTS: dict[str, Callable[[REINFORCE], tuple[Any, str]]] = {
    "gradient": lambda model: (model, "_gradient_norm"),
    "step of the optimizer": lambda model: (model.policy.optimizer, "step"),
    "direction": lambda model: (reinforce, "natural_direction"),
    "step": lambda model: (reinforce, "assign"),
    "divergence": lambda model: (reinforce, "kl_divergence"),
    "statistics": lambda model: (model.policy.observation_normalizer, "update"),
    "baseline": lambda model: (model.policy.value_net, "fit"),
    "action values": lambda model: (model.policy.action_value_net, "fit"),
    "step of the environment": lambda model: (model.get_env(), "step"),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("mine")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("point", POINTS)
def test_learning_goes_on_after_an_interruption_as_if_there_had_been_none(
    point: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
):
    def make() -> REINFORCE:
        env = DummyVecEnv([lambda: RandomLengthEnv(9) for _ in range(2)])
        kwargs: dict[str, Any] = dict(learning_rate=0.03, seed=0, policy_kwargs=dict(net_arch=[4]))
        kwargs["target_kl"] = None if point == "step of the optimizer" else 0.01
        kwargs["advantage"] = "advantage" if point == "action values" else "monte_carlo"
        return REINFORCE("MlpPolicy", env, n_steps=20, **kwargs)

    def learn_up_to(model: REINFORCE, n_updates: int) -> None:
        while model._n_updates < n_updates:
            model.learn(1, reset_num_timesteps=False)

    whole, model = make(), make()
    learn_up_to(whole, 4)
    once(error, *POINTS[point](model), monkeypatch)
    with pytest.raises((type(error), RuntimeError)):
        learn_up_to(model, 4)
    assert model._n_updates < 4
    learn_up_to(model, 4)
    assert same(snapshot(model), snapshot(whole))


def test_a_file_saved_after_an_interruption_at_any_line_goes_on_as_if_there_had_been_none(monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C at every line of ``train()``, for the first and for the last time; weights and what is logged are the same."""
    train, kwargs = REINFORCE.train, dict(n_steps=20, seed=0, policy_kwargs=dict(net_arch=[4]))
    at, lines = [0], []

    def interrupted_train(self: REINFORCE) -> None:
        if self._n_updates != 1:
            train(self)
            return
        with interrupted_at_line(at[0]) as seen:
            try:
                train(self)
            finally:
                lines[:] = seen

    def state(model: REINFORCE) -> dict[str, Any]:
        values = model.logger.name_to_value
        logged = {name: values[name] for name in ("time/iterations", "train/n_updates", "train/value_loss", "train/std")}
        return snapshot(model) | dict(steps=model.num_timesteps, logged=logged)

    def learn(model: REINFORCE, total: int) -> REINFORCE:
        # Its values stay in the logger
        monkeypatch.setattr(model, "dump_logs", lambda iteration: model.logger.record("time/iterations", iteration))
        return model.learn(total, reset_num_timesteps=False)

    monkeypatch.setattr(REINFORCE, "train", interrupted_train)
    whole = learn(REINFORCE("MlpPolicy", RandomLengthEnv(9), **kwargs), 60)
    numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.split(":")[0] in ("train", "_log_critics")]
    last = {line: n for n, line in numbered}
    first = {line: n for n, line in reversed(numbered)}
    wrong = []
    for at[0] in sorted({*first.values(), *last.values()}):
        model, file = REINFORCE("MlpPolicy", RandomLengthEnv(9), **kwargs), io.BytesIO()
        with pytest.raises(KeyboardInterrupt):
            learn(model, 60)
        line = lines[-1]
        monkeypatch.undo()
        model.save(file)
        resumed = REINFORCE.load(file, env=RandomLengthEnv(9))
        learn(resumed, 60 - resumed.num_timesteps)
        if not same(state(resumed), state(whole)):
            wrong.append(line)
        monkeypatch.setattr(REINFORCE, "train", interrupted_train)
    assert wrong == []


# Seeds -----------------------------------------------------------------------------------------------------------------------


def test_each_update_has_dropout_of_its_own():
    """By the model's seed and the number of updates before it: the same again, and not what PyTorch would draw."""
    dropped: list[th.Tensor] = []

    class Noting(nn.Dropout):
        def forward(self, values: th.Tensor) -> th.Tensor:
            result = super().forward(values)
            if self.training:
                dropped.append((result == 0)[:, 0])
            return result

    kwargs: dict[str, Any] = dict(n_steps=40, policy_kwargs=dict(net_arch=[8], activation_fn=lambda: Noting(0.5)))
    for seed, torch_seed in ((0, 1), (0, 2), (3, 1)):
        model = REINFORCE("MlpPolicy", ScriptedEnv([40]), seed=seed, **kwargs)
        th.manual_seed(torch_seed)
        model.learn(80)
    # Of the actor alone, once an update
    patterns = [tuple(pattern.tolist()) for pattern in dropped if len(pattern) == 40]
    assert len(patterns) == 6
    assert patterns[:2] == patterns[2:4]
    assert len({*patterns}) == 4


def test_rollouts_of_one_seed_differ():
    model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=50, seed=0, target_kl=None, learning_rate=0.0)
    model.learn(50)
    first = model.rollout_buffer.observations[:5].copy()  # type: ignore[index]
    model.learn(50, reset_num_timesteps=False)
    assert not np.array_equal(first, model.rollout_buffer.observations[:5])  # type: ignore[index]


def test_learn_from_the_start_goes_on_with_the_numbers_of_the_episodes():
    """What was learned from is not learned from again."""
    env = ScriptedEnv([3])
    model = REINFORCE("MlpPolicy", env, n_steps=6, seed=0)
    for _ in range(3):
        model.learn(6)
    assert len(set(env.seeds)) == len(env.seeds) == 6


def test_set_random_seed_fixes_what_follows():
    results = []
    for _ in range(2):
        model = REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=50, seed=0)
        model.set_random_seed(7)
        results.append(weights(model.learn(150)))
    np.testing.assert_array_equal(*results)
    assert model.seed == 7
    assert not np.array_equal(results[0], weights(REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=50, seed=0).learn(150)))


class SameEnv(ScriptedEnv):
    """Every episode is the same, whatever it is seeded with; its rewards depend on the actions."""

    def __init__(self) -> None:
        super().__init__([5])

    def _observation(self) -> Any:
        return np.array([0, 1, self.steps], dtype=np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        observation, _, *rest = super().step(action)
        return observation, float(np.sum(action)), *rest


#: Arguments of models without a seed
UNSEEDED = {
    "default": dict(),
    "gsde": dict(use_sde=True, sde_sample_freq=2),
    "dropout": dict(policy_kwargs=dict(net_arch=[8], activation_fn=lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.3)))),
    "policy_of_sb3": dict(policy=ActorCriticPolicy),
    "actor_critic": dict(advantage="advantage", target_kl=None),
}
unseeded = pytest.mark.parametrize("kwargs", [pytest.param(kwargs, id=name) for name, kwargs in UNSEEDED.items()])


def make_unseeded(**kwargs: Any) -> REINFORCE:
    return REINFORCE(env=SameEnv(), **(dict(policy="MlpPolicy", n_steps=20) | kwargs))


def global_states() -> list[Any]:
    """States of the global generators of Python, NumPy and PyTorch."""
    name, keys, *rest = np.random.get_state()
    return [random.getstate(), name, keys.tolist(), rest, th.get_rng_state().tolist()]


@unseeded
def test_a_model_without_a_seed_draws_one_from_numpys_global_generator_and_touches_no_other(kwargs: dict[str, Any]):
    np.random.seed(5)
    expected = int(np.random.randint(2**31))
    after_one_draw = global_states()
    np.random.seed(5)
    model = make_unseeded(**kwargs)
    assert model.seed is None and model.run_seed == expected
    assert global_states() == after_one_draw
    model.learn(60)
    assert model._n_updates >= 3
    assert global_states() == after_one_draw
    assert model.run_seed == expected


@unseeded
def test_a_model_with_the_seed_that_was_drawn_is_the_same(kwargs: dict[str, Any]):
    """Where episodes are the same without a seed of their own, training is the same too."""
    drawn = make_unseeded(**kwargs)
    given = make_unseeded(seed=drawn.run_seed, **kwargs)
    other = make_unseeded(seed=drawn.run_seed + 1, **kwargs)
    assert given.run_seed == given.seed == drawn.run_seed
    for _ in range(2):
        assert same(snapshot(drawn), snapshot(given))
        assert not same(snapshot(drawn), snapshot(other))
        for model in (drawn, given, other):
            model.learn(60, reset_num_timesteps=False)
        np.testing.assert_array_equal(drawn.rollout_buffer.actions, given.rollout_buffer.actions)


def test_environments_are_given_no_seed_without_one():
    env = DummyVecEnv([lambda: ScriptedEnv([3, 5]) for _ in range(2)])
    model = REINFORCE("MlpPolicy", env, n_steps=10).learn(50)
    model.learn(50, reset_num_timesteps=False)
    assert {seed for seeds in env.get_attr("seeds") for seed in seeds} == {None}
    assert sum(env.get_attr("n_resets")) > 10


@unseeded
def test_the_seed_that_was_drawn_is_logged_saved_and_loaded(kwargs: dict[str, Any], tmp_path: Path):
    model = make_unseeded(tensorboard_log=None, **kwargs)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(60).save(tmp_path / "model")
    with open(tmp_path / "progress.csv", newline="") as file:
        assert {int(row["rollout/seed"]) for row in csv.DictReader(file)} == {model.run_seed}
    before = global_states()
    loaded = REINFORCE.load(tmp_path / "model", env=SameEnv())
    # SB3 draws matrices of gSDE from PyTorch's
    n_compared = -1 if model.use_sde else None
    assert global_states()[:n_compared] == before[:n_compared]
    assert loaded.seed is None and loaded.run_seed == model.run_seed
    for one in (model, loaded):
        one.learn(60, reset_num_timesteps=False)
    assert same(snapshot(model), snapshot(loaded))
    model.logger.close()


def test_a_seed_that_is_given_later_takes_the_place_of_the_one_that_was_drawn(tmp_path: Path):
    model = make_unseeded()
    model.save(tmp_path / "model")
    model.set_random_seed(7)
    loaded = REINFORCE.load(tmp_path / "model", env=SameEnv(), seed=7)
    for one in (model, loaded):
        assert one.seed == one.run_seed == 7
        one.learn(60)
    assert same(snapshot(model), snapshot(loaded))


def test_models_without_a_seed_differ():
    first, second = make_unseeded(), make_unseeded()
    assert first.run_seed != second.run_seed
    assert not same(snapshot(first), snapshot(second))


def one_member(vec_env_class: type[DummyVecEnv] = DummyVecEnv) -> VecEnv:
    return vec_env_class([lambda: RandomLengthEnv(9)])


LIMITS = "will not be the same to the last bit"


@pytest.mark.parametrize(
    ("make_env", "seed", "expected"),
    [
        (one_member, 0, None),
        (lambda: VecCheckNan(one_member(EpisodeVecEnv)), 0, None),
        (lambda: VecCheckNan(one_member()), 0, "a DummyVecEnv does not seed each episode"),
        (one_member, None, "there is no seed for environments (weights and actions are those of seed={})"),
        (lambda: Simulators([[3]]), 0, "a Simulators does not seed each episode"),
        (
            lambda: Simulators([[3]]),
            None,
            "there is no seed for environments (weights and actions are those of seed={}), and a Simulators does not seed "
            "each episode",
        ),
    ],
    ids=["seeded", "seeded_wrapped", "plain_wrapped", "unseeded", "simulators", "simulators_unseeded"],
)
@pytest.mark.parametrize("verbose", [0, 1])
def test_training_says_once_if_it_cannot_be_repeated(
    make_env: Callable[[], VecEnv], seed: int | None, expected: str | None, verbose: int, capsys: pytest.CaptureFixture
):
    model = REINFORCE("MlpPolicy", make_env(), n_steps=6, seed=seed, verbose=verbose)
    assert LIMITS not in capsys.readouterr().out
    model.learn(6)
    model.learn(6, reset_num_timesteps=False)
    model.learn(6)
    lines = [line for line in capsys.readouterr().out.splitlines() if LIMITS in line]
    if expected is None or verbose == 0:
        assert lines == []
    else:
        assert [line.split(": ", 1)[1] for line in lines] == [expected.format(model.run_seed)]


def test_a_model_that_is_loaded_says_again_that_it_cannot_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture):
    REINFORCE("MlpPolicy", one_member(), n_steps=6, verbose=1).learn(6).save(tmp_path / "model")
    assert LIMITS in capsys.readouterr().out
    REINFORCE.load(tmp_path / "model", env=one_member()).learn(6)
    assert LIMITS in capsys.readouterr().out


# Random environments ---------------------------------------------------------------------------------------------------------


@st.composite
def random_spaces(draw: st.DrawFn) -> tuple[spaces.Space, spaces.Space]:
    vector = st.builds(lambda n: spaces.Box(-2, 2, (n,)), st.integers(1, 4))
    discrete = st.builds(spaces.Discrete, st.integers(1, 5))
    multi = st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 4), min_size=1, max_size=3))
    binary = st.builds(spaces.MultiBinary, st.integers(1, 4))
    simple = st.one_of(vector, discrete, multi, binary)
    dictionary = st.builds(spaces.Dict, st.dictionaries(st.sampled_from("abc"), simple, min_size=1))
    return draw(st.one_of(simple, dictionary)), draw(simple)


@pytest.mark.filterwarnings("error")
@settings(max_examples=40)
@given(
    random_spaces(),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from([*itertools.product(["linear", "quadratic", "random_features"], ADVANTAGES), (None, "monte_carlo")]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 20),
)
def test_random_environments_train_without_a_warning(
    spaces_: tuple, max_length: int, n_envs: int, critics: tuple, normalize: bool, bootstrap: bool, n_steps: int
):
    env = DummyVecEnv([lambda: RandomEnv(*spaces_, max_length) for _ in range(n_envs)])
    policy = "MultiInputPolicy" if isinstance(spaces_[0], spaces.Dict) else "MlpPolicy"
    kwargs: dict[str, Any] = dict(normalize_observations=normalize, bootstrap_timeouts=bootstrap)
    kwargs["baseline"], kwargs["advantage"] = critics
    model = REINFORCE(policy, env, n_steps=n_steps, seed=0, **kwargs).learn(5 * n_steps * n_envs)
    assert np.isfinite(weights(model)).all()
    assert model._n_updates >= 1


def test_training_goes_on_where_an_interrupt_has_left_pytorch_without_gradients():
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8, seed=0).learn(8)
    th.set_grad_enabled(False)
    try:
        model.learn(8, reset_num_timesteps=False)
    finally:
        th.set_grad_enabled(True)
    assert model._n_updates == 2


@pytest.mark.parametrize("policy", ["CnnPolicy", "MlpPolicy"])
def test_advantages_are_above_the_values_of_the_baseline_that_is_not_refitted_yet(policy: str):
    """A shared CNN brings the values along when it acts, a plain MLP does not: both are those of a pass over the batch."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    class Values(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.model.rollout_buffer
            with th.no_grad():
                expected = self.model.policy.predict_values(th.as_tensor(buffer.observations)).numpy().flatten()
            np.testing.assert_array_equal(buffer.advantages, buffer.returns - buffer.values)
            seen.append((buffer.values, expected))

    image = spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8)
    space = image if policy == "CnnPolicy" else spaces.Box(-1, 1, (3,))
    env = DummyVecEnv([lambda: RandomEnv(space, spaces.Discrete(3), 7)] * 2)
    REINFORCE(policy, env, n_steps=20, seed=0).learn(200, callback=Values())
    assert len(seen) > 2 and seen[-1][0].std() > 0
    for values, expected in seen:
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)
