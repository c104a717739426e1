"""The algorithm: against the article's, written out once more; its update; its seeds; its arguments; its model files."""

from copy import deepcopy
from inspect import signature
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from torch.nn.utils import parameters_to_vector

from sb3_reinforce import REINFORCE, MlpPolicy, policies
from sb3_reinforce.baselines import LinearBaseline
from sb3_reinforce.reinforce import bounds_loss
from tests.envs import RandomEnv, ScriptedEnv, scripted

LANDER = "LunarLanderContinuous-v3"


def weights(model: REINFORCE) -> np.ndarray:
    return np.concatenate([value.numpy().ravel().copy() for value in model.policy.state_dict().values()])


class Dropout(nn.Module):
    """As a policy might have it that does not use PyTorch's module."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


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
        policy = self.model.policy
        self.gradients.append(np.concatenate([p.grad.numpy().ravel().copy() for p in policy.parameters()]))
        self.baselines.append(np.append(policy.value_net.weight.numpy(), policy.value_net.bias.numpy()))


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
        normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

        mean = self.mean(th.as_tensor(states))
        squares = (th.as_tensor(actions) - mean) ** 2 / (2 * th.exp(2 * self.log_std))
        log_prob = (-squares - self.log_std - 0.5 * np.log(2 * np.pi)).sum(dim=1)
        loss = -(log_prob * th.as_tensor(normalised, dtype=th.float32)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        gradient = np.concatenate([parameter.grad.numpy().ravel().copy() for parameter in self.parameters])

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


@given(st.data())
def test_the_bounds_loss_is_the_squared_distance_beyond_the_bounds(data: st.DataObject):
    n_transitions, n_actions = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    numbers = st.floats(-100, 100, width=32)
    low = data.draw(st.lists(st.integers(-100, 100) | st.just(-np.inf), min_size=n_actions, max_size=n_actions))
    ranges = st.sampled_from([0.0, 0.125, 3.0, np.inf])
    high = [data.draw(numbers | st.just(np.inf)) if bound == -np.inf else bound + data.draw(ranges) for bound in low]
    stds = [[data.draw(st.floats(0.0625, 4, width=32)) for _ in range(n_actions)] for _ in range(n_transitions)]
    means = [[data.draw(numbers) for _ in range(n_actions)] for _ in range(n_transitions)]
    expected, slopes = 0.0, np.zeros((n_transitions, n_actions))
    for t, i in np.ndindex(n_transitions, n_actions):
        scale = max((high[i] - low[i]) / 2, stds[t][i])
        if means[t][i] > high[i]:
            distance = means[t][i] - high[i]
        elif means[t][i] < low[i]:
            distance = means[t][i] - low[i]
        else:
            continue
        expected += (distance / scale) ** 2 / n_transitions
        slopes[t, i] = 2 * distance / scale**2 / n_transitions
    tensor = th.tensor(means, requires_grad=True)
    loss = bounds_loss(tensor, *(th.tensor(values, dtype=th.float32) for values in (stds, low, high)))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(tensor.grad, slopes, rtol=1e-4)


def test_defaults():
    model = REINFORCE("MlpPolicy", LANDER)
    assert (model.n_steps, model.n_episodes, model.gamma) == (2000, None, 0.99)
    np.testing.assert_allclose([model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)], [5e-3, 2.5e-3, 0])
    assert (model.baseline, model.baseline_memory, model.normalize_advantage) == ("random", 0.85, True)
    assert (model.bootstrap_timeouts, model.normalize_observations) == (True, True)
    assert (model.ent_coef, model.bounds_coef, model.max_grad_norm, model.target_kl) == (0.0, 0.1, None, 0.01)
    # One default for actions that are choices, another for Gaussian ones; a given value is kept
    for space in (spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)):
        assert REINFORCE("MlpPolicy", RandomEnv(spaces.Box(-1, 1, (3,)), space, 9)).ent_coef == 0.03
    assert REINFORCE("MlpPolicy", "CartPole-v1", ent_coef=0.0).ent_coef == 0.0
    # A policy that is made without the algorithm is the same
    for name in ("baseline", "baseline_memory", "normalize_observations"):
        assert signature(MlpPolicy).parameters[name].default == getattr(model, name) == getattr(model.policy, name)
    assert model.get_env().get_attr("render_mode") == [None]


class TestUpdate:
    @staticmethod
    def gradient(n_updates: int = 1, **kwargs: Any) -> np.ndarray:
        rollouts = Rollouts()
        model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=100, seed=0, baseline=None, **kwargs)
        model.learn(100, callback=rollouts)
        return rollouts.gradients[0]

    @pytest.mark.parametrize("space", ["vector", "image", "dictionary"])
    def test_a_batch_in_chunks_is_the_same_as_all_at_once(self, space: str, monkeypatch: pytest.MonkeyPatch):
        image, vector = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8), spaces.Box(-1, 1, (3,))
        policy, observation_space = {
            "vector": ("MlpPolicy", vector),
            "image": ("CnnPolicy", image),
            "dictionary": ("MultiInputPolicy", spaces.Dict(image=image, vector=vector)),
        }[space]

        def learn() -> np.ndarray:
            env = RandomEnv(observation_space, spaces.Discrete(3), 8)
            model = REINFORCE(policy, env, n_steps=30, seed=0, ent_coef=0.1, baseline=None).learn(90)
            return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().numpy()

        whole = learn()
        monkeypatch.setattr(policies, "_CHUNK", 7 * spaces.flatdim(observation_space))
        np.testing.assert_allclose(learn(), whole, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("normalize_observations", [False, True])
    @pytest.mark.parametrize("share_features_extractor", [False, True])
    def test_the_baseline_is_used_and_fitted_with_the_features_of_the_policy_as_it_is(
        self, normalize_observations: bool, share_features_extractor: bool
    ):
        """On images, whose features change with every update: whichever pass over them the features come from."""
        space = spaces.Dict(image=spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8), vector=spaces.Box(-1, 1, (3,)))
        seen = []
        # Remembers what the baseline of the policy should
        expected_fit: list[LinearBaseline] = []

        class Values(BaseCallback):
            def _on_step(self) -> bool:
                return True

            def _on_rollout_start(self) -> None:
                if self.n_calls:
                    self.check_fit()

            def _on_rollout_end(self) -> None:
                buffer = self.model.rollout_buffer
                observations = next(buffer.observation_chunks(10**9))
                expected = self.model.policy.predict_values(observations).detach().numpy().flatten()
                np.testing.assert_allclose(buffer.values, expected, rtol=1e-4, atol=1e-4)
                seen.append(buffer.values)

            def check_fit(self) -> None:
                policy, buffer = self.model.policy, self.model.rollout_buffer
                features = policies.baseline_features(policy, buffer.observation_chunks(10**9))
                if not expected_fit:
                    memory = self.model.baseline_memory
                    expected_fit.append(LinearBaseline(features.shape[1], ridge=1e-3, memory=memory, truncate=True))
                (expected,) = expected_fit
                expected.fit(features, buffer.returns)
                np.testing.assert_allclose(
                    policy.value_net(th.as_tensor(features)), expected(th.as_tensor(features)), rtol=1e-3, atol=1e-3
                )

        policy_kwargs = dict(share_features_extractor=share_features_extractor)
        env = RandomEnv(space, spaces.Discrete(3), 8)
        model = REINFORCE(
            "MultiInputPolicy",
            env,
            n_steps=30,
            learning_rate=1e-3,
            seed=0,
            bootstrap_timeouts=False,
            normalize_observations=normalize_observations,
            policy_kwargs=policy_kwargs,
        )
        model.learn(120, callback=Values())
        assert len(seen) >= 4 and np.ptp(seen[-1]) > 0

    def test_max_grad_norm_clips_the_gradient(self):
        free, clipped = self.gradient(), self.gradient(max_grad_norm=1e-3)
        np.testing.assert_allclose(clipped, free * 1e-3 / np.linalg.norm(free), rtol=1e-4, atol=1e-9)

    def test_the_entropy_bonus_raises_the_entropy(self):
        def entropy_loss(ent_coef: float) -> float:
            kwargs = dict(n_steps=200, learning_rate=1e-2, seed=0)
            model = REINFORCE("MlpPolicy", "Pendulum-v1", ent_coef=ent_coef, **kwargs).learn(4000)
            return model.logger.name_to_value["train/entropy_loss"]

        assert entropy_loss(1.0) < entropy_loss(0.0) - 0.05

    @pytest.mark.parametrize("chunk", [2_000_000, 640])
    def test_means_beyond_the_bounds_are_part_of_the_gradient(self, chunk: int, monkeypatch: pytest.MonkeyPatch):
        """Against the derivative of the penalty, written out: the means are a bias, each element of which is 3 too high."""
        monkeypatch.setattr(policies, "_CHUNK", chunk)

        def gradient(bounds_coef: float) -> np.ndarray:
            rollouts = Rollouts()
            env = RandomEnv(
                spaces.Box(-1, 1, (3,)), spaces.Box(np.array([-2, -np.inf], np.float32), np.array([4, 1], np.float32)), 9
            )
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

    def test_a_policy_stuck_beyond_the_bounds_comes_back(self):
        """Equal returns, as where every sample is clipped to the same action: nothing but the penalty moves it."""

        class Constant(ScriptedEnv):
            def step(self, action: np.ndarray) -> Any:
                observation, _, *rest = super().step(action)
                return observation, 1.0, *rest

        def excess(**kwargs: Any) -> float:
            model = REINFORCE("MlpPolicy", Constant([1]), n_steps=10, seed=0, learning_rate=1e-2, **kwargs)
            with th.no_grad():
                model.policy.action_net.bias.fill_(-4.0)
            model.learn(3000)
            return model.logger.name_to_value["train/bounds_loss"]

        assert excess(bounds_coef=0.0) > 2 * 2.9**2
        assert excess() < 2 * 0.1**2

    def test_a_narrow_range_does_not_outweigh_the_returns(self):
        """The best action is beyond what the mean may be without a penalty, which must stay small beside noise of 0.47."""

        class Bandit(ScriptedEnv):
            action_space = spaces.Box(-0.05, 0.05, (1,))

            def step(self, action: np.ndarray) -> Any:
                observation, _, *rest = super().step(action)
                return observation, float(action[0]), *rest

        model = REINFORCE("MlpPolicy", Bandit([1]), n_steps=50, seed=0).learn(10_000)
        # Of noise around 0, a half comes out at the upper bound
        assert np.mean(model.rollout_buffer.rewards) > 0.035

    def test_policies_with_other_outputs_of_their_action_net_are_asked_for_their_means(self):
        class WithStd(ActorCriticPolicy):
            """The action net returns means and logarithms of standard deviations."""

            def _build(self, lr_schedule: Any) -> None:
                super()._build(lr_schedule)
                self.action_net = nn.Linear(self.mlp_extractor.latent_dim_pi, 4)
                with th.no_grad():
                    self.action_net.weight.zero_()
                    self.action_net.bias.copy_(th.tensor([3.0, 0.0, -1.0, 5.0]))
                self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))

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
    def test_actions_that_are_not_clipped_have_no_bounds_loss(self, action_space: spaces.Space, kwargs: dict[str, Any]):
        model = REINFORCE("MlpPolicy", RandomEnv(spaces.Box(-1, 1, (3,)), action_space, 9), n_steps=8, **kwargs).learn(8)
        assert "train/bounds_loss" not in model.logger.name_to_value
        assert "train/entropy_loss" in model.logger.name_to_value

    def test_advantages_are_normalised_only_if_asked_for(self):
        plain, normalised = self.gradient(normalize_advantage=False), self.gradient()
        assert np.linalg.norm(plain) > 5 * np.linalg.norm(normalised)

    def test_equal_returns_move_nothing(self):
        class Constant(ScriptedEnv):
            def step(self, action: np.ndarray) -> Any:
                observation, _, *rest = super().step(action)
                return observation, 1.0, *rest

        for lengths, n_steps in ([1], 1), ([1], 50):
            model = REINFORCE("MlpPolicy", Constant(lengths), n_steps=n_steps, seed=0)
            before = model.policy.parameters_to_vector()
            model.learn(3 * n_steps)
            np.testing.assert_array_equal(model.policy.parameters_to_vector(), before)
            np.testing.assert_allclose(model.policy.value_net.bias, [1.0])

    def test_the_baseline_of_a_batch_is_the_fit_to_the_one_before(self):
        model = REINFORCE(
            "MlpPolicy", LANDER, n_steps=300, seed=0, baseline="linear", baseline_memory=0.0, normalize_observations=False
        )
        model.learn(300)
        assert not model.rollout_buffer.values.any()
        earlier = model.rollout_buffer.observations.copy(), model.rollout_buffer.returns.copy()
        model.learn(300, reset_num_timesteps=False)
        design = np.column_stack([earlier[0], np.ones(len(earlier[0]))]).astype(np.float64)
        coefficients = np.linalg.lstsq(design, earlier[1], rcond=None)[0]
        now = model.rollout_buffer.observations
        np.testing.assert_allclose(
            model.rollout_buffer.values, np.column_stack([now, np.ones(len(now))]) @ coefficients, rtol=1e-4, atol=1e-4
        )

    def test_no_baseline_means_that_advantages_are_returns(self):
        model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=100, baseline=None, normalize_advantage=False)
        model.learn(300)
        np.testing.assert_array_equal(model.rollout_buffer.advantages, model.rollout_buffer.returns)
        assert not model.policy.value_net.weight.any()

    def test_observation_statistics_are_updated_once_a_batch_from_raw_observations(self):
        model = REINFORCE("MlpPolicy", LANDER, n_steps=300, normalize_observations=True, seed=0)
        seen = []

        def callback(locals_: dict, globals_: dict) -> bool:
            seen.append(model.policy.observation_normalizer.mean_0.numpy().copy())
            return True

        model.learn(300, callback=callback)
        assert not np.any(seen)
        observations = model.rollout_buffer.observations
        np.testing.assert_allclose(model.policy.observation_normalizer.mean_0, observations.mean(0), atol=1e-4)
        # The baseline is fitted to what it will see, observations normalised so: least squares with an intercept hit the mean
        values = model.policy.predict_values(th.as_tensor(observations))
        np.testing.assert_allclose(values.mean().item(), model.rollout_buffer.returns.mean(), rtol=1e-4)

    def test_a_gradient_that_is_not_finite_is_not_applied(self):
        # Not the default schedule, which is at 0 when the only update is made
        model = REINFORCE(
            "MlpPolicy", ScriptedEnv([4]), n_steps=8, learning_rate=1e-3, normalize_advantage=False, baseline=None, seed=0
        )
        model.env.envs[0].unwrapped.spoil = lambda what, episode, step, value: 3e38 if what == "reward" else value
        before = weights(model)
        with pytest.raises(ValueError, match="gradient of update 1 is not finite"):
            model.learn(8)
        np.testing.assert_array_equal(weights(model), before)

    def test_a_step_that_breaks_the_policy_is_undone(self):
        model = REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8, learning_rate=1e30, seed=0)
        before = weights(model)
        with pytest.raises(ValueError, match="Update 1 was undone: lower the learning rate"):
            model.learn(8)
        np.testing.assert_array_equal(weights(model), before)
        model.learning_rate = 1e-3
        model._setup_lr_schedule()
        model.learn(16)

    def test_a_refused_update_leaves_optimiser_and_statistics_as_they_were(self):
        class Normed(MlpPolicy):
            def _build_mlp_extractor(self) -> None:
                super()._build_mlp_extractor()
                self.mlp_extractor.policy_net.append(nn.BatchNorm1d(self.mlp_extractor.latent_dim_pi))

        rate = [1e-3]
        model = REINFORCE(Normed, ScriptedEnv([4, 5]), n_steps=8, learning_rate=lambda _: rate[0], seed=0).learn(16)
        before = deepcopy(model.get_parameters())
        rate[0] = 1e30
        with pytest.raises(ValueError, match="was undone"):
            model.learn(1, reset_num_timesteps=False)
        after = model.get_parameters()
        assert after["policy.optimizer"]["param_groups"] == before["policy.optimizer"]["param_groups"]
        for index, state in before["policy.optimizer"]["state"].items():
            for name, value in state.items():
                assert th.equal(after["policy.optimizer"]["state"][index][name], value)
        assert all(th.equal(after["policy"][name], value) for name, value in before["policy"].items())

    @pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
    def test_no_step_is_longer_than_target_kl(self, env: str):
        def measured(target_kl: float | None) -> tuple[list[float], np.ndarray]:
            divergences = []

            class Divergence(BaseCallback):
                """Worked out anew from the policies before and after each update, beside what is logged."""

                def _on_step(self) -> bool:
                    return True

                def distribution(self) -> th.distributions.Distribution:
                    return self.model.policy.get_distribution(self.observations).distribution

                def log_prob(self) -> th.Tensor:
                    with th.no_grad():
                        log_prob = self.distribution().log_prob(self.actions)
                    return log_prob.sum(dim=1) if log_prob.ndim == 2 else log_prob

                def _on_rollout_end(self) -> None:
                    buffer = self.model.rollout_buffer
                    self.observations, self.actions = (th.as_tensor(x.copy()) for x in (buffer.observations, buffer.actions))
                    if isinstance(self.model.action_space, spaces.Discrete):
                        self.actions = self.actions.flatten()
                    self.before = self.log_prob()

                def after_update(self) -> None:
                    ratio = (self.log_prob() - self.before).double()
                    logged = self.logger.name_to_value["train/approx_kl"]
                    np.testing.assert_allclose(logged, (ratio.exp() - 1 - ratio).mean(), rtol=0.01)
                    divergences.append(logged)

                def _on_rollout_start(self) -> None:
                    if self.num_timesteps:
                        self.after_update()

                def _on_training_end(self) -> None:
                    self.after_update()

            kwargs = dict(n_steps=400, learning_rate=0.03, target_kl=target_kl, normalize_observations=False, seed=0)
            after = weights(REINFORCE("MlpPolicy", env, **kwargs).learn(2400, callback=Divergence()))
            return divergences, after

        free, unlimited = measured(None)
        limited, weights_limited = measured(1e-3)
        assert max(free) > 1e-2
        assert len(limited) >= 4 and 1e-4 < min(limited) and max(limited) <= 1e-3
        # A limit that is out of reach changes nothing
        np.testing.assert_array_equal(measured(1e3)[1], unlimited)
        assert not np.allclose(weights_limited, unlimited)

    @pytest.mark.parametrize("rate", [0.03, 0.3, 3.0])
    def test_a_step_that_is_far_too_long_becomes_about_as_long_as_it_may_be(self, rate: float):
        model = REINFORCE("MlpPolicy", "Pendulum-v1", n_steps=400, learning_rate=rate, target_kl=1e-3, seed=0).learn(1)
        assert 2e-4 < model.logger.name_to_value["train/approx_kl"] <= 1e-3

    @pytest.mark.parametrize("module", [lambda n: nn.Dropout(0.5), lambda n: Dropout(), nn.BatchNorm1d])
    def test_what_training_mode_does_is_no_part_of_the_step(self, module: Any):
        """Dropout and batch norm alone make for more than the divergence allowed here, whatever class does it."""

        class Moody(MlpPolicy):
            def _build_mlp_extractor(self) -> None:
                super()._build_mlp_extractor()
                self.mlp_extractor.policy_net.append(module(self.mlp_extractor.latent_dim_pi))

        def step(target_kl: float | None) -> tuple[float, np.ndarray]:
            kwargs = dict(n_steps=400, learning_rate=1e-5, target_kl=target_kl, policy_kwargs=dict(log_std_init=-3.0), seed=0)
            model = REINFORCE(Moody, "Pendulum-v1", **kwargs)
            with th.no_grad():
                model.policy.action_net.weight.normal_(std=0.3)
            before = weights(model)
            return model.learn(1).logger.name_to_value["train/approx_kl"], weights(model) - before

        kl, taken = step(0.05)
        assert 0 < kl <= 0.05
        assert taken.any()
        np.testing.assert_array_equal(taken, step(None)[1])

    def test_a_policy_that_is_never_the_same_twice_is_not_waited_for(self):
        looks = []

        class Restless(MlpPolicy):
            def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
                return super()._get_action_dist_from_latent(latent_pi + th.randn_like(latent_pi))

            def evaluate_actions(self, *args: Any) -> Any:
                looks.append(self.training)
                return super().evaluate_actions(*args)

        REINFORCE(Restless, "Pendulum-v1", n_steps=200, target_kl=1e-9, seed=0).learn(1)
        assert len(looks) < 30

    def test_a_step_that_is_shortened_keeps_its_direction(self):
        def step(target_kl: float | None) -> np.ndarray:
            model = REINFORCE("MlpPolicy", "Pendulum-v1", n_steps=400, learning_rate=0.03, target_kl=target_kl, seed=0)
            before = parameters_to_vector(model.policy.parameters()).detach().numpy()
            return parameters_to_vector(model.learn(1).policy.parameters()).detach().numpy() - before

        whole, shortened = step(None), step(1e-3)
        share = np.linalg.norm(shortened) / np.linalg.norm(whole)
        assert share < 0.9
        np.testing.assert_allclose(shortened, share * whole, rtol=0.01, atol=1e-5)

    @pytest.mark.parametrize("rate", [np.nan, -1.0, np.inf])
    def test_a_schedule_that_gives_no_learning_rate_is_refused(self, rate: float):
        with pytest.raises(ValueError, match=r"learning_rate must be finite .* progress_remaining=1.0"):
            REINFORCE("MlpPolicy", ScriptedEnv([4]), learning_rate=lambda progress: rate)
        model = REINFORCE(
            "MlpPolicy", ScriptedEnv([4]), n_steps=8, learning_rate=lambda progress: 0.1 if progress == 1 else rate, seed=0
        )
        before = weights(model.learn(8))
        with pytest.raises(ValueError, match=r"learning_rate must be finite .* progress_remaining=0.5"):
            model.learn(8, reset_num_timesteps=False)
        np.testing.assert_array_equal(weights(model), before)

    def test_a_schedule_counts_the_steps_before_the_batch(self):
        """Its beginning is for the first update, and no update has the 0 at its end, however long the last episodes are."""
        rates: list[float] = []

        class Rates(BaseCallback):
            def _on_step(self) -> bool:
                return True

            def _on_rollout_start(self) -> None:
                rates.append(self.model.policy.optimizer.param_groups[0]["lr"])

        model = REINFORCE("MlpPolicy", ScriptedEnv([7]), n_steps=10, learning_rate=LinearSchedule(1e-3, 0.0, 1.0))
        model.learn(30, callback=Rates())
        rates.append(model.policy.optimizer.param_groups[0]["lr"])
        assert rates[1:] == pytest.approx([1e-3, 1e-3 * (1 - 14 / 30), 1e-3 * (1 - 28 / 30)])


class TestSeeds:
    @pytest.mark.parametrize("n_envs", [1, 4])
    def test_one_seed_gives_identical_weights_and_another_does_not(self, n_envs: int):
        def train(seed: int) -> np.ndarray:
            env = DummyVecEnv([lambda: gym.make(LANDER) for _ in range(n_envs)])
            return weights(REINFORCE("MlpPolicy", env, n_steps=400 // n_envs, seed=seed, baseline="random").learn(1200))

        first = train(1)
        np.testing.assert_array_equal(first, train(1))
        assert not np.array_equal(first, train(2))

    def test_iterations_differ(self):
        model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=50, seed=0, learning_rate=0.0)
        model.learn(50)
        first = model.rollout_buffer.observations.copy()
        model.learn(50, reset_num_timesteps=False)
        assert not np.array_equal(first[:5], model.rollout_buffer.observations[:5])

    def test_set_random_seed_fixes_what_follows(self):
        results = []
        for _ in range(2):
            model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=50, seed=0)
            model.set_random_seed(7)
            results.append(weights(model.learn(150)))
        np.testing.assert_array_equal(*results)
        assert model.seed == 7

    def test_an_unseeded_model_follows_the_global_generators(self):
        results = []
        for _ in range(2):
            np.random.seed(0)
            th.manual_seed(0)
            model = REINFORCE("MlpPolicy", ScriptedEnv([5]), n_steps=50)
            results.append(weights(model.learn(150)))
        np.testing.assert_array_equal(*results)


class TestModels:
    def test_parameters_that_do_not_fit_change_nothing(self, tmp_path: Any):
        big = REINFORCE("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[32, 16]))
        big.save(tmp_path / "big")
        # The first layer would fit
        model = REINFORCE("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[32, 32]))
        before = weights(model)
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.set_parameters(tmp_path / "big")
        np.testing.assert_array_equal(weights(model), before)
        model.learn(10)

    def test_training_goes_on_after_loading_as_if_it_had_not_been_saved(self, tmp_path: Any):
        def model() -> REINFORCE:
            return REINFORCE(
                "MlpPolicy",
                "CartPole-v1",
                n_steps=50,
                seed=0,
                baseline="random",
                baseline_memory=0.5,
                normalize_observations=True,
            )

        without_a_break = model().learn(100).learn(100, reset_num_timesteps=False)
        model().learn(100).save(tmp_path / "model")
        loaded = REINFORCE.load(tmp_path / "model", env=gym.make("CartPole-v1"))
        loaded.learn(100, reset_num_timesteps=False)
        np.testing.assert_array_equal(weights(loaded), weights(without_a_break))


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
    st.sampled_from(["linear", "quadratic", "random", None]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 20),
)
def test_random_environments_train_without_a_warning(
    spaces_: tuple, max_length: int, n_envs: int, baseline: str | None, normalize: bool, bootstrap: bool, n_steps: int
):
    env = DummyVecEnv([lambda: RandomEnv(*spaces_, max_length) for _ in range(n_envs)])
    policy = "MultiInputPolicy" if isinstance(spaces_[0], spaces.Dict) else "MlpPolicy"
    model = REINFORCE(
        policy, env, n_steps=n_steps, baseline=baseline, normalize_observations=normalize, bootstrap_timeouts=bootstrap, seed=0
    )
    model.learn(5 * n_steps * n_envs)
    assert np.isfinite(weights(model)).all()
    assert model._n_updates >= 1


def test_episode_statistics_are_those_of_the_monitors():
    model = REINFORCE("MlpPolicy", scripted([[3], [5]]), n_steps=4)
    model.learn(30)
    assert {info["l"] for info in model.ep_info_buffer} == {3, 5}
