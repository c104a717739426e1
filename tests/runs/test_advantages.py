"""
Gradients of whole batches in a small Markov decision process have the means and variances of theory.

Policy and critics are tables that are set by hand and never trained. Episodes, critics and advantages are those of the
algorithm. Gradients are sums over an episode: ``sum_t grad log pi(a_t|s_t) A_t``, without a discount of later steps.

Expected values follow from the definitions: from linear equations or, with a time limit, the sum over all possible episodes.
"""

import functools
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE

ADVANTAGES = ["monte_carlo", "q", "advantage", "td"]

# The decision process --------------------------------------------------------------------------------------------------------

N_STATES, N_ACTIONS, GAMMA = 4, 3, 0.6
#: State after the end of an episode
END = N_STATES
BEGIN = np.array([0.6, 0.4, 0.0, 0.0])
#: (states, actions, next states and END)
TRANSITIONS = np.array(
    [
        [[0.7, 0.0, 0.0, 0.3, 0.0], [0.0, 0.6, 0.0, 0.0, 0.4], [0.7, 0.1, 0.2, 0.0, 0.0]],
        [[0.3, 0.3, 0.3, 0.0, 0.1], [0.5, 0.2, 0.2, 0.0, 0.1], [0.6, 0.2, 0.0, 0.2, 0.0]],
        [[0.0, 0.2, 0.1, 0.4, 0.3], [0.0, 0.6, 0.0, 0.1, 0.3], [0.1, 0.2, 0.1, 0.6, 0.0]],
        [[0.3, 0.3, 0.0, 0.3, 0.1], [0.0, 0.0, 0.0, 0.0, 1.0], [0.9, 0.0, 0.0, 0.0, 0.1]],
    ]
)
#: For the action, and for the next state
REWARDS = np.array([[2, 3, 3], [-2, -1, -2], [2, 2, 2], [1, -2, -1]])[:, :, None] + np.array([3.0, 5.0, 0.0, 5.0, 4.0])
LOGITS = np.array([[-0.1, 0.0, -0.6], [0.3, 0.4, -0.1], [-0.7, -0.5, -0.1], [0.6, -0.6, -0.1]])
POLICY = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
#: Arbitrary critics
WRONG_VALUES = np.array([10.0, 3.0, 8.0, 9.0])
WRONG_ACTION_VALUES = np.array([[2.0, 0.0, -8.0], [7.0, 5.0, 3.0], [5.0, 9.0, -3.0], [-8.0, -2.0, -3.0]])


def exact_values() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(states,) values, (states, actions) action values and (states,) expected visits, without a time limit."""
    rewards = np.einsum("san,san->sa", TRANSITIONS, REWARDS)
    between = np.einsum("sa,san->sn", POLICY, TRANSITIONS[:, :, :END])
    values = np.linalg.solve(np.eye(N_STATES) - GAMMA * between, (POLICY * rewards).sum(axis=1))
    action_values = rewards + GAMMA * TRANSITIONS[:, :, :END] @ values
    return values, action_values, np.linalg.solve(np.eye(N_STATES) - between.T, BEGIN)


EXACT_VALUES, EXACT_ACTION_VALUES, VISITS = exact_values()


@dataclass(frozen=True, eq=False)
class Case:
    """Values of the critics, the time limit and ``bootstrap_timeouts``."""

    values: np.ndarray | None
    action_values: np.ndarray
    limit: int | None = None
    bootstrap: bool = True


CASES = {
    "exact": Case(EXACT_VALUES, EXACT_ACTION_VALUES),
    "wrong": Case(WRONG_VALUES, WRONG_ACTION_VALUES),
    "none": Case(None, WRONG_ACTION_VALUES),
    "limit_wrong": Case(WRONG_VALUES, WRONG_ACTION_VALUES, limit=3),
    "limit_is_an_end": Case(WRONG_VALUES, WRONG_ACTION_VALUES, limit=3, bootstrap=False),
}
# Theory ----------------------------------------------------------------------------------------------------------------------


def gradient(visits: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """(states, actions) policy gradient: ``visits(s) pi(a|s) (worth(s, a) - sum_b pi(b|s) worth(s, b))``."""
    return visits[:, None] * POLICY * (worth - (POLICY * worth).sum(axis=1, keepdims=True))


def true_gradient(case: Case) -> np.ndarray:
    """(states, actions) gradient of the exact action values, which depend on the remaining steps if there is a limit."""
    if case.limit is None:
        return gradient(VISITS, EXACT_ACTION_VALUES)
    values = case.values if case.bootstrap and case.values is not None else np.zeros(N_STATES)
    action_values = []
    for _ in range(case.limit):
        action_values.insert(0, np.einsum("san,san->sa", TRANSITIONS, REWARDS + GAMMA * np.append(values, 0)))
        values = (POLICY * action_values[0]).sum(axis=1)
    total, visits = np.zeros((N_STATES, N_ACTIONS)), BEGIN
    for worth in action_values:
        total += gradient(visits, worth)
        visits = np.einsum("s,sa,san->n", visits, POLICY, TRANSITIONS[:, :, :END])
    return total


def episodes(state, limit, probability=1.0):
    """Yield probability, (state, action, reward) of each step and the state of a time-out of each possible episode."""
    if limit == 0:
        yield probability, [], state
        return
    for action in range(N_ACTIONS):
        for following in range(END + 1):
            p = probability * POLICY[state, action] * TRANSITIONS[state, action, following]
            step = (state, action, REWARDS[state, action, following])
            if p > 0 and following == END:
                yield p, [step], None
            elif p > 0:
                for q, steps, last in episodes(following, limit - 1, p):
                    yield q, [step, *steps], last


@functools.cache
def enumerated(name):
    """Mean and variance of the gradient of an episode with a time limit, for each advantage function."""
    case, weights, sums = CASES[name], [], {advantage: [] for advantage in ADVANTAGES}
    for begin in range(2):
        for probability, steps, last in episodes(begin, case.limit, BEGIN[begin]):
            after = case.values[last] if last is not None and case.bootstrap else 0.0
            weights.append(probability)
            total = {advantage: np.zeros((N_STATES, N_ACTIONS)) for advantage in ADVANTAGES}
            for t, (state, action, reward) in enumerate(steps):
                following = sum(GAMMA**lag * r for lag, (_, _, r) in enumerate(steps[t:])) + GAMMA ** (len(steps) - t) * after
                next_value = case.values[steps[t + 1][0]] if t + 1 < len(steps) else after
                value, action_value = case.values[state], case.action_values[state, action]
                score = np.eye(N_ACTIONS)[action] - POLICY[state]
                total["monte_carlo"][state] += score * (following - value)
                total["q"][state] += score * action_value
                total["advantage"][state] += score * (action_value - value)
                total["td"][state] += score * (reward + GAMMA * next_value - value)
            for advantage in ADVANTAGES:
                sums[advantage].append(total[advantage])
    assert sum(weights) == pytest.approx(1)
    means = {advantage: np.tensordot(weights, sums[advantage], axes=1) for advantage in ADVANTAGES}
    return {a: (means[a], np.tensordot(weights, (np.array(sums[a]) - means[a]) ** 2, axes=1)) for a in ADVANTAGES}


def theory(name, advantage):
    """(states, actions) mean and variance of the gradient of an episode; without a limit, the variance is None."""
    case = CASES[name]
    if case.limit is not None:
        return enumerated(name)[advantage]
    next_values = np.append(np.zeros(N_STATES) if case.values is None else case.values, 0)
    worth = {
        "monte_carlo": EXACT_ACTION_VALUES,
        "q": case.action_values,
        "advantage": case.action_values,
        "td": np.einsum("san,san->sa", TRANSITIONS, REWARDS + GAMMA * next_values),
    }
    return gradient(VISITS, worth[advantage]), None


@pytest.mark.parametrize("name", CASES)
def test_monte_carlo_is_unbiased_in_theory(name):
    """The possible episodes agree with dynamic programming."""
    np.testing.assert_allclose(theory(name, "monte_carlo")[0], true_gradient(CASES[name]), rtol=1e-9)


# The algorithm ---------------------------------------------------------------------------------------------------------------

N_BATCHES, N_EPISODES = 250, 10


class TabularEnv(gym.Env):
    """The decision process. Terminal observations look like a state that is not terminal."""

    observation_space = spaces.Discrete(N_STATES)
    action_space = spaces.Discrete(N_ACTIONS)
    next_states = np.cumsum(TRANSITIONS, axis=2)
    next_states[:, :, -1] = 1.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.random() >= BEGIN[0])
        return self.state, {}

    def step(self, action):
        following = int(np.searchsorted(self.next_states[self.state, action], self.np_random.random(), side="right"))
        reward = float(REWARDS[self.state, action, following])
        is_over = following == END
        self.state = 2 if is_over else following
        return self.state, reward, is_over, False, {}


def make_model(case, advantage):
    """Two environments, and tables for the policy and its critics."""
    model = REINFORCE(
        "MlpPolicy",
        DummyVecEnv([lambda: TabularEnv() if case.limit is None else TimeLimit(TabularEnv(), case.limit)] * 2),
        gamma=GAMMA,
        target_kl=None,
        normalize_advantage=False,
        normalize_observations=False,
        n_episodes=N_EPISODES,
        advantage=advantage,
        baseline=None if case.values is None else "linear",
        bootstrap_timeouts=case.bootstrap,
        policy_kwargs=dict(net_arch=[]),
        seed=0,
    )
    with th.no_grad():
        model.policy.action_net.weight.copy_(th.as_tensor(LOGITS.T))
        model.policy.action_net.bias.zero_()
    if case.values is not None:
        model.policy.value_net.weight.copy_(th.as_tensor(case.values)[None])
    if (critic := model.policy.action_value_net) is not None:
        # Of [state, action, state x action]; the first two have no weight
        critic.linear.weight[0, N_STATES + N_ACTIONS :] = th.as_tensor(case.action_values.flatten())
    return model


class Batches:
    """Batches of a case, from one model; the advantages of each are computed again for each advantage function."""

    def __init__(self, case, n_batches=N_BATCHES):
        self.model = make_model(case, "monte_carlo" if case.values is None else "advantage")
        self.names = ("observations", "actions", "rewards", "episode_starts", "values")
        _, callback = self.model._setup_learn(1)
        self.batches = []
        for _ in range(n_batches):
            buffer = self.model.rollout_buffer
            assert self.model.collect_rollouts(self.model.get_env(), callback, buffer, None)
            assert buffer.episode_starts.sum() == N_EPISODES
            self.batches.append({name: np.copy(getattr(buffer, name)) for name in self.names})
            self.model._next_episode += N_EPISODES

    def gradients(self, advantage, n_batches=None):
        """(batches, states, actions) mean gradient of an episode."""
        self.model.advantage, buffer, found = advantage, self.model.rollout_buffer, []
        for batch in self.batches[:n_batches]:
            for name in self.names:
                setattr(buffer, name, batch[name])
            self.model._compute_advantages()
            states, actions = (batch[name].flatten().astype(int) for name in ("observations", "actions"))
            total = np.zeros((N_STATES, N_ACTIONS))
            np.add.at(total, states, (np.eye(N_ACTIONS)[actions] - POLICY[states]) * buffer.advantages[:, None])
            found.append(total / N_EPISODES)
        return np.array(found)


@pytest.fixture(scope="module")
def batches():
    return functools.cache(lambda name: Batches(CASES[name]))


@pytest.fixture(scope="module")
def found(batches):
    return functools.cache(lambda name, advantage: batches(name).gradients(advantage))


def deviations(found, name, advantage, mean=None):
    """
    How far gradients are from the theory.

    :param found: (batches, states, actions) gradients
    :param name: case of the theory
    :param advantage: advantage function of the theory
    :param mean: (states, actions) expected instead of the mean of the theory
    :return: largest deviation of the mean and, if it is known, of the variance, in standard errors
    """
    n_batches = len(found)
    in_theory, variance = theory(name, advantage)
    if variance is None:
        errors = (found.mean(axis=0) - (in_theory if mean is None else mean)) / (found.std(axis=0) / np.sqrt(n_batches))
        return dict(mean=np.abs(errors).max())
    of_mean = (found.mean(axis=0) - (in_theory if mean is None else mean)) / np.sqrt(variance / (n_batches * N_EPISODES))
    squares = N_EPISODES * (found - found.mean(axis=0)) ** 2
    of_variance = (squares.mean(axis=0) - variance) / (squares.std(axis=0) / np.sqrt(n_batches))
    return dict(mean=np.abs(of_mean).max(), variance=np.abs(of_variance).max())


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_the_gradient_of_the_model_is_the_gradient_of_these_tests(batches, advantage):
    """A model with that advantage function has the same batches, critics, advantages and gradients."""
    case = CASES["wrong"]
    own = make_model(case, advantage)
    _, callback = own._setup_learn(1)
    buffer = own.rollout_buffer
    assert own.collect_rollouts(own.get_env(), callback, buffer, None)
    (expected,) = batches("wrong").gradients(advantage, n_batches=1)
    np.testing.assert_array_equal(buffer.advantages, batches("wrong").model.rollout_buffer.advantages)
    states, actions = buffer.observations.flatten().astype(int), buffer.actions.flatten().astype(int)
    np.testing.assert_allclose(buffer.values, case.values[states], rtol=1e-6)
    if advantage in ("q", "advantage"):
        np.testing.assert_allclose(buffer.action_values, case.action_values[states, actions], rtol=1e-6)
    own._compute_gradient()
    # The loss is a negative mean over transitions
    found = -own.policy.action_net.weight.grad.double().numpy().T * buffer.size() / N_EPISODES
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, advantage", [(n, a) for n in CASES for a in ADVANTAGES if n != "none" or a == "monte_carlo"])
def test_gradients_have_the_mean_and_variance_of_theory(found, name, advantage):
    """Within five standard errors. Monte Carlo is unbiased for any values, all of them are for exact critics."""
    gradients, truth = found(name, advantage), true_gradient(CASES[name])
    for statistic, errors in deviations(gradients, name, advantage).items():
        assert errors < 5, statistic
    is_unbiased = advantage == "monte_carlo" or name == "exact"
    bias = deviations(gradients, name, advantage, truth)["mean"]
    assert bias < 5 if is_unbiased else bias > 10
