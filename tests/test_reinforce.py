"""REINFORCE against the article's algorithm, its update, errors and interruptions of an update, seeds and defaults."""

import csv
import io
import itertools
import random
from collections.abc import Callable
from copy import deepcopy
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
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_reinforce import REINFORCE, MlpPolicy, natural_gradient, policies, reinforce, returns
from sb3_reinforce.baselines import LinearBaseline
from sb3_reinforce.natural_gradient import DAMPINGS, flatten
from tests.envs import RandomEnv, RandomLengthEnv, ScriptedEnv
from tests.rollouts import Do, state_of
from tests.runs.common import Batches, assert_same, assert_stepped_as_asked, divergence_of_scores, state

LANDER = "LunarLanderContinuous-v3"
VECTOR = spaces.Box(-1, 1, (3,))
ADVANTAGES: list[Any] = ["monte_carlo", "q", "advantage", "td"]
every_advantage = pytest.mark.parametrize("advantage", ADVANTAGES)


def pendulum(n_steps: int = 50) -> gym.Env:
    return gym.make("Pendulum-v1", max_episode_steps=n_steps)


class Rollouts(Batches):
    """Also keeps the gradient and the baseline after each update."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: list[np.ndarray] = []
        self.baselines: list[np.ndarray] = []

    def _on_rollout_start(self) -> None:
        if self.batches:
            self.after_update()

    def _on_training_end(self) -> None:
        self.after_update()

    def after_update(self) -> None:
        policy: Any = self.model.policy
        self.gradients.append(np.concatenate([p.grad.numpy().ravel().copy() for p in policy.parameters()]))
        if isinstance(policy.value_net, LinearBaseline):
            self.baselines.append(np.append(policy.value_net.weight.numpy(), policy.value_net.bias.numpy()))


# The article's algorithm -----------------------------------------------------------------------------------------------------

#: The settings of the article, except for the size of its batches
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
    policy_kwargs=dict(
        net_arch=[32, 32],
        activation_fn=nn.ReLU,
        ortho_init=False,
        log_std_init=0.0,
        optimizer_class=th.optim.Adam,
        optimizer_kwargs=dict(betas=(0.9, 0.999), eps=1e-8),
    ),
)


def least_squares(features: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Weights and intercept of scikit-learn's LinearRegression behind a StandardScaler."""
    mean, std = features.mean(axis=0), features.std(axis=0)
    std[std == 0] = np.inf
    slope = np.linalg.lstsq((features - mean) / std, returns - returns.mean(), rcond=1e-6)[0] / std
    return np.append(slope, returns.mean() - mean @ slope)


def with_actions(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """States, actions clipped to [-1, 1], their squares, and the products of states with both."""
    clipped = np.clip(actions, -1, 1)
    numbers = np.column_stack([clipped, clipped**2])
    products = [states[:, i] * numbers[:, j] for i in range(states.shape[1]) for j in range(numbers.shape[1])]
    return np.column_stack([states, numbers, *products])


class Article:
    """The article's algorithm as a plain loop, without code of this package."""

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
            if t in batch["starts"]:
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
def test_equals_the_articles_algorithm(advantage: Any):
    """Four updates in a row, from the same episodes."""
    rollouts = Rollouts()
    model = REINFORCE("MlpPolicy", LANDER, n_steps=500, n_episodes=None, seed=3, advantage=advantage, **ARTICLE)
    article = Article(model.policy, advantage)
    model.learn(2000, callback=rollouts)
    assert len(rollouts.batches) >= 4
    for batch, gradient, baseline in zip(rollouts.batches, rollouts.gradients, rollouts.baselines, strict=True):
        returns, advantages, expected_gradient, coefficients = article.learn(batch)
        np.testing.assert_allclose(batch["returns"], returns, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(batch["advantages"], advantages, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(baseline, coefficients, rtol=1e-5, atol=1e-5)


def test_algorithm_defaults():
    model: Any = REINFORCE("MlpPolicy", LANDER)
    assert (model.n_steps, model.n_episodes, model.gamma) == (1000, 5, 0.99)
    assert (model.target_kl, model.cg_max_steps, model.cg_damping) == ("auto", 15, "auto")
    assert (model.learning_rate, model.ent_coef, model.normalize_advantage) == (1e-3, 0.0, True)
    assert (model.baseline, model.baseline_memory) == ("random_features", 0.6)
    assert (model.bootstrap_timeouts, model.normalize_observations) == (False, True)
    assert (model.advantage, model.policy.action_value_net) == ("monte_carlo", None)
    # A policy alone has the same defaults
    policy = MlpPolicy(model.observation_space, model.action_space, model.lr_schedule)
    own, of_model = (one._get_constructor_parameters() for one in (policy, model.policy))
    for name in ("baseline", "baseline_memory", "gamma", "normalize_observations"):
        assert own[name] == of_model[name] == getattr(model, name)


# The update ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "target_kl", "advantage"),
    [("vector", 0.01, "advantage"), ("image", None, "monte_carlo"), ("dictionary", None, "monte_carlo")],
)
def test_a_batch_in_chunks_gives_the_same_update(
    space: str, target_kl: float | None, advantage: Any, monkeypatch: pytest.MonkeyPatch
):
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
    monkeypatch.setattr(policies, "CHUNK", 7 * spaces.flatdim(observation_space))
    np.testing.assert_allclose(learn(), whole, rtol=1e-3, atol=1e-4)


class EarlierFits(BaseCallback):
    """Compares the critics with twins that are fitted to the batches before, in features of the policy at that time."""

    n_checked = 0

    def _on_step(self) -> bool:
        return True

    def _features(self) -> Any:
        with th.no_grad():
            policy: Any = self.model.policy
            return policy.baseline_features(policy.evaluate_observations(self.observations)[1], self.n_steps)

    def _on_rollout_start(self) -> None:
        policy: Any = self.model.policy
        if self.num_timesteps == 0:
            self.twins = [deepcopy(policy.value_net), deepcopy(policy.action_value_net)]
            return
        features = self._features()
        self.twins[0].fit(features.numpy(), self.returns)
        if self.twins[1] is not None:
            self.twins[1].fit(features, self.actions, self.returns)

    def _on_rollout_end(self) -> None:
        buffer: Any = self.model.rollout_buffer
        (batch,) = buffer.get()
        # Tensors share the memory of the buffer
        self.observations, self.actions = deepcopy(batch.observations), batch.actions.clone()
        self.n_steps = th.as_tensor(returns.steps_since_episode_start(buffer.episode_starts))
        self.returns, features = buffer.returns.copy(), self._features()
        found, expected = [buffer.values], [self.twins[0].predict(features)]
        if self.twins[1] is not None:
            found.append(buffer.action_values)
            expected.append(self.twins[1].predict(features, self.actions))
        for one, other in zip(found, expected, strict=True):
            assert (np.ptp(one) > 0) == (self.model._n_updates > 0)  # type: ignore[attr-defined]
            np.testing.assert_allclose(one, other.flatten(), rtol=1e-3, atol=1e-3)
        self.n_checked += 1


@pytest.mark.parametrize(
    ("policy", "action_space", "kwargs"),
    [
        ("MlpPolicy", spaces.Box(-1, 1, (2,)), dict(advantage="advantage")),
        ("MlpPolicy", spaces.Discrete(3), dict(normalize_observations=False, baseline="linear")),
        ("CnnPolicy", spaces.Discrete(3), dict(advantage="q")),
        ("CnnPolicy", spaces.Discrete(3), dict(policy_kwargs=dict(share_features_extractor=False))),
        (ActorCriticPolicy, spaces.Discrete(3), dict(advantage="advantage")),
    ],
)
def test_critics_are_used_before_they_are_fitted_to_a_batch(policy: Any, action_space: spaces.Space, kwargs: dict[str, Any]):
    """They are 0 for the first batch. Features of a CNN and observation statistics change with each update."""
    space = spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8) if policy == "CnnPolicy" else VECTOR
    env = DummyVecEnv([lambda: RandomEnv(space, action_space, 7)] * 2)
    fits = EarlierFits()
    REINFORCE(policy, env, n_steps=20, seed=0, **kwargs).learn(160, callback=fits)
    assert fits.n_checked >= 3


@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_advantages_are_normalized_on_request(normalize_advantage: bool):
    kwargs: dict[str, Any] = dict(baseline=None, normalize_advantage=normalize_advantage)
    buffer = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=100, **kwargs).learn(300).rollout_buffer
    if normalize_advantage:
        assert (buffer.advantages.mean(), buffer.advantages.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1))
    else:
        np.testing.assert_array_equal(buffer.advantages, buffer.returns)


class EqualRewards(ScriptedEnv):
    def step(self, action: np.ndarray) -> Any:
        observation, _, *rest = super().step(action)
        return observation, 1.0, *rest


@pytest.mark.parametrize("target_kl", [None, 0.01])
def test_equal_returns_do_not_change_the_policy(target_kl: float | None):
    for n_steps in (1, 50):  # a single transition, too
        kwargs: dict[str, Any] = dict(n_steps=n_steps, n_episodes=None, normalize_observations=False)
        model = REINFORCE("MlpPolicy", EqualRewards([1]), target_kl=target_kl, seed=0, **kwargs)
        before = model.policy.parameters_to_vector()
        model.learn(3 * n_steps)
        np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)
        np.testing.assert_allclose(model.policy.value_net.bias, [1.0])
        assert model.logger.name_to_value["train/kl_divergence_loss"] == 0


@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_advantages_that_are_rounding_teach_nothing(scale: float, normalize_advantage: bool):
    """All actions are equal, and the baseline knows the returns, but for rounding. No step follows the entropy alone."""

    class Indifferent(ScriptedEnv):
        def step(self, action: Any) -> Any:
            observation, _, *rest = super().step(action)
            return observation, scale * self.steps, *rest

    kwargs: dict[str, Any] = dict(n_steps=30, seed=0, baseline="linear", normalize_observations=False, ent_coef=0.01)
    model = REINFORCE("MlpPolicy", Indifferent([1]), normalize_advantage=normalize_advantage, **kwargs).learn(1)
    before = model.policy.parameters_to_vector()
    with pytest.warns(UserWarning, match="A batch taught nothing: its advantages are equal"):
        model.learn(1, reset_num_timesteps=False)
    np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)
    assert model._n_updates == 2


def test_observation_statistics_are_updated_once_per_batch():
    model = REINFORCE("MlpPolicy", LANDER, n_steps=300, seed=0)
    normalizer, seen = model.policy.observation_normalizer, []
    model.learn(300, callback=lambda *_: seen.append(normalizer.statistics()[0].numpy().copy()) or True)
    assert not np.any(seen)
    buffer: Any = model.rollout_buffer
    np.testing.assert_allclose(normalizer.statistics()[0], buffer.observations.mean(0, np.float64), atol=1e-9)
    # The baseline is fitted with the new statistics: least squares with an intercept fit the mean
    n_steps = th.as_tensor(returns.steps_since_episode_start(buffer.episode_starts))
    values = model.policy.predict_values(th.as_tensor(buffer.observations), n_steps)
    np.testing.assert_allclose(values.mean().item(), buffer.returns.mean(), rtol=1e-4)


@pytest.mark.parametrize("target_kl", [None, 0.02])
def test_the_logged_divergence_is_that_of_the_new_policy_from_the_one_that_sampled(target_kl: float | None):
    """It includes what new statistics of the observations change."""
    model, old = REINFORCE("MlpPolicy", LANDER, n_steps=300, n_episodes=None, target_kl=target_kl, seed=0), []
    for _ in range(3):
        model.learn(1, Do("on_rollout_end", lambda model: old.append(deepcopy(model.policy))), reset_num_timesteps=False)
        states = th.as_tensor(model.rollout_buffer.observations)
        before, after = (policy.get_distribution(states).distribution for policy in (old[-1], model.policy))
        expected = th.distributions.kl_divergence(before, after).sum(dim=1).mean().item()
        assert model.logger.name_to_value["train/kl_divergence_loss"] == pytest.approx(expected, rel=1e-3)
        # The step itself begins at the sampling policy with the new statistics
        old[-1].observation_normalizer.load_state_dict(model.policy.observation_normalizer.state_dict())
        start = old[-1].get_distribution(states).distribution
        step = th.distributions.kl_divergence(start, after).sum(dim=1).mean().item()
        assert target_kl is None or step == pytest.approx(target_kl, rel=2e-3)


@every_advantage
def test_the_errors_of_the_critics_before_the_fit_are_logged(advantage: Any):
    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=50, seed=0, advantage=advantage).learn(200)
    buffer, logged = model.rollout_buffer, model.logger.name_to_value
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


def test_hooks_see_the_gradient_of_the_loss_and_each_step():
    """As experiment trackers do, and without an effect on the training."""
    models = [REINFORCE("MlpPolicy", "CartPole-v1", seed=0) for _ in range(2)]
    norms: list[float] = []
    calls: list[Any] = []
    models[0].policy.action_net.weight.register_hook(lambda gradient: norms.append(gradient.norm().item()))
    models[0].policy.register_forward_hook(lambda *arguments: calls.append(arguments))
    for model in models:
        model.learn(1)
    # One gradient from each half of the batch
    assert len(norms) == 2 and len(calls) == models[0].num_timesteps
    np.testing.assert_allclose(*(model.policy.parameters_to_vector() for model in models), atol=1e-5)


# The step --------------------------------------------------------------------------------------------------------------------


DISCRETE = spaces.Discrete(3)


def dense_fisher(policy: Any, states: th.Tensor) -> np.ndarray:
    """By products with the unit vectors."""
    product = natural_gradient.fisher_vector_product(policy, states, th.ones(len(states)))
    return np.array([product(row).numpy() for row in th.eye(sum(parameter.numel() for parameter in policy.parameters()))])


@pytest.mark.parametrize("damping", [1e-2, 1e9])
def test_the_step_is_along_the_damped_natural_gradient(damping: float):
    """By a dense solve; much damping gives the plain gradient."""
    rollouts = Rollouts()
    env = RandomEnv(VECTOR, DISCRETE, 9)
    kwargs: dict[str, Any] = dict(n_steps=20, seed=0, normalize_observations=False, policy_kwargs=dict(net_arch=[4]))
    model = REINFORCE("MlpPolicy", env, target_kl=1e-3, cg_damping=damping, cg_max_steps=100, **kwargs)
    # The last layer of an untrained policy is almost 0
    with th.no_grad():
        model.policy.action_net.weight.normal_()
    before, policy = model.policy.parameters_to_vector(), deepcopy(model.policy)
    model.learn(1, callback=rollouts)
    step = (model.policy.parameters_to_vector() - before).astype(np.float64)
    (gradient,) = rollouts.gradients
    fisher = dense_fisher(policy, th.as_tensor(rollouts.batches[0]["observations"]))
    natural = -np.linalg.solve(fisher + damping * np.eye(len(fisher)), gradient.astype(np.float64))

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    assert cosine(step, natural) > 0.999
    assert (cosine(natural, -gradient) > 0.999) == (damping == 1e9)


def test_the_natural_step_uses_neither_learning_rate_nor_optimizer():
    def learn(**kwargs: Any) -> REINFORCE:
        return REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=50, seed=0, **kwargs).learn(200)

    expected = learn()
    assert not expected.policy.optimizer.state_dict()["state"]
    sgd = dict(optimizer_class=th.optim.SGD, optimizer_kwargs=dict(weight_decay=10.0, momentum=0.9))
    for kwargs in (dict(learning_rate=0.0), dict(learning_rate=1e9), dict(policy_kwargs=sgd)):
        np.testing.assert_array_equal(state_of(learn(**kwargs)), state_of(expected))


@pytest.mark.parametrize("optimizer_class", [th.optim.Adam, th.optim.SGD])
def test_without_target_kl_the_optimizer_steps(optimizer_class: type[th.optim.Optimizer]):
    rollouts = Rollouts()
    policy_kwargs = dict(optimizer_class=optimizer_class)
    kwargs: dict[str, Any] = dict(n_steps=50, learning_rate=0.02, target_kl=None, policy_kwargs=policy_kwargs, seed=0)
    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), **kwargs)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in model.policy.parameters()]
    optimizer = optimizer_class(parameters, lr=0.02, **model.policy.optimizer_kwargs)  # type: ignore[call-arg]
    model.learn(200, callback=rollouts)
    assert len(rollouts.gradients) >= 4
    for gradient in rollouts.gradients:
        parts = np.split(gradient, np.cumsum([parameter.numel() for parameter in parameters])[:-1])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = th.as_tensor(part).view_as(parameter)
        optimizer.step()
    assert all(map(th.equal, parameters, model.policy.parameters()))


@pytest.mark.parametrize("log_std_init", [-16.5, 16.5])
def test_a_standard_deviation_stays_within_the_rounding_of_float32(log_std_init: float):
    env = RandomEnv(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), 5)
    model = REINFORCE("MlpPolicy", env, n_steps=20, seed=0, policy_kwargs=dict(log_std_init=log_std_init)).learn(50)
    assert np.exp(-np.abs(model.policy.log_std.detach().numpy())).min() > 0.99 * np.finfo(np.float32).eps


# The damping -----------------------------------------------------------------------------------------------------------------


class SomeRewards(RandomLengthEnv):
    """Every other episode has no rewards."""

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, reward * (self.episode % 2), *rest


def test_the_halves_of_a_batch_are_every_other_episode(monkeypatch: pytest.MonkeyPatch):
    """Their gradients choose damping and length, which are logged."""
    results, original = [np.zeros((2, len(DAMPINGS)))], natural_gradient.natural_direction

    def checked(product: Any, parts: Any, dampings: np.ndarray, scores: np.ndarray, max_steps: int) -> Any:
        (batch,), starts = model.rollout_buffer.get(), model.rollout_buffer.episode_starts
        for parity, gradient in enumerate(parts, start=1):
            distribution = model.policy.get_distribution(batch.observations)
            log_prob = returns.log_prob(distribution, batch.actions, model.action_space)
            loss = -(log_prob * batch.advantages)[np.cumsum(starts) % 2 == parity % 2].sum() / len(starts)
            expected = flatten(th.autograd.grad(loss, [*model.policy.parameters()]))
            th.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(scores, results[-1])
        direction, chosen, new_scores = original(product, parts, dampings, scores, max_steps)
        results.append(new_scores)
        return direction, chosen, new_scores

    monkeypatch.setattr(natural_gradient, "natural_direction", checked)
    model = REINFORCE("MlpPolicy", DummyVecEnv([lambda: RandomLengthEnv(9)] * 2), n_steps=40, seed=0)
    for n in range(1, 4):
        model.learn(1, reset_num_timesteps=False)
        np.testing.assert_array_equal(model.damping_scores, results[n])
        judged, promised = model.damping_scores
        logged, chosen = model.logger.name_to_value, judged.argmax()
        assert logged["train/cg_damping"] == DAMPINGS[chosen]
        assert logged["train/gradient_signal"] == judged[chosen] / promised[chosen]
        assert_stepped_as_asked(model)


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4))


#: Arguments of batches that cannot choose the damping
WITHOUT_CHOICE: dict[str, dict[str, Any]] = {
    "one episode": dict(n_steps=None, n_episodes=1),
    "no signal in a half": dict(env=SomeRewards, normalize_advantage=False, baseline=None),
    "many parameters": {},
    "batch normalization": dict(policy_kwargs=dict(net_arch=[4], activation_fn=with_batch_norm)),
}


@pytest.mark.parametrize("name", [*WITHOUT_CHOICE, "choice"])
def test_a_batch_that_cannot_choose_the_damping_uses_the_choice_of_earlier_ones(name: str, monkeypatch: pytest.MonkeyPatch):
    kwargs: dict[str, Any] = dict(env=RandomLengthEnv, n_steps=30, seed=0, policy_kwargs=dict(net_arch=[4]))
    kwargs |= WITHOUT_CHOICE.get(name, {})
    if name == "many parameters":
        monkeypatch.setattr(reinforce, "_MAX_PARAMETERS", 10)
    env, scores = kwargs.pop("env"), np.stack([-((DAMPINGS - 0.3) ** 2), np.ones(len(DAMPINGS))])
    scores[0, 3] = 0.5
    auto = REINFORCE("MlpPolicy", env(9), **kwargs)
    auto.damping_scores = scores
    auto.learn(1)
    given = REINFORCE("MlpPolicy", env(9), cg_damping=0.3, target_kl=divergence_of_scores(auto), **kwargs).learn(1)
    assert np.array_equal(auto.damping_scores, scores) == (name != "choice")
    if name != "choice":
        np.testing.assert_allclose(state_of(auto), state_of(given), rtol=1e-3, atol=1e-5)


# Steps that are refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_kl", [None, 0.01])
def test_a_gradient_that_is_not_finite_is_not_applied(target_kl: float | None):
    env = ScriptedEnv([4], spoil=lambda what, episode, step, value: 3e38 if what == "reward" else value)
    kwargs: dict[str, Any] = dict(normalize_advantage=False, baseline=None, target_kl=target_kl)
    model = REINFORCE("MlpPolicy", env, n_steps=8, seed=0, **kwargs)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Update 1 was undone\. The gradient is not finite: scale down rewards"):
        model.learn(8)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("env", "rate", "reason"),
    [(ScriptedEnv([4]), 1e30, ""), (RandomEnv(VECTOR, VECTOR, 4), 1e3, "divergence .* is infinite: take shorter steps")],
)
def test_a_step_that_breaks_the_policy_is_undone(env: gym.Env, rate: float, reason: str):
    model = REINFORCE("MlpPolicy", env, n_steps=8, learning_rate=rate, target_kl=None, seed=0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"Update 1 was undone\. .*{reason}"):
        model.learn(8)
    assert_same(snapshot(model), before)
    model.learning_rate = 1e-3
    model._setup_lr_schedule()
    assert model.learn(16)._n_updates >= 1


@pytest.mark.parametrize("validate", [True, False])
def test_a_direction_that_is_not_finite_is_not_taken(validate: bool, monkeypatch: pytest.MonkeyPatch):
    """Whether PyTorch validates its distributions or not."""
    infinite = lambda space, damping: space.basis[0] * np.inf  # noqa: E731
    monkeypatch.setattr(natural_gradient.KrylovSpace, "direction", infinite)
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", validate)
    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=20, seed=0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Update 1 was undone\. (The divergence .* is infinite|Expected parameter)"):
        model.learn(1)
    assert_same(snapshot(model), before)


class StudentT(MlpPolicy):
    """Its divergence has no closed form in PyTorch."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        distribution = DiagGaussianDistribution(self.action_space.shape[0])  # type: ignore[index]
        distribution.distribution = th.distributions.StudentT(5, self.action_net(latent_pi), self.log_std.exp())  # type: ignore[assignment]
        distribution.log_prob = lambda actions: distribution.distribution.log_prob(actions).sum(dim=1)  # type: ignore[method-assign]
        return distribution


def test_a_distribution_without_a_divergence_needs_target_kl_none():
    model = REINFORCE(StudentT, pendulum(), n_steps=50)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"The policy has no natural gradient .*: set target_kl=None"):
        model.learn(1)
    assert_same(snapshot(model), before)
    model = REINFORCE(StudentT, pendulum(), n_steps=50, target_kl=None).learn(1)
    assert model._n_updates == 1
    assert "train/kl_divergence_loss" not in model.logger.name_to_value


class Bag(BaseFeaturesExtractor):
    """Has no second derivative."""

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space, 8)
        self.bag = th.nn.EmbeddingBag(4, 8)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.bag((observations > 0).long())


def test_a_policy_without_second_derivatives_needs_target_kl_none():
    kwargs: dict[str, Any] = dict(policy_kwargs=dict(features_extractor_class=Bag), seed=0)
    with pytest.raises(ValueError, match=r"no natural gradient \(.*_embedding_bag_backward.*\): set target_kl=None"):
        REINFORCE("MlpPolicy", "CartPole-v1", **kwargs).learn(1)
    assert REINFORCE("MlpPolicy", "CartPole-v1", target_kl=None, **kwargs).learn(1)._n_updates == 1


@pytest.mark.parametrize("value", [np.nan, -1.0])
@pytest.mark.parametrize("name", ["learning_rate", "target_kl"])
def test_an_invalid_value_of_a_schedule_is_refused_before_the_step(name: str, value: float):
    kwargs: dict[str, Any] = dict(n_steps=8, n_episodes=None, seed=0, target_kl=None)
    with pytest.raises(ValueError, match=rf"{name} must be finite .* returns {value} at progress_remaining=1.0"):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), **kwargs | {name: lambda progress: value}).learn(8)
    schedule = lambda progress: 0.1 if progress == 1 else value  # noqa: E731
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), **kwargs | {name: schedule}).learn(8)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{name} must be finite .* returns {value} at progress_remaining=0.5"):
        model.learn(8, reset_num_timesteps=False)
    assert_same(snapshot(model), before)


def test_a_target_kl_of_0_fits_the_baseline_and_leaves_the_policy():
    model = REINFORCE("MlpPolicy", RandomLengthEnv(9), n_steps=20, target_kl=lambda progress: 0.0, seed=0)
    before = model.policy.parameters_to_vector()
    model.learn(1)
    np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)
    assert model.policy.value_net.weight.any()


def test_training_enables_gradients():
    """An interrupt may have left PyTorch without them."""
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8, seed=0).learn(8)
    th.set_grad_enabled(False)
    try:
        model.learn(8, reset_num_timesteps=False)
    finally:
        th.set_grad_enabled(True)
    assert model._n_updates == 2


# All or nothing --------------------------------------------------------------------------------------------------------------


def snapshot(model: REINFORCE) -> list[Any]:
    return [state(model), model._n_iterations]


def once(error: BaseException, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a function raise at the end of its second call."""
    function, n_calls = getattr(owner, name), 0

    def raising(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        result = function(*args, **kwargs)
        if n_calls == 2:
            raise error
        return result

    monkeypatch.setattr(owner, name, raising)


#: Places of train() and of the rollout, in the order in which they are reached
POINTS: dict[str, Callable[[REINFORCE], tuple[Any, str]]] = {
    "step of the environment": lambda model: (model.get_env(), "step"),
    "loss": lambda model: (returns, "policy_gradient_loss"),
    "step of the optimizer": lambda model: (model.policy.optimizer, "step"),
    "step": lambda model: (natural_gradient, "assign"),
    "divergence": lambda model: (returns, "kl_divergence"),
    "statistics": lambda model: (model.policy.observation_normalizer, "update"),
    "baseline": lambda model: (model.policy.value_net, "fit"),
    "action values": lambda model: (model.policy.action_value_net, "fit"),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("mine")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("point", POINTS)
def test_an_error_leaves_the_model_as_before_and_training_can_be_continued(
    point: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
):
    """In this process, and from a file that is saved after the error."""

    def make_env() -> DummyVecEnv:
        return DummyVecEnv([lambda: RandomLengthEnv(9) for _ in range(2)])

    def make() -> REINFORCE:
        kwargs: dict[str, Any] = dict(learning_rate=0.03, seed=0, policy_kwargs=dict(net_arch=[4]))
        kwargs["target_kl"] = None if point == "step of the optimizer" else 0.01
        kwargs["advantage"] = "advantage" if point == "action values" else "monte_carlo"
        return REINFORCE("MlpPolicy", make_env(), n_steps=20, **kwargs)

    def learn_up_to(model: REINFORCE, n_updates: int) -> REINFORCE:
        snapshots.clear()
        while model._n_updates < n_updates:
            snapshots.append(snapshot(model))
            model.learn(1, reset_num_timesteps=False)
        return model

    snapshots: list[Any] = []
    whole, model, file = learn_up_to(make(), 4), make(), io.BytesIO()
    once(error, *POINTS[point](model), monkeypatch)
    with pytest.raises(type(error)):
        learn_up_to(model, 4)
    assert model._n_updates < 2
    assert_same(snapshot(model), snapshots[-1])
    assert not any(module.training for module in model.policy.modules())
    model.save(file)
    for one in (model, REINFORCE.load(file, env=make_env())):
        assert_same(snapshot(learn_up_to(one, 4)), snapshot(whole))


# Seeds -----------------------------------------------------------------------------------------------------------------------


class SameEnv(ScriptedEnv):
    """All episodes are the same; rewards depend on the actions."""

    def __init__(self) -> None:
        super().__init__([5])

    def _observation(self) -> Any:
        return np.array([0, 1, self.steps], dtype=np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        observation, _, *rest = super().step(action)
        return observation, float(np.sum(action)), *rest


#: Arguments of models without a seed
UNSEEDED: dict[str, dict[str, Any]] = {
    "default": {},
    "gsde": dict(use_sde=True, sde_sample_freq=2),
    "dropout": dict(
        policy=ActorCriticPolicy,
        policy_kwargs=dict(net_arch=[8], activation_fn=lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.3))),
    ),
}
unseeded = pytest.mark.parametrize("kwargs", [pytest.param(kwargs, id=name) for name, kwargs in UNSEEDED.items()])


def make_unseeded(**kwargs: Any) -> REINFORCE:
    return REINFORCE(env=SameEnv(), **(dict(policy="MlpPolicy", n_steps=20) | kwargs))


def global_states() -> list[Any]:
    """States of the global generators of Python, NumPy and PyTorch."""
    name, keys, *rest = np.random.get_state()
    return [random.getstate(), name, keys.tolist(), rest, th.get_rng_state().tolist()]


@unseeded
def test_a_model_without_a_seed_draws_one_from_numpys_generator_and_uses_no_other(kwargs: dict[str, Any], tmp_path: Path):
    np.random.seed(5)
    expected = int(np.random.randint(2**31))
    after_one_draw = global_states()
    np.random.seed(5)
    model = make_unseeded(**kwargs)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(60).save(tmp_path / "model")
    assert model.seed is None and model.run_seed == expected
    assert global_states() == after_one_draw
    with open(tmp_path / "progress.csv", newline="") as file:
        assert {int(row["rollout/seed"]) for row in csv.DictReader(file)} == {expected}
    loaded = REINFORCE.load(tmp_path / "model", env=SameEnv())
    # SB3 draws gSDE matrices from PyTorch's
    n_compared = -1 if model.use_sde else None
    assert global_states()[:n_compared] == after_one_draw[:n_compared]
    assert loaded.seed is None and loaded.run_seed == expected
    for one in (model, loaded):
        one.learn(60, reset_num_timesteps=False)
    assert_same(snapshot(model), snapshot(loaded))
    model.logger.close()


@unseeded
def test_a_drawn_seed_gives_the_weights_and_actions_of_a_given_one(kwargs: dict[str, Any]):
    drawn = make_unseeded(**kwargs)
    given, other = (make_unseeded(seed=drawn.run_seed + i, **kwargs) for i in range(2))
    for _ in range(2):
        assert_same(snapshot(drawn), snapshot(given))
        assert not np.array_equal(state_of(drawn), state_of(other))
        for model in (drawn, given, other):
            model.learn(60, reset_num_timesteps=False)
        np.testing.assert_array_equal(drawn.rollout_buffer.actions, given.rollout_buffer.actions)


def test_a_later_seed_replaces_a_drawn_one(tmp_path: Path):
    model = make_unseeded()
    model.save(tmp_path / "model")
    model.set_random_seed(7)
    loaded = REINFORCE.load(tmp_path / "model", env=SameEnv(), seed=7)
    for one in (model, loaded):
        assert one.seed == one.run_seed == 7
        one.learn(60)
    assert_same(snapshot(model), snapshot(loaded))


# Random environments ---------------------------------------------------------------------------------------------------------

simple_spaces = st.one_of(
    st.builds(lambda n: spaces.Box(-2, 2, (n,)), st.integers(1, 4)),
    st.builds(spaces.Discrete, st.integers(1, 5)),
    st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 4), min_size=1, max_size=3)),
    st.builds(spaces.MultiBinary, st.integers(1, 4)),
)


@pytest.mark.filterwarnings("error", "ignore:A batch taught nothing")
@settings(max_examples=20)
@given(
    st.one_of(simple_spaces, st.builds(spaces.Dict, st.dictionaries(st.sampled_from("abc"), simple_spaces, min_size=1))),
    simple_spaces,
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from([*itertools.product(["linear", "random_features"], ADVANTAGES), (None, "monte_carlo")]),
    st.integers(1, 20),
)
def test_random_environments_train_without_warnings(
    observation_space: Any, action_space: Any, max_length: int, n_envs: int, critics: tuple, n_steps: int
):
    env = DummyVecEnv([lambda: RandomEnv(observation_space, action_space, max_length) for _ in range(n_envs)])
    policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    model = REINFORCE(policy, env, n_steps=n_steps, n_episodes=None, seed=0, baseline=critics[0], advantage=critics[1])
    model.learn(5 * n_steps * n_envs)
    assert np.isfinite(state_of(model)).all() and model._n_updates >= 1
