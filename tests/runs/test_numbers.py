"""Extreme numbers: training stays finite, or stops with a documented error that leaves the model as before."""

import itertools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_reinforce import REINFORCE
from tests.runs.common import CHOICE, PAIR, assert_same, state

UNDONE = r"Update \d+ was undone\. (The divergence .* is infinite|Expected (parameter|value))"
GRADIENT = r"Update \d+ was undone\. The gradient is not finite"
BASELINE = "The baseline cannot be fitted to features or returns that are NaN, infinite or near overflow"
STATISTICS = r"Update \d+ was undone\. The variance of observations is not finite: scale them down"
ACTION = "The policy returned the action .* NaN, infinite, or too large for float32"
#: A note in an error of PyTorch
OUTPUT = "The policy's output is not finite: check its weights"

#: Critics, steps, and normalizations
SETTINGS = [
    dict(advantage=advantage, baseline=baseline, target_kl=target_kl, **normalize)
    for advantage, baseline in [
        ("monte_carlo", None),
        ("monte_carlo", "random_features"),
        ("advantage", "linear"),
        ("td", "linear"),
    ]
    for target_kl, normalize in itertools.product(
        (None, 0.02),
        [dict(normalize_observations=o, normalize_advantage=a) for o, a in itertools.product((True, False), repeat=2)],
    )
]


def box(n: int = 3, dtype: type = np.float32, bound: float = np.inf) -> spaces.Box:
    return spaces.Box(-bound, bound, (n,), dtype)


@dataclass(frozen=True)
class Case:
    """
    An environment and a model with extreme numbers.

    :param observe: observation, from a generator and the step of the episode
    :param reward: likewise
    :param length: number of steps of each episode
    :param prepare: changes the policy before training
    :param kwargs: arguments of the model, which replace those of the setting
    :param refused: error that ends training in a setting, None if there is none
    :param may: error that may end training: whether it does depends on rounding
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
    """Their gradient overflows float32 unless advantages are normalized."""
    return None if setting["normalize_advantage"] else GRADIENT


def bias(value: float) -> Callable[[Any], Any]:
    return lambda policy: policy.action_net.bias.data[0].fill_(value)


def log_std(value: float, **kwargs: Any) -> dict[str, Any]:
    return dict(policy_kwargs=dict(log_std_init=value), **kwargs)


UNBOUNDED = box(2)
CASES = {
    # Rewards
    "rewards_of_1e30": Case(reward=lambda rng, step: 1e30 * rng.normal(), refused=large_rewards),
    "denormal_rewards": Case(reward=lambda rng, step: 1e-40 * rng.normal()),
    "rewards_of_0.1": Case(reward=lambda rng, step: 0.1),
    # Episodes
    "a_single_transition": Case(length=1, kwargs=dict(n_episodes=1)),
    # Observations
    "observations_of_0": Case(lambda rng, step: np.zeros(3)),
    "collinear_observations": Case(lambda rng, step: rng.normal() * np.array([1, 2, -3])),
    "denormal_observations": Case(lambda rng, step: 1e-310 * rng.normal(size=3), observation_space=box(dtype=np.float64)),
    "observations_of_1e30": Case(lambda rng, step: 1e30 * rng.normal(size=3), may=f"{GRADIENT}|{BASELINE}"),
    # The value of a last observation overflows, which is reported as a reward
    "observations_of_3e38": Case(
        lambda rng, step: 3e38 * rng.choice([-1, 1], size=3),
        may=f"{GRADIENT}|{BASELINE}|Environment 0 returned the reward nan",
    ),
    "observations_of_1e200": Case(
        lambda rng, step: 1e200 * rng.normal(size=3),
        observation_space=box(dtype=np.float64),
        may=f"{GRADIENT}|{BASELINE}|{STATISTICS}|{ACTION}",
    ),
    "rare_observations_of_1e30": Case(
        lambda rng, step: np.where(rng.random(3) < 0.1, 1e30, 1e-30), may=f"{GRADIENT}|{BASELINE}"
    ),
    "heavy_tails": Case(lambda rng, step: rng.standard_cauchy(3), lambda rng, step: rng.standard_cauchy()),
    # Actions
    "action_bounds_of_3e38": Case(action_space=box(2, bound=3e38)),
    "action_bounds_of_0": Case(action_space=box(2, bound=0)),
    "squashed_actions_of_1e30": Case(
        action_space=box(2, bound=1e30), kwargs=dict(use_sde=True, policy_kwargs=dict(squash_output=True))
    ),
    # Policies
    "log_std_of_40": Case(action_space=UNBOUNDED, kwargs=log_std(40.0)),
    "log_std_of_60": Case(kwargs=log_std(60.0), refused=always(GRADIENT)),
    "log_std_of_100": Case(kwargs=log_std(100.0), refused=always(f"{OUTPUT}|{ACTION}")),
    "log_std_of_-60": Case(kwargs=log_std(-60.0), refused=always(GRADIENT)),
    "log_std_of_-200": Case(kwargs=log_std(-200.0), refused=always(f"{OUTPUT}|Expected parameter scale")),
    "denormal_weights": Case(prepare=lambda policy: [parameter.data.mul_(1e-40) for parameter in policy.parameters()]),
    "a_logit_of_1e30": Case(action_space=CHOICE, prepare=bias(1e30)),
    "a_logit_of_-3e38": Case(action_space=spaces.MultiBinary(2), prepare=bias(-3e38)),
    # Hyperparameters
    "target_kl_of_1e-300": Case(kwargs=dict(target_kl=1e-300)),
    "target_kl_of_1e300": Case(kwargs=dict(target_kl=1e300)),
    "damping_of_1e-300": Case(kwargs=dict(cg_damping=1e-300, target_kl=0.02)),
    "damping_of_1e300": Case(kwargs=dict(cg_damping=1e300, target_kl=0.02), may=UNDONE),
    "learning_rate_of_1e30": Case(kwargs=dict(learning_rate=1e30, target_kl=None), refused=always(UNDONE)),
    "ent_coef_of_1e30": Case(kwargs=dict(ent_coef=1e30), refused=always(GRADIENT)),
    "gamma_of_1e-300": Case(kwargs=dict(gamma=1e-300)),
    "baseline_memory_of_almost_1": Case(kwargs=dict(baseline_memory=1 - 1e-16)),
}


def assert_finite(model: REINFORCE, refused: bool = False) -> None:
    """Weights, baseline, statistics, optimizer and, after an update, logged values."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                check(f"{name}.{key}", entry)
        # Bounds of the action space may be infinite
        elif isinstance(value, th.Tensor) and not name.endswith(("action_value_net.low", "action_value_net.high")):
            assert th.isfinite(value).all(), f"{name} is {value}"

    check("", dict(model.get_parameters()))
    for name, value in model.logger.name_to_value.items():
        # NaN if all returns are equal, as in SB3
        is_nan = name.endswith("explained_variance") and np.isnan(value)
        assert refused or is_nan or np.isfinite(value), f"{name} is {value}"


def check_training(case: Case, setting: dict[str, Any], n_updates: int = 3) -> None:
    kwargs = dict(n_steps=None, n_episodes=3, seed=0, device="cpu", **setting) | case.kwargs
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
            message = "\n".join([*getattr(error, "__notes__", []), str(error)])
            assert re.match(words or case.may, message), f"{setting}: refused with {error!r}, {message}"
            assert_same(state(model), before)
            assert_finite(model, refused=True)
            return
        assert_finite(model)
    assert words is None, f"{setting}: not refused"
    assert model._n_updates == n_updates


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_training_stays_finite_or_is_refused(name: str, every: int):
    """With some of the settings, different ones for each case; with all of them in the slow tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered|invalid value encountered|underflow", RuntimeWarning)
        for setting in SETTINGS[list(CASES).index(name) % every :: every]:
            check_training(CASES[name], setting)
