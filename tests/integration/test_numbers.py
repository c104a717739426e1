"""Numbers that go wrong: training stays finite, or stops with documented words before anything has changed."""

import itertools
import math
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_reinforce import REINFORCE
from tests.integration.common import CHOICE, PAIR, assert_same

OUTPUT = "The policy's output is not finite"
GRADIENT = r"The gradient of update \d+ is not finite: the step was not taken"
UNDONE = r"Update \d+ was undone: (lower the learning rate|no step along its gradient leaves the policy finite)"
BASELINE = "The baseline cannot be fitted to features or returns that are NaN, infinite or near overflow"
STATISTICS = "The observations '.*' are so large that their variance is not finite"
DOCUMENTED = "|".join([OUTPUT, GRADIENT, UNDONE, BASELINE, STATISTICS])

#: All ways to take a step on all kinds of advantages
SETTINGS = [
    dict(
        advantage=advantage,
        baseline=baseline,
        target_kl=target_kl,
        normalize_observations=normalize_observations,
        normalize_advantage=normalize_advantage,
    )
    for advantage, baseline in [
        ("monte_carlo", None),
        *itertools.product(("monte_carlo", "q", "advantage", "td"), ("linear", "quadratic", "random_features")),
    ]
    for target_kl, normalize_observations, normalize_advantage in itertools.product((None, 0.02), (True, False), (True, False))
]


def box(n: int = 3, dtype: type = np.float32, bound: float = np.inf) -> spaces.Box:
    return spaces.Box(-bound, bound, (n,), dtype)


@dataclass(frozen=True)
class Case:
    """
    An environment and a model with unusual numbers.

    :param observe: the observation, from a generator and the step of the episode
    :param reward: likewise
    :param length: of all episodes
    :param prepare: changes the policy before training
    :param kwargs: of the model; they have precedence over the settings
    :param refused: the words that training is refused with, for a setting; None where it goes on
    :param may: the words that training may also be refused with: whether it is depends on rounding
    :param warns: NumPy's warnings that are seen, as a regular expression
    """

    observe: Callable[[np.random.Generator, int], Any] = lambda rng, step: rng.normal(size=3)
    reward: Callable[[np.random.Generator, int], float] = lambda rng, step: float(rng.normal())
    length: int = 5
    observation_space: spaces.Box = field(default_factory=box)
    action_space: spaces.Space = field(default_factory=lambda: PAIR)
    prepare: Callable[[Any], Any] = lambda policy: None
    kwargs: dict[str, Any] = field(default_factory=dict)
    refused: Callable[[dict[str, Any]], str | None] = lambda setting: None
    may: str = "(?!)"
    warns: str = "(?!)"


class NumbersEnv(gym.Env):
    """Episodes of a :class:`Case`; half of them end by a time limit."""

    def __init__(self, case: Case):
        self.case = case
        self.observation_space = case.observation_space
        self.action_space = case.action_space

    def _observation(self) -> np.ndarray:
        return np.asarray(self.case.observe(self.np_random, self.n_steps)).astype(self.observation_space.dtype)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.n_steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.n_steps += 1
        is_over = self.n_steps == self.case.length
        by_time_limit = bool(self.np_random.random() < 0.5)
        reward = self.case.reward(self.np_random, self.n_steps)
        return self._observation(), reward, is_over and not by_time_limit, is_over and by_time_limit, {}


def always(words: str) -> Callable[[dict[str, Any]], str | None]:
    return lambda setting: words


def large_rewards(setting: dict[str, Any]) -> str | None:
    """Their gradient is out of the range of float32 unless they are normalized."""
    return None if setting["normalize_advantage"] else GRADIENT


def unless_normalized(words: str, *baselines: str) -> Callable[[dict[str, Any]], str | None]:
    """Observations, whose sums or squares in the features of some baselines overflow."""
    return lambda setting: words if setting["baseline"] in baselines and not setting["normalize_observations"] else None


def squared_actions(setting: dict[str, Any]) -> str | None:
    """They are features of action values."""
    return GRADIENT if setting["advantage"] in ("q", "advantage") else None


def bias(value: float) -> Callable[[Any], Any]:
    """The first output of the policy's network is about this number."""
    return lambda policy: policy.action_net.bias.data[0].fill_(value)


def policy_kwargs(**kwargs: Any) -> dict[str, Any]:
    return dict(policy_kwargs=kwargs)


DISCRETE_SPACES = dict(choice=CHOICE, choices=spaces.MultiDiscrete([2, 3]), bits=spaces.MultiBinary(2))
UNBOUNDED = box(2)
CASES = {
    # Rewards
    "rewards_of_1e30": Case(reward=lambda rng, step: 1e30, refused=large_rewards),
    "rewards_of_the_size_of_1e30": Case(reward=lambda rng, step: 1e30 * rng.normal(), refused=large_rewards),
    "rewards_of_3e38_and_minus_3e38": Case(reward=lambda rng, step: 3e38 * rng.choice([-1, 1]), refused=large_rewards),
    "rewards_of_all_sizes": Case(
        reward=lambda rng, step: float(rng.choice([1e30, -1e30, 1e-30, -1e-30, 0, 1])), refused=large_rewards
    ),
    "rewards_of_the_size_of_1e-30": Case(reward=lambda rng, step: 1e-30 * rng.normal()),
    "rewards_that_are_denormal": Case(reward=lambda rng, step: 1e-40 * rng.normal()),
    "rewards_of_0": Case(reward=lambda rng, step: 0.0),
    "rewards_of_0.1": Case(reward=lambda rng, step: 0.1),
    # Episodes
    "episodes_of_one_step": Case(length=1),
    "episodes_of_one_step_and_the_same_reward": Case(length=1, reward=lambda rng, step: 1.0),
    "a_single_transition": Case(length=1, kwargs=dict(n_episodes=1)),
    "a_single_transition_of_1e30": Case(
        length=1, reward=lambda rng, step: 1e30, kwargs=dict(n_episodes=1), refused=large_rewards
    ),
    # Observations
    "observations_of_0": Case(lambda rng, step: np.zeros(3)),
    "observations_of_1e6": Case(lambda rng, step: np.full(3, 1e6)),
    "observations_of_1e30": Case(lambda rng, step: np.full(3, 1e30), refused=unless_normalized(GRADIENT, "quadratic")),
    "collinear_observations": Case(lambda rng, step: rng.normal() * np.array([1, 2, -3])),
    "denormal_observations": Case(lambda rng, step: 1e-40 * rng.normal(size=3)),
    "denormal_observations_in_float64": Case(
        lambda rng, step: 1e-310 * rng.normal(size=3), observation_space=box(dtype=np.float64)
    ),
    "observations_of_the_size_of_1e30": Case(
        lambda rng, step: 1e30 * rng.normal(size=3), refused=unless_normalized(GRADIENT, "quadratic")
    ),
    "observations_of_the_size_of_1e30_in_float64": Case(
        lambda rng, step: 1e30 * rng.normal(size=3),
        observation_space=box(dtype=np.float64),
        refused=unless_normalized(GRADIENT, "quadratic"),
    ),
    "observations_of_3e38_and_minus_3e38": Case(
        lambda rng, step: 3e38 * rng.choice([-1, 1], size=3),
        refused=unless_normalized(GRADIENT, "quadratic", "random_features"),
        warns="overflow encountered in (subtract|dot)",
    ),
    "observations_of_the_largest_float16": Case(
        lambda rng, step: 65504 * rng.choice([-1, 1], size=3), observation_space=box(dtype=np.float16)
    ),
    "observations_of_the_largest_integers": Case(
        lambda rng, step: rng.integers(-(2**62), 2**62, 3), observation_space=box(dtype=np.int64, bound=2**62)
    ),
    "observations_of_all_sizes": Case(
        lambda rng, step: [1e30, 1e-30, 1] * rng.normal(size=3), refused=unless_normalized(GRADIENT, "quadratic")
    ),
    "observations_that_are_rarely_1e30": Case(
        lambda rng, step: np.where(rng.random(3) < 0.1, 1e30, 1e-30), may=f"{GRADIENT}|{BASELINE}"
    ),
    "last_observations_of_1e38": Case(
        lambda rng, step: np.full(3, 1e38) if step == 5 else rng.normal(size=3), may=f"{GRADIENT}|{BASELINE}"
    ),
    "observations_and_rewards_without_a_mean": Case(
        lambda rng, step: rng.standard_cauchy(3), lambda rng, step: rng.standard_cauchy()
    ),
    "10_000_values_half_of_them_constant": Case(
        lambda rng, step: np.where(np.arange(10_000) % 2, 5, rng.normal(size=10_000)), observation_space=box(10_000)
    ),
    # Actions
    "action_bounds_of_1e30": Case(action_space=box(2, bound=1e30)),
    "action_bounds_of_3e38": Case(action_space=box(2, bound=3e38)),
    "action_bounds_of_1e300": Case(action_space=box(2, np.float64, bound=1e300)),
    "action_bounds_that_are_denormal": Case(action_space=box(2, bound=1e-40)),
    "action_bounds_without_room": Case(action_space=box(2, bound=0)),
    "squashed_actions_up_to_1e30": Case(
        action_space=box(2, bound=1e30), kwargs=dict(use_sde=True, **policy_kwargs(squash_output=True))
    ),
    # Policies
    "log_std_of_40": Case(kwargs=policy_kwargs(log_std_init=40.0)),
    "log_std_of_40_without_bounds": Case(action_space=UNBOUNDED, kwargs=policy_kwargs(log_std_init=40.0)),
    "log_std_of_60": Case(kwargs=policy_kwargs(log_std_init=60.0), refused=always(GRADIENT)),
    "log_std_of_88": Case(
        kwargs=policy_kwargs(log_std_init=88.0), refused=always(OUTPUT), warns="overflow encountered in multiply"
    ),
    "log_std_of_100": Case(
        kwargs=policy_kwargs(log_std_init=100.0), refused=always(OUTPUT), warns="overflow encountered in exp"
    ),
    "log_std_of_minus_20": Case(kwargs=policy_kwargs(log_std_init=-20.0)),
    "log_std_of_minus_60": Case(kwargs=policy_kwargs(log_std_init=-60.0), refused=always(GRADIENT)),
    "log_std_of_minus_200": Case(kwargs=policy_kwargs(log_std_init=-200.0), refused=always(OUTPUT)),
    "gsde_log_std_of_40": Case(kwargs=dict(use_sde=True, **policy_kwargs(log_std_init=40.0))),
    "gsde_log_std_of_60": Case(kwargs=dict(use_sde=True, **policy_kwargs(log_std_init=60.0)), refused=always(GRADIENT)),
    "gsde_log_std_of_minus_60": Case(kwargs=dict(use_sde=True, **policy_kwargs(log_std_init=-60.0))),
    "means_of_1e30": Case(action_space=UNBOUNDED, prepare=bias(1e30), refused=squared_actions),
    "denormal_weights": Case(prepare=lambda policy: [parameter.data.mul_(1e-40) for parameter in policy.parameters()]),
    **{
        f"{name}_with_a_logit_of_{value:g}": Case(action_space=space, prepare=bias(value))
        for name, space in DISCRETE_SPACES.items()
        for value in (100.0, 1e30, -3e38)
    },
    # Hyperparameters
    "target_kl_of_1e-300": Case(kwargs=dict(target_kl=1e-300)),
    "target_kl_of_100": Case(kwargs=dict(target_kl=100.0), may=GRADIENT),
    "target_kl_of_1e300": Case(kwargs=dict(target_kl=1e300)),
    "damping_of_1e-300": Case(kwargs=dict(cg_damping=1e-300, target_kl=0.02)),
    "damping_of_1e300": Case(kwargs=dict(cg_damping=1e300, target_kl=0.02), refused=always(UNDONE)),
    "many_steps_of_conjugate_gradients": Case(kwargs=dict(cg_damping=1e-8, cg_max_steps=50, target_kl=0.02)),
    "learning_rate_of_1e30": Case(kwargs=dict(learning_rate=1e30, target_kl=None), refused=always(UNDONE)),
    "learning_rate_of_1e-300": Case(kwargs=dict(learning_rate=1e-300, target_kl=None)),
    "ent_coef_of_1e30": Case(kwargs=dict(ent_coef=1e30), refused=always(GRADIENT)),
    "gamma_of_1e-300": Case(kwargs=dict(gamma=1e-300)),
    "memory_of_all_batches": Case(kwargs=dict(baseline_memory=1 - 1e-16)),
}


def state(model: REINFORCE) -> Any:
    """A copy of all that training changes."""
    return deepcopy((dict(model.get_parameters()), model._n_updates, model._next_episode))


def assert_finite(model: REINFORCE, refused: bool = False) -> None:
    """Weights, baseline, statistics, optimizer and, after an update, what was logged."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                check(f"{name}.{key}", entry)
        # These are bounds of the action space
        elif isinstance(value, th.Tensor) and not name.endswith((".features.low", ".features.high")):
            assert th.isfinite(value).all(), f"{name} is {value}"

    check("", dict(model.get_parameters()))
    for name, value in model.logger.name_to_value.items():
        # It is NaN when all returns are the same, as in SB3
        is_nan = name.endswith("explained_variance") and np.isnan(value)
        assert refused or is_nan or np.isfinite(value), f"{name} is {value}"


def check_training(case: Case, setting: dict[str, Any], n_updates: int = 3) -> None:
    kwargs = dict(n_episodes=3, seed=0, device="cpu", **setting) | case.kwargs
    kwargs["policy_kwargs"] = dict(net_arch=[4]) | kwargs.get("policy_kwargs", {})
    if kwargs["baseline"] == "random_features":
        kwargs["baseline_kwargs"] = dict(n_units=8)
    model = REINFORCE("MlpPolicy", NumbersEnv(case), **kwargs)
    case.prepare(model.policy)
    words = case.refused(setting)
    for _ in range(n_updates):
        before = state(model)
        try:
            model.learn(1, reset_num_timesteps=False)
        except ValueError as error:
            expected = words or case.may
            assert re.match(expected, str(error)), f"{setting}: refused with {error}"
            assert_same(state(model), before)
            assert_finite(model, refused=True)
            return
        assert_finite(model)
    assert words is None, f"{setting}: not refused"
    assert model._n_updates == n_updates


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_training_stays_finite_or_is_refused_in_documented_words(name: str, every: int):
    """Each case with some of the settings, from another first one each; with all of them in the slow tests."""
    case = CASES[name]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for setting in SETTINGS[list(CASES).index(name) % every :: every]:
            check_training(case, setting)
    messages = {str(warning.message) for warning in seen if issubclass(warning.category, RuntimeWarning)}
    assert all(re.match(case.warns, message) for message in messages), messages


# What is not as documented ---------------------------------------------------------------------------------------------------

TOO_LARGE = r"Environment 0 returned the (terminal )?observation .* at step \d of episode 0: .*too large for float32"


@pytest.mark.xfail(strict=True, reason="only what float32 observations cannot hold is refused as too large for it")
@pytest.mark.parametrize("step", [0, 2, 5])
def test_an_observation_in_float64_that_is_too_large_for_float32_is_refused_with_its_place(step: int):
    case = Case(
        lambda rng, now: np.full(3, 1e39 if now == step else 1.0),
        observation_space=box(dtype=np.float64),
        kwargs=dict(normalize_observations=False, seed=1),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = REINFORCE("MlpPolicy", NumbersEnv(case), **case.kwargs)
        with pytest.raises(ValueError, match=TOO_LARGE):
            model.learn(1)


def test_statistics_of_observations_whose_squares_overflow_stay_finite():
    """With a baseline, the fit refuses what is made of them."""
    case = Case(lambda rng, step: 1e200 * rng.normal(size=3), observation_space=box(dtype=np.float64))
    model = REINFORCE("MlpPolicy", NumbersEnv(case), baseline=None, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.learn(1)
        except ValueError as error:
            assert re.match(DOCUMENTED + "|Environment", str(error))
    assert_finite(model)


def test_a_learning_rate_that_float32_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="learning_rate"):
        REINFORCE("MlpPolicy", NumbersEnv(Case()), learning_rate=1e300, target_kl=None, seed=0)
    model = REINFORCE("MlpPolicy", NumbersEnv(Case()), learning_rate=lambda p: 1e300 if p < 1 else 0.1, target_kl=None, seed=0)
    with pytest.raises(ValueError, match="learning_rate"):
        model.learn(10_000)
    assert_finite(model)


def test_squashed_actions_are_finite_up_to_the_largest_bounds():
    """Or the space is refused."""
    seen: list[np.ndarray] = []

    class Recorded(NumbersEnv):
        def step(self, action: np.ndarray) -> Any:
            seen.append(action)
            return super().step(action)

    env = Recorded(Case(action_space=box(2, bound=3e38)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            REINFORCE("MlpPolicy", env, use_sde=True, policy_kwargs=dict(squash_output=True), seed=0).learn(1)
        except ValueError as error:
            assert "action" in str(error)
    assert all(map(math.isfinite, np.ravel(seen)))
