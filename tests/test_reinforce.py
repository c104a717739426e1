"""The algorithm: against the article's, written out once more; its update; what interrupts it; its seeds; its defaults."""

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
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

import sb3_reinforce
from sb3_reinforce import REINFORCE, MlpPolicy, policies, reinforce
from sb3_reinforce.baselines import LinearBaseline
from tests.envs import RandomEnv, RandomLengthEnv, ScriptedEnv

LANDER = "LunarLanderContinuous-v3"
VECTOR = spaces.Box(-1, 1, (3,))


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
    bounds_coef=0.0,
    target_kl=None,
    baseline="linear",
    baseline_memory=0.0,
    normalize_observations=False,
    policy_kwargs=dict(net_arch=[32, 32], ortho_init=False, log_std_init=0.0),
)


class Article:
    """The article's algorithm as a plain loop, with none of the code of this package."""

    def __init__(self, policy: Any):
        self.mean = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        mine = [self.mean[0], self.mean[2], self.mean[4]]
        theirs = [policy.mlp_extractor.policy_net[0], policy.mlp_extractor.policy_net[2], policy.action_net]
        for layer, source in zip(mine, theirs, strict=True):
            layer.load_state_dict(source.state_dict())
        self.log_std = nn.Parameter(th.zeros(2))
        self.parameters = [self.log_std, *self.mean.parameters()]
        self.optimizer = th.optim.Adam(self.parameters, lr=1e-3)
        self.coefficients = np.zeros(9)

    def learn(self, batch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        states, actions = batch["observations"], batch["actions"]
        returns = np.zeros(len(states))
        running = 0.0
        for t in reversed(range(len(states))):
            running = float(batch["rewards"][t]) + 0.97 * running
            returns[t] = running
            if batch["episode_starts"][t]:
                running = 0.0
        design = np.column_stack([states.astype(np.float64), np.ones(len(states))])
        advantages = returns - design @ self.coefficients
        normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        mean = self.mean(th.as_tensor(states))
        squares = (th.as_tensor(actions) - mean) ** 2 / (2 * th.exp(2 * self.log_std))
        log_prob = (-squares - self.log_std - 0.5 * np.log(2 * np.pi)).sum(dim=1)
        loss = -(log_prob * th.as_tensor(normalized, dtype=th.float32)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        gradient = np.concatenate([parameter.grad.numpy().ravel().copy() for parameter in self.parameters])  # type: ignore[union-attr]

        # Least squares around the means, as scikit-learn's LinearRegression does it
        slope = np.linalg.lstsq(design[:, :8] - design[:, :8].mean(0), returns - returns.mean(), rcond=None)[0]
        self.coefficients = np.append(slope, returns.mean() - design[:, :8].mean(0) @ slope)
        return returns, advantages, gradient, self.coefficients


def test_is_the_articles_algorithm():
    """Both see the same episodes; four batches in a row, so that every later step rests on the earlier ones."""
    rollouts = Rollouts()
    model = REINFORCE("MlpPolicy", LANDER, n_steps=500, seed=3, **ARTICLE)
    article = Article(model.policy)
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
    assert (model.n_steps, model.n_episodes, model.gamma) == (2000, None, 0.99)
    assert model.learning_rate == "lin_5e-3"
    np.testing.assert_allclose([model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)], [5e-3, 2.5e-3, 0])
    assert (model.baseline, model.baseline_memory, model.normalize_advantage) == ("random_features", 0.85, True)
    assert (model.bootstrap_timeouts, model.normalize_observations) == (True, True)
    assert (model.ent_coef, model.bounds_coef, model.max_grad_norm, model.target_kl) == (0.0, 0.1, None, 0.01)
    # One default for discrete actions, another for Gaussian ones; a given value is kept
    for space in (spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)):
        assert REINFORCE("MlpPolicy", RandomEnv(VECTOR, space, 9)).ent_coef == 0.03
    assert REINFORCE("MlpPolicy", "CartPole-v1", ent_coef=0.0).ent_coef == 0.0
    # A policy that is made without the algorithm is the same
    for name in ("baseline", "baseline_memory", "normalize_observations"):
        assert signature(MlpPolicy).parameters[name].default == getattr(model, name) == getattr(model.policy, name)


# The update ------------------------------------------------------------------------------------------------------------------


def cartpole_gradient(**kwargs: Any) -> np.ndarray:
    rollouts = Rollouts()
    REINFORCE("MlpPolicy", "CartPole-v1", n_steps=100, seed=0, baseline=None, **kwargs).learn(100, callback=rollouts)
    return rollouts.gradients[0]


@pytest.mark.parametrize("space", ["vector", "image", "dictionary"])
def test_a_batch_in_chunks_is_the_same_as_all_at_once(space: str, monkeypatch: pytest.MonkeyPatch):
    image = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)
    policy, observation_space = {
        "vector": ("MlpPolicy", VECTOR),
        "image": ("CnnPolicy", image),
        "dictionary": ("MultiInputPolicy", spaces.Dict(image=image, vector=VECTOR)),
    }[space]

    def learn() -> np.ndarray:
        env = RandomEnv(observation_space, spaces.Discrete(3), 8)
        return REINFORCE(policy, env, n_steps=30, seed=0, ent_coef=0.1).learn(90).policy.parameters_to_vector()

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
    kwargs: dict[str, Any] = dict(n_steps=30, learning_rate=1e-3, seed=0, bootstrap_timeouts=False)
    kwargs |= dict(normalize_observations=normalize_observations, policy_kwargs=policy_kwargs)
    check = Check()
    REINFORCE("MultiInputPolicy", env, **kwargs).learn(120, callback=check)
    assert len(check.batches) >= 4 and np.ptp(check.batches[-1].old_values.numpy()) > 0


def test_max_grad_norm_clips_the_gradient():
    free, clipped = cartpole_gradient(), cartpole_gradient(max_grad_norm=1e-3)
    np.testing.assert_allclose(clipped, free * 1e-3 / np.linalg.norm(free), rtol=1e-4, atol=1e-9)


def test_advantages_are_normalized_only_if_asked_for():
    plain, normalized = cartpole_gradient(normalize_advantage=False, ent_coef=0.0), cartpole_gradient(ent_coef=0.0)
    assert np.linalg.norm(plain) > 5 * np.linalg.norm(normalized)


def test_the_entropy_bonus_raises_the_entropy():
    def entropy_loss(ent_coef: float) -> float:
        kwargs: dict[str, Any] = dict(n_steps=200, learning_rate=1e-2, seed=0)
        model = REINFORCE("MlpPolicy", pendulum(), ent_coef=ent_coef, **kwargs).learn(3000)
        return model.logger.name_to_value["train/entropy_loss"]

    assert entropy_loss(1.0) < entropy_loss(0.0) - 0.05


@pytest.mark.parametrize("chunk", [2_000_000, 640])
def test_means_beyond_the_bounds_are_part_of_the_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch):
    """Against the derivative of the penalty, written out: the means are a bias, each element of which is 3 too high."""
    monkeypatch.setattr(policies, "_CHUNK", chunk)

    def gradient(bounds_coef: float) -> np.ndarray:
        rollouts = Rollouts()
        low, high = np.array([[-2, -np.inf], [4, 1]], np.float32)
        env = RandomEnv(VECTOR, spaces.Box(low, high), 9)
        model = REINFORCE("MlpPolicy", env, n_steps=64, seed=0, bounds_coef=bounds_coef)
        with th.no_grad():
            model.policy.action_net.weight.zero_()
            model.policy.action_net.bias.copy_(th.tensor([7.0, 4.0]))
        model.learn(64, callback=rollouts)
        # (3 / 3)^2, and nothing for the other, which has no range
        assert model.logger.name_to_value["train/bounds_loss"] == pytest.approx(1.0)
        names = [name for name, _ in model.policy.named_parameters()]
        sizes = [parameter.numel() for parameter in model.policy.parameters()]
        return np.split(rollouts.gradients[0], np.cumsum(sizes)[:-1])[names.index("action_net.bias")]

    np.testing.assert_allclose(gradient(0.5) - gradient(0.0), [0.5 * 2 * 3 / 3**2, 0], rtol=1e-4, atol=1e-6)


class EqualRewards(ScriptedEnv):
    def step(self, action: np.ndarray) -> Any:
        observation, _, *rest = super().step(action)
        return observation, 1.0, *rest


def test_a_policy_stuck_beyond_the_bounds_comes_back():
    """Equal returns, as where every sample is clipped to the same action: nothing but the penalty moves it."""

    def excess(**kwargs: Any) -> float:
        model = REINFORCE("MlpPolicy", EqualRewards([1]), n_steps=10, seed=0, learning_rate=0.03, **kwargs)
        with th.no_grad():
            model.policy.action_net.bias.fill_(-4.0)
        model.learn(1200)
        return model.logger.name_to_value["train/bounds_loss"]

    assert excess(bounds_coef=0.0) > 2 * 2.9**2
    assert excess() < 2 * 0.1**2


def test_a_narrow_range_does_not_outweigh_the_returns():
    """The best action is beyond what the mean may be without a penalty, which must stay small beside noise of 0.47."""

    class Bandit(ScriptedEnv):
        action_space = spaces.Box(-0.05, 0.05, (1,))

        def step(self, action: np.ndarray) -> Any:
            observation, _, *rest = super().step(action)
            return observation, float(action[0]), *rest

    model = REINFORCE("MlpPolicy", Bandit([1]), n_steps=50, seed=0).learn(5000)
    # Of noise around 0, a half comes out at the upper bound
    assert np.mean(model.rollout_buffer.rewards) > 0.035


def test_policies_with_other_outputs_of_their_action_net_are_asked_for_their_means():
    class WithStd(ActorCriticPolicy):
        """The action net returns means and logarithms of standard deviations."""

        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.action_net = nn.Linear(self.mlp_extractor.latent_dim_pi, 4)
            with th.no_grad():
                self.action_net.weight.zero_()
                self.action_net.bias.copy_(th.tensor([3.0, 0.0, -1.0, 5.0]))
            self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))  # type: ignore[call-arg]

        def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
            mean, log_std = self.action_net(latent_pi).chunk(2, dim=1)
            self.action_dist.distribution = th.distributions.Normal(mean, log_std.clamp(-5, 0).exp())
            return self.action_dist

    model = REINFORCE(WithStd, ScriptedEnv([4]), n_steps=8, learning_rate=1e-3, seed=0).learn(8)
    # Means of 3 and 0 for bounds of -1 and 1
    assert model.logger.name_to_value["train/bounds_loss"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("action_space", "kwargs"),
    [(spaces.Box(-1, 1, (2,)), dict(use_sde=True, policy_kwargs=dict(squash_output=True))), (spaces.Discrete(3), {})],
)
def test_actions_that_are_not_clipped_have_no_bounds_loss(action_space: spaces.Space, kwargs: dict[str, Any]):
    model = REINFORCE("MlpPolicy", RandomEnv(VECTOR, action_space, 9), n_steps=8, **kwargs).learn(8)
    assert "train/bounds_loss" not in model.logger.name_to_value
    assert "train/entropy_loss" in model.logger.name_to_value


def test_equal_returns_move_nothing():
    for n_steps in (1, 50):
        model = REINFORCE("MlpPolicy", EqualRewards([1]), n_steps=n_steps, seed=0)
        before = model.policy.parameters_to_vector()
        model.learn(3 * n_steps)
        np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)
        np.testing.assert_allclose(model.policy.value_net.bias, [1.0])


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


# Steps that are refused or shortened -----------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_not_applied():
    env = ScriptedEnv([4], spoil=lambda what, episode, step, value: 3e38 if what == "reward" else value)
    model = REINFORCE("MlpPolicy", env, n_steps=8, normalize_advantage=False, baseline=None, seed=0)
    before = weights(model)
    with pytest.raises(ValueError, match="gradient of update 1 is not finite"):
        model.learn(8)
    np.testing.assert_array_equal(weights(model), before)


@pytest.mark.parametrize("target_kl", [None, 0.01])
def test_a_step_that_breaks_the_policy_is_undone(target_kl: float | None):
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8, learning_rate=1e30, target_kl=target_kl, seed=0)
    before = weights(model)
    with pytest.raises(ValueError, match="Update 1 was undone: lower the learning rate"):
        model.learn(8)
    np.testing.assert_array_equal(weights(model), before)
    model.learning_rate = 1e-3
    model._setup_lr_schedule()
    assert model.learn(16)._n_updates >= 1


class Divergences(BaseCallback):
    """Works out the mean divergence of each update anew, from what the policy returned before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def _on_step(self) -> bool:
        return True

    def outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations, or probabilities."""
        with th.no_grad():
            policy: Any = self.model.policy
            distribution = policy.get_distribution(self.observations).distribution
        if isinstance(self.model.action_space, spaces.Box):
            return distribution.mean.double().numpy(), distribution.stddev.double().numpy()
        return distribution.probs.double().numpy(), np.zeros(0)

    def _on_rollout_end(self) -> None:
        self.observations = th.as_tensor(np.array(self.model.rollout_buffer.observations))
        self.before = self.outputs()

    def after_update(self) -> None:
        (p, std), (q, other_std) = self.before, self.outputs()
        if isinstance(self.model.action_space, spaces.Box):
            terms = np.log(other_std / std) + (std**2 + (p - q) ** 2) / (2 * other_std**2) - 0.5
        else:
            terms = p * np.log(p / q)
        self.found.append(terms.sum(axis=1).mean())
        np.testing.assert_allclose(self.logger.name_to_value["train/kl_divergence_loss"], self.found[-1], rtol=1e-2)

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self.after_update()

    def _on_training_end(self) -> None:
        self.after_update()


@pytest.mark.parametrize("make_env", [pendulum, lambda: gym.make("CartPole-v1")], ids=["Gaussian", "discrete"])
def test_no_step_is_longer_than_target_kl(make_env: Callable[[], gym.Env]):
    def measured(target_kl: float | None) -> tuple[list[float], np.ndarray]:
        callback = Divergences()
        kwargs: dict[str, Any] = dict(n_steps=200, learning_rate=0.03, normalize_observations=False, seed=0)
        model = REINFORCE("MlpPolicy", make_env(), target_kl=target_kl, **kwargs).learn(1200, callback=callback)
        return callback.found, weights(model)

    free, unlimited = measured(None)
    limited, weights_limited = measured(1e-3)
    assert max(free) > 1e-2
    assert len(limited) >= 4 and 1e-4 < min(limited) and max(limited) <= 1.01e-3
    # A limit that is out of reach changes nothing
    np.testing.assert_array_equal(measured(1e3)[1], unlimited)
    assert not np.allclose(weights_limited, unlimited)


@pytest.mark.parametrize("rate", [0.03, 0.3, 3.0])
def test_a_step_that_is_far_too_long_becomes_about_as_long_as_it_may_be(rate: float):
    model = REINFORCE("MlpPolicy", pendulum(), n_steps=400, learning_rate=rate, target_kl=1e-3, seed=0).learn(1)
    assert 2e-4 < model.logger.name_to_value["train/kl_divergence_loss"] <= 1e-3


@pytest.mark.parametrize("use_sde", [False, True])
def test_a_step_that_is_shortened_keeps_its_direction(use_sde: bool):
    def step(target_kl: float | None) -> np.ndarray:
        kwargs: dict[str, Any] = dict(n_steps=400, learning_rate=0.03, use_sde=use_sde, seed=0)
        model = REINFORCE("MlpPolicy", pendulum(), target_kl=target_kl, **kwargs)
        before = model.policy.parameters_to_vector()
        return model.learn(1).policy.parameters_to_vector() - before

    whole, shortened = step(None), step(1e-3)
    fraction = np.linalg.norm(shortened) / np.linalg.norm(whole)
    assert fraction < 0.9
    np.testing.assert_allclose(shortened, fraction * whole, rtol=0.01, atol=1e-5)


class Dropout(nn.Module):
    """As a policy might have it that does not use PyTorch's module."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("module", [lambda n: nn.Dropout(0.5), lambda n: Dropout(), nn.BatchNorm1d])
def test_what_training_mode_does_is_no_part_of_the_step(module: Any):
    """Dropout and batch norm alone make for more than the divergence allowed here, whatever class does it."""

    class Moody(MlpPolicy):
        def _build_mlp_extractor(self) -> None:
            super()._build_mlp_extractor()
            self.mlp_extractor.policy_net.append(module(self.mlp_extractor.latent_dim_pi))

    def step(target_kl: float | None) -> tuple[float, np.ndarray]:
        kwargs: dict[str, Any] = dict(n_steps=400, learning_rate=1e-5, policy_kwargs=dict(log_std_init=-3.0), seed=0)
        model = REINFORCE(Moody, pendulum(200), target_kl=target_kl, **kwargs)
        with th.no_grad():
            model.policy.action_net.weight.normal_(std=0.3)
        before = weights(model)
        return model.learn(1).logger.name_to_value["train/kl_divergence_loss"], weights(model) - before

    divergence, taken = step(0.05)
    assert 0 < divergence <= 0.05
    assert taken.any()
    np.testing.assert_array_equal(taken, step(None)[1])


def test_a_policy_that_is_never_the_same_twice_is_not_waited_for():
    n_looks = 0

    class Restless(MlpPolicy):
        def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
            nonlocal n_looks
            n_looks += self.action_net.weight.grad is not None
            return super()._get_action_dist_from_latent(latent_pi + th.randn_like(latent_pi))

    REINFORCE(Restless, pendulum(), n_steps=200, target_kl=1e-9, seed=0).learn(1)
    assert n_looks < 30


class StudentT(MlpPolicy):
    """Not even PyTorch has a divergence of these."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        distribution = DiagGaussianDistribution(self.action_space.shape[0])  # type: ignore[index]
        distribution.distribution = th.distributions.StudentT(5, self.action_net(latent_pi), self.log_std.exp())  # type: ignore[assignment]
        distribution.log_prob = lambda actions: distribution.distribution.log_prob(actions).sum(dim=1)  # type: ignore[method-assign]
        return distribution


def test_a_distribution_without_a_closed_form_divergence_is_learned_without_target_kl():
    with pytest.raises(ValueError, match=r"divergence of a DiagGaussianDistribution .*target_kl must be None"):
        REINFORCE(StudentT, pendulum(), n_steps=50).learn(1)
    model = REINFORCE(StudentT, pendulum(), n_steps=50, target_kl=None).learn(1)
    assert model._n_updates == 1
    assert "train/kl_divergence_loss" not in model.logger.name_to_value


@pytest.mark.parametrize("rate", [np.nan, -1.0, np.inf])
def test_a_schedule_that_gives_no_learning_rate_is_refused(rate: float):
    with pytest.raises(ValueError, match=r"learning_rate must be finite .* progress_remaining=1.0"):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), learning_rate=lambda progress: rate)
    schedule = lambda progress: 0.1 if progress == 1 else rate  # noqa: E731
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8, learning_rate=schedule, seed=0)
    before = weights(model.learn(8))
    with pytest.raises(ValueError, match=r"learning_rate must be finite .* progress_remaining=0.5"):
        model.learn(8, reset_num_timesteps=False)
    np.testing.assert_array_equal(weights(model), before)


@pytest.mark.parametrize("schedule", [LinearSchedule(1e-3, 0.0, 1.0), "lin_1e-3"])
def test_a_schedule_counts_the_steps_before_the_batch(schedule: Any):
    """Its beginning is for the first update, and no update has the 0 at its end, however long the last episodes are."""
    rates: list[float] = []

    class Rates(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            rates.append(self.model.policy.optimizer.param_groups[0]["lr"])

    model = REINFORCE("MlpPolicy", ScriptedEnv([7]), n_steps=10, learning_rate=schedule).learn(30, callback=Rates())
    rates.append(model.policy.optimizer.param_groups[0]["lr"])
    assert rates[1:] == pytest.approx([1e-3, 1e-3 * (1 - 14 / 30), 1e-3 * (1 - 28 / 30)])


@pytest.mark.parametrize("text", ["lin_", "lin_abc", "1e-3", "cos_1e-3", "lin_nan", "lin_-1"])
def test_other_texts_than_a_linear_schedule_are_refused_by_name(text: str):
    with pytest.raises(ValueError, match="learning_rate"):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), learning_rate=text)


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


class WithBatchNorm(MlpPolicy):
    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(nn.BatchNorm1d(self.mlp_extractor.latent_dim_pi))


@pytest.mark.parametrize(
    ("policy", "kwargs"),
    [
        ("MlpPolicy", dict(target_kl=1e-3)),
        ("MlpPolicy", dict(target_kl=None, baseline="linear", baseline_memory=0.0, normalize_observations=False)),
        (WithBatchNorm, dict(baseline=None, max_grad_norm=0.5)),
    ],
    ids=["shortened step", "whole step", "batch norm"],
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
    assert n_before > 50 and n_after >= 1
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
    "gradient": lambda model: (model, "_clip_gradient"),
    "step": lambda model: (model.policy.optimizer, "step"),
    "divergence": lambda model: (reinforce, "kl_divergence"),
    "statistics": lambda model: (model.policy.observation_normalizer, "update"),
    "baseline": lambda model: (model.policy.value_net, "fit"),
    "step of the environment": lambda model: (model.get_env(), "step"),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("point", POINTS)
def test_learning_goes_on_after_an_interruption_as_if_there_had_been_none(
    point: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
):
    def make() -> REINFORCE:
        env = DummyVecEnv([lambda: RandomLengthEnv(9) for _ in range(2)])
        kwargs: dict[str, Any] = dict(learning_rate=0.03, seed=0, policy_kwargs=dict(net_arch=[4]))
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


# Seeds -----------------------------------------------------------------------------------------------------------------------


def test_rollouts_of_one_seed_differ():
    model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=50, seed=0, learning_rate=0.0)
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


def test_an_unseeded_model_follows_the_global_generators():
    results = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        th.manual_seed(0)
        model = REINFORCE("MlpPolicy", ScriptedEnv([5]), n_steps=50)
        results.append(weights(model.learn(150)))
    np.testing.assert_array_equal(*results[:2])
    assert not np.array_equal(results[0], results[2])


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
@settings(max_examples=20)
@given(
    random_spaces(),
    st.integers(1, 12),
    st.integers(1, 3),
    st.sampled_from(["linear", "quadratic", "random_features", None]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 20),
)
def test_random_environments_train_without_a_warning(
    spaces_: tuple, max_length: int, n_envs: int, baseline: Any, normalize: bool, bootstrap: bool, n_steps: int
):
    env = DummyVecEnv([lambda: RandomEnv(*spaces_, max_length) for _ in range(n_envs)])
    policy = "MultiInputPolicy" if isinstance(spaces_[0], spaces.Dict) else "MlpPolicy"
    kwargs: dict[str, Any] = dict(baseline=baseline, normalize_observations=normalize, bootstrap_timeouts=bootstrap)
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
