"""
The advantage functions are right by theory: the gradients of whole batches in a small Markov decision process have the means
and the variances that follow from adding up all that may happen.

The policy and both critics are tables that are set by hand and never trained. Episodes, critics, advantages and gradients are
those of the real algorithm. It divides by the number of transitions of a batch, which depends on chance: here gradients are
sums over an episode, whose mean is that of ``sum_t grad log pi(a_t|s_t) A_t``, without a discount of later steps.

What is expected is worked out in float64, from the definitions, in three ways: by linear equations, by dynamic programming
from the end of an episode to its beginning, and by writing out every possible episode. All randomness has fixed seeds.
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

from sb3_reinforce import REINFORCE, buffers, rollout
from sb3_reinforce.policies import action_values_of

ADVANTAGES = ["monte_carlo", "q", "advantage", "td"]

# The decision process --------------------------------------------------------------------------------------------------------

N_STATES, N_ACTIONS, GAMMA = 4, 3, 0.6
#: The number of "state" that episodes end in
END = N_STATES
BEGIN = np.array([0.6, 0.4, 0.0, 0.0])
#: (states, actions, next states and end): what an action leads to differs so much that every mistake below makes a difference
TRANSITIONS = np.array(
    [
        [[0.7, 0.0, 0.0, 0.3, 0.0], [0.0, 0.6, 0.0, 0.0, 0.4], [0.7, 0.1, 0.2, 0.0, 0.0]],
        [[0.3, 0.3, 0.3, 0.0, 0.1], [0.5, 0.2, 0.2, 0.0, 0.1], [0.6, 0.2, 0.0, 0.2, 0.0]],
        [[0.0, 0.2, 0.1, 0.4, 0.3], [0.0, 0.6, 0.0, 0.1, 0.3], [0.1, 0.2, 0.1, 0.6, 0.0]],
        [[0.3, 0.3, 0.0, 0.3, 0.1], [0.0, 0.0, 0.0, 0.0, 1.0], [0.9, 0.0, 0.0, 0.0, 0.1]],
    ]
)
#: For what is done, and for where it leads to
REWARDS = np.array([[2, 3, 3], [-2, -1, -2], [2, 2, 2], [1, -2, -1]])[:, :, None] + np.array([3.0, 5.0, 0.0, 5.0, 4.0])
LOGITS = np.array([[-0.1, 0.0, -0.6], [0.3, 0.4, -0.1], [-0.7, -0.5, -0.1], [0.6, -0.6, -0.1]])
POLICY = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
#: Critics that know nothing of the process
WRONG_VALUES = np.array([10.0, 3.0, 8.0, 9.0])
WRONG_ACTION_VALUES = np.array([[2.0, 0.0, -8.0], [7.0, 5.0, 3.0], [5.0, 9.0, -3.0], [-8.0, -2.0, -3.0]])


def exact_values() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Without a time limit, by linear equations.

    :return: (states,) values of the states, (states, actions) values of the actions, (states,) expected number of visits
    """
    rewards = np.einsum("san,san->sa", TRANSITIONS, REWARDS)
    between = np.einsum("sa,san->sn", POLICY, TRANSITIONS[:, :, :END])
    values = np.linalg.solve(np.eye(N_STATES) - GAMMA * between, (POLICY * rewards).sum(axis=1))
    action_values = rewards + GAMMA * TRANSITIONS[:, :, :END] @ values
    return values, action_values, np.linalg.solve(np.eye(N_STATES) - between.T, BEGIN)


EXACT_VALUES, EXACT_ACTION_VALUES, VISITS = exact_values()


@dataclass(frozen=True, eq=False)
class Case:
    """
    :param values: (states,) of the critic of states, None for no critic
    :param action_values: (states, actions) of the critic of actions
    :param limit: steps after which an episode times out, None for no limit
    :param bootstrap: whether the value of the last state stands for what would have followed a time-out
    """

    values: np.ndarray | None
    action_values: np.ndarray
    limit: int | None = None
    bootstrap: bool = True


CASES = {
    "exact": Case(EXACT_VALUES, EXACT_ACTION_VALUES),
    "wrong": Case(WRONG_VALUES, WRONG_ACTION_VALUES),
    "none": Case(None, WRONG_ACTION_VALUES),
    "limit_exact": Case(EXACT_VALUES, EXACT_ACTION_VALUES, limit=3),
    "limit_wrong": Case(WRONG_VALUES, WRONG_ACTION_VALUES, limit=3),
    "limit_is_an_end": Case(WRONG_VALUES, WRONG_ACTION_VALUES, limit=3, bootstrap=False),
}
#: Without a critic of states, returns are all there is
CASES_AND_ADVANTAGES = [(case, a) for case in CASES for a in (ADVANTAGES if case != "none" else ["monte_carlo"])]

# Theory ----------------------------------------------------------------------------------------------------------------------


def gradient(visits: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """
    The policy gradient by the logits, ``visits(s) pi(a|s) (worth(s, a) - sum_b pi(b|s) worth(s, b))``.

    :param visits: (states,) expected number of visits
    :param worth: (states, actions) expected worth of an action
    :return: (states, actions)
    """
    return visits[:, None] * POLICY * (worth - (POLICY * worth).sum(axis=1, keepdims=True))


def true_gradient(case: Case) -> np.ndarray:
    """
    That of the exact values of actions, which depend on the steps that are left if there is a limit.

    :return: (states, actions)
    """
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


@functools.cache
def theory(name: str, advantage: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Mean and variance of the gradient of an episode, from its end to its beginning.

    With the return G and the gradient X of what follows a state, the next step makes them ``r + gamma G`` and
    ``score (c + m G) + X``: the advantage is a number c, plus m = gamma times the return if it is that of Monte Carlo.
    Means of G, G^2, X, X^2 and G X after a step give those before it.

    :return: two arrays (states, actions)
    """
    case = CASES[name]
    values = np.zeros(N_STATES) if case.values is None else case.values
    # (states, actions, components): the derivative of log pi(a|s) by every logit
    score = np.zeros((N_STATES, N_ACTIONS, N_STATES, N_ACTIONS))
    for state in range(N_STATES):
        score[state, :, state] = np.eye(N_ACTIONS) - POLICY[state]
    score = score.reshape(N_STATES, N_ACTIONS, -1)
    n_components = score.shape[-1]
    probability = POLICY[:, :, None] * TRANSITIONS
    # Of the states, and 0 at the end
    g, gg = np.zeros((2, N_STATES + 1))
    x, xx, gx = np.zeros((3, N_STATES + 1, n_components))
    if case.limit is not None and case.bootstrap:
        g = np.append(values, 0.0)
        gg = g**2
    # Without a limit, hardly any episode has as many steps
    for left in range(case.limit or 300):
        next_values = np.append(values, 0.0)
        if left == 0 and not (case.limit is None or case.bootstrap):
            next_values = np.zeros(N_STATES + 1)
        c, m = {
            "monte_carlo": (REWARDS - values[:, None, None], GAMMA),
            "q": (np.repeat(case.action_values[:, :, None], END + 1, axis=2), 0.0),
            "advantage": (np.repeat((case.action_values - values[:, None])[:, :, None], END + 1, axis=2), 0.0),
            "td": (REWARDS + GAMMA * next_values - values[:, None, None], 0.0),
        }[advantage]
        new_g = (probability * (REWARDS + GAMMA * g)).sum(axis=(1, 2))
        new_gg = (probability * (REWARDS**2 + 2 * GAMMA * REWARDS * g + GAMMA**2 * gg)).sum(axis=(1, 2))
        first = (probability * (c + m * g)).sum(axis=2)
        new_x = np.einsum("sa,sac->sc", first, score) + np.einsum("san,nc->sc", probability, x)
        second = (probability * (c**2 + 2 * c * m * g + m**2 * gg)).sum(axis=2)
        mixed = np.einsum("san,nc->sac", probability * c, x) + m * np.einsum("san,nc->sac", probability, gx)
        new_xx = np.einsum("sa,sac->sc", second, score**2) + 2 * (score * mixed).sum(axis=1)
        new_xx += np.einsum("san,nc->sc", probability, xx)
        both = (probability * (REWARDS * c + (REWARDS * m + GAMMA * c) * g + GAMMA * m * gg)).sum(axis=2)
        new_gx = np.einsum("sa,sac->sc", both, score) + np.einsum("san,nc->sc", probability * REWARDS, x)
        new_gx += GAMMA * np.einsum("san,nc->sc", probability, gx)
        for old, new in ((g, new_g), (gg, new_gg), (x, new_x), (xx, new_xx), (gx, new_gx)):
            old[:END] = new
    mean = BEGIN @ x[:END]
    variance = BEGIN @ xx[:END] - mean**2
    return mean.reshape(N_STATES, N_ACTIONS), variance.reshape(N_STATES, N_ACTIONS)


def episodes(state, limit, probability=1.0):
    """
    Every episode from a state on.

    :return: a generator of its probability, its (state, action, reward) at each step, and the state in which it times out, if
        it does
    """
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


@pytest.mark.parametrize("name", ["limit_exact", "limit_wrong", "limit_is_an_end"])
def test_the_theory_agrees_with_every_possible_episode_written_out(name):
    """Proves the dynamic programming: means and variances of all four, from the definitions, in plain Python."""
    case = CASES[name]
    weights, sums = [], {advantage: [] for advantage in ADVANTAGES}
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
    for advantage in ADVANTAGES:
        mean = np.tensordot(weights, sums[advantage], axes=1)
        variance = np.tensordot(weights, (np.array(sums[advantage]) - mean) ** 2, axes=1)
        np.testing.assert_allclose(theory(name, advantage), [mean, variance], rtol=1e-9, atol=1e-9)


def test_the_theory_agrees_with_linear_equations():
    """Proves the means without a limit, true ones and biased ones: visits of a state times what its actions seem worth."""
    np.testing.assert_allclose((POLICY * EXACT_ACTION_VALUES).sum(axis=1), EXACT_VALUES)
    expected = REWARDS + GAMMA * np.append(WRONG_VALUES, 0)
    worth = {
        "monte_carlo": EXACT_ACTION_VALUES,
        "q": WRONG_ACTION_VALUES,
        "advantage": WRONG_ACTION_VALUES,
        "td": np.einsum("san,san->sa", TRANSITIONS, expected),
    }
    for advantage in ADVANTAGES:
        np.testing.assert_allclose(theory("wrong", advantage)[0], gradient(VISITS, worth[advantage]), rtol=1e-9)
        np.testing.assert_allclose(theory("exact", advantage)[0], gradient(VISITS, EXACT_ACTION_VALUES), rtol=1e-9)
    np.testing.assert_allclose(theory("none", "monte_carlo")[0], gradient(VISITS, EXACT_ACTION_VALUES), rtol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_return_minus_any_value_of_the_state_has_the_true_gradient_in_theory(name):
    """And every advantage function has it with exact critics."""
    exact = ADVANTAGES if CASES[name].values is EXACT_VALUES else ["monte_carlo"]
    for advantage in exact:
        np.testing.assert_allclose(theory(name, advantage)[0], true_gradient(CASES[name]), rtol=1e-9)


# The algorithm ---------------------------------------------------------------------------------------------------------------

N_BATCHES, N_EPISODES = 400, 10


class TabularEnv(gym.Env):
    """The decision process. What is observed at the end is a state that looks as if more could follow."""

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


def make_model(case, **kwargs):
    """Two environments, and tables for the policy and its critics."""
    env = DummyVecEnv([lambda: TabularEnv() if case.limit is None else TimeLimit(TabularEnv(), case.limit)] * 2)
    model = REINFORCE(
        "MlpPolicy",
        env,
        gamma=GAMMA,
        target_kl=None,
        normalize_advantage=False,
        normalize_observations=False,
        n_episodes=N_EPISODES,
        bootstrap_timeouts=case.bootstrap,
        policy_kwargs=dict(net_arch=[]),
        seed=0,
        **dict(baseline=None if case.values is None else "linear") | kwargs,
    )
    policy = model.policy
    with th.no_grad():
        policy.action_net.weight.copy_(th.as_tensor(LOGITS.T))
        policy.action_net.bias.zero_()
    if case.values is not None:
        policy.value_net.weight.copy_(th.as_tensor(case.values)[None])
    critic = action_values_of(policy)
    if critic is not None:
        # Of [state, action, state x action]; the first two have no weight
        n_alone = N_STATES + N_ACTIONS
        critic.linear.weight[0, n_alone:] = th.as_tensor(case.action_values.flatten())
    return model


NAMES = ("observations", "actions", "rewards", "episode_starts", "values", "action_values")


def collect(case, n_batches=N_BATCHES, **kwargs):
    """:return: the model, and the transitions of each batch with what its critics have made of them"""
    # The only one that has both critics
    advantage = "monte_carlo" if case.values is None else "advantage"
    model = make_model(case, **dict(advantage=advantage) | kwargs)
    _, callback = model._setup_learn(1)
    batches = []
    for _ in range(n_batches):
        assert model.collect_rollouts(model.get_env(), callback, model.rollout_buffer, None)
        assert model.rollout_buffer.episode_starts.sum() == N_EPISODES
        batches.append({name: np.copy(getattr(model.rollout_buffer, name)) for name in NAMES})
        # As after an update
        model._next_episode += N_EPISODES
    return model, batches


@pytest.fixture(scope="module")
def collected():
    """Model and batches of a case; all tests look at the same ones."""
    return functools.cache(lambda name: collect(CASES[name]))


def gradients(model, batches, advantage):
    """(batches, states, actions) mean gradient of an episode, of the sum over its steps."""
    buffer, found = model.rollout_buffer, []
    for batch in batches:
        for name in NAMES:
            setattr(buffer, name, batch[name])
        action_values = batch["action_values"] if batch["action_values"].ndim else None
        buffer.compute_returns_and_advantage(batch["values"], action_values, advantage)
        model.policy.zero_grad()
        for part in model._batches():
            model._add_gradient(part)
        # The loss is to be made small, and is a mean over transitions
        scale = -buffer.size() / N_EPISODES
        found.append(scale * model.policy.action_net.weight.grad.double().numpy().T)
    return np.array(found)


@pytest.fixture(scope="module")
def found(collected):
    """Gradients of a case and an advantage function."""
    return functools.cache(lambda name, advantage: gradients(*collected(name), advantage))


def deviations(found, name, advantage, mean=None):
    """
    :param found: (batches, states, actions) gradients
    :param name: case that they are compared with, as the advantage
    :param mean: (states, actions) expected instead of the mean of the theory
    :return: how many standard errors their mean and their variance are from what is expected, in any of the logits
    """
    n_batches = len(found)
    in_theory, variance = theory(name, advantage)
    of_mean = (found.mean(axis=0) - (in_theory if mean is None else mean)) / np.sqrt(variance / (n_batches * N_EPISODES))
    # A batch has the mean of several episodes
    squares = N_EPISODES * (found - found.mean(axis=0)) ** 2
    of_variance = (squares.mean(axis=0) - variance) / (squares.std(axis=0) / np.sqrt(n_batches))
    return dict(mean=np.abs(of_mean).max(), variance=np.abs(of_variance).max())


@pytest.mark.parametrize("name", [name for name in CASES if name != "none"])
def test_the_critics_are_the_tables(collected, name):
    """Proves that the critics were asked about the states and the actions of the batch, in the order of the batch."""
    _, batches = collected(name)
    for batch in batches[:20]:
        states, actions = batch["observations"].flatten().astype(int), batch["actions"].flatten().astype(int)
        np.testing.assert_allclose(batch["values"], CASES[name].values[states], rtol=1e-6)
        np.testing.assert_allclose(batch["action_values"], CASES[name].action_values[states, actions], rtol=1e-6)


@pytest.mark.parametrize("name, advantage", CASES_AND_ADVANTAGES)
def test_a_model_learns_from_the_advantages_that_are_looked_at_here(collected, name, advantage):
    """Proves that what holds for the gradients here holds for a model that is told to use that advantage function."""
    own, _ = collect(CASES[name], n_batches=1, advantage=advantage)
    model, batches = collected(name)
    gradients(model, batches[:1], advantage)
    np.testing.assert_array_equal(own.rollout_buffer.advantages, model.rollout_buffer.advantages)


@pytest.mark.parametrize("name, advantage", CASES_AND_ADVANTAGES)
def test_gradients_have_the_mean_and_the_variance_of_theory(found, name, advantage):
    """
    Proves all four, with critics that are exact and critics that are wrong, without a limit, with time-outs that the critic
    looks beyond, and with time-outs that are ends: within five standard errors for every logit.
    """
    for statistic, errors in deviations(found(name, advantage), name, advantage).items():
        assert errors < 5, statistic


@pytest.mark.parametrize("name", ["exact", "wrong", "none", "limit_is_an_end"])
def test_monte_carlo_is_unbiased_whatever_the_values_are(found, name):
    """Proves that a baseline, good or bad or none, leaves the policy gradient theorem as it is."""
    gradients = found(name, "monte_carlo")
    assert deviations(gradients, name, "monte_carlo", true_gradient(CASES[name]))["mean"] < 5


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("name", ["exact", "limit_exact"])
def test_with_exact_critics_every_advantage_function_is_unbiased(found, name, advantage):
    """Proves that they estimate the same thing: up to a time-out, too, where the critic knows what would have followed."""
    gradients = found(name, advantage)
    assert deviations(gradients, name, advantage, true_gradient(CASES[name]))["mean"] < 5


@pytest.mark.parametrize("advantage", ["q", "advantage", "td"])
@pytest.mark.parametrize("name", ["wrong", "limit_wrong", "limit_is_an_end"])
def test_actor_critics_are_biased_by_what_their_critics_have_wrong(found, name, advantage):
    """Proves that they learn from their critics, and that the tests here would see it if REINFORCE did so."""
    gradients = found(name, advantage)
    assert deviations(gradients, name, advantage, true_gradient(CASES[name]))["mean"] > 10


def test_variances_are_in_the_order_of_theory(found):
    """
    Proves what the advantage functions are for. With exact critics, the chance of one step is in "td" and that of all steps in
    "monte_carlo"; without the values of states, how much these vary is in the gradient. Sums over all logits.
    """
    order = [("exact", "advantage"), ("exact", "td"), ("exact", "monte_carlo"), ("exact", "q")]
    in_theory = np.array([theory(*one)[1].sum() for one in order])
    assert (in_theory[1:] / in_theory[:-1] > [1.8, 1.4, 10]).all()
    of_episodes = np.array([N_EPISODES * found(*one).var(axis=0).sum() for one in order])
    np.testing.assert_allclose(of_episodes, in_theory, rtol=0.1)
    # A good baseline is worth its trouble
    assert found("none", "monte_carlo").var(axis=0).sum() > 10 * found("exact", "monte_carlo").var(axis=0).sum()


# Mistakes --------------------------------------------------------------------------------------------------------------------


def shift(array):
    """What comes after each transition in the batch, whatever episode it is of."""
    return np.append(array[1:], 0.0)


def is_last(buffer):
    return np.append(buffer.episode_starts[1:], True)


def next_values(buffer):
    return np.where(is_last(buffer), 0.0, shift(buffer.values))


def td(buffer, values):
    return buffer.rewards + buffer.gamma * values - buffer.values


def step_numbers(buffer):
    starts = np.flatnonzero(buffer.episode_starts)
    return np.arange(buffer.size()) - np.repeat(starts, np.diff(np.append(starts, buffer.size())))


def endless_returns(buffer):
    """As if the batch were one episode."""
    returns = np.array(buffer.rewards)
    for step in reversed(range(len(returns) - 1)):
        returns[step] += buffer.gamma * returns[step + 1]
    return returns


FUNCTIONS = {
    "monte_carlo": "monte_carlo_advantages",
    "q": "q_advantages",
    "advantage": "action_advantages",
    "td": "td_advantages",
}
#: Advantage function, case, what shows it, and the formula with the mistake
MISTAKES = {
    "return_with_the_wrong_sign": ("monte_carlo", "exact", "mean", lambda b: b.values - b.returns),
    "return_plus_the_value": ("monte_carlo", "exact", "variance", lambda b: b.returns + b.values),
    "return_without_the_value": ("monte_carlo", "exact", "variance", lambda b: b.returns),
    "return_minus_the_next_value": ("monte_carlo", "wrong", "mean", lambda b: b.returns - shift(b.values)),
    "return_of_the_next_step": ("monte_carlo", "exact", "mean", lambda b: (b.returns - b.rewards) / b.gamma - b.values),
    "return_of_one_step": ("monte_carlo", "exact", "mean", lambda b: b.rewards - b.values),
    "return_over_ends": ("monte_carlo", "exact", "variance", lambda b: endless_returns(b) - b.values),
    "return_with_a_discount_of_later_steps": (
        "monte_carlo",
        "exact",
        "mean",
        lambda b: b.gamma ** step_numbers(b) * (b.returns - b.values),
    ),
    "q_with_the_wrong_sign": ("q", "exact", "mean", lambda b: -b.action_values),
    "q_as_the_article_prints_it": ("q", "exact", "mean", lambda b: b.returns - b.action_values),
    "q_of_the_next_step": ("q", "exact", "mean", lambda b: shift(b.action_values)),
    "q_minus_the_value": ("q", "exact", "variance", lambda b: b.action_values - b.values),
    "advantage_with_the_wrong_sign": ("advantage", "exact", "mean", lambda b: b.values - b.action_values),
    "advantage_plus_the_value": ("advantage", "exact", "variance", lambda b: b.action_values + b.values),
    "advantage_without_the_value": ("advantage", "exact", "variance", lambda b: b.action_values),
    "advantage_above_the_next_value": ("advantage", "wrong", "mean", lambda b: b.action_values - shift(b.values)),
    "advantage_of_the_return": ("advantage", "wrong", "mean", lambda b: b.returns - b.values),
    "td_with_the_wrong_sign": ("td", "wrong", "mean", lambda b: -td(b, next_values(b))),
    "td_minus_the_next_value": ("td", "wrong", "mean", lambda b: td(b, -next_values(b))),
    "td_plus_the_value_of_the_state": ("td", "wrong", "variance", lambda b: td(b, next_values(b)) + 2 * b.values),
    "td_without_the_value_of_the_state": ("td", "exact", "variance", lambda b: td(b, next_values(b)) + b.values),
    "td_without_the_next_value": ("td", "wrong", "mean", lambda b: td(b, 0.0)),
    "td_with_the_value_of_the_state_as_the_next": ("td", "wrong", "mean", lambda b: td(b, b.values)),
    "td_with_the_value_two_steps_ahead": ("td", "wrong", "mean", lambda b: td(b, shift(next_values(b)))),
    "td_with_the_reward_of_the_next_step": (
        "td",
        "wrong",
        "mean",
        lambda b: td(b, next_values(b)) - b.rewards + shift(b.rewards),
    ),
    "td_with_the_next_episode_after_an_end": ("td", "wrong", "mean", lambda b: td(b, shift(b.values))),
    "td_with_the_next_episode_after_a_timeout": ("td", "limit_wrong", "mean", lambda b: td(b, shift(b.values))),
    "td_with_the_next_episode_after_a_limit": ("td", "limit_is_an_end", "mean", lambda b: td(b, shift(b.values))),
    "td_with_the_last_state_after_an_end": (
        "td",
        "wrong",
        "mean",
        lambda b: td(b, np.where(is_last(b), b.values, next_values(b))),
    ),
    "td_without_a_discount": ("td", "wrong", "mean", lambda b: td(b, next_values(b) / b.gamma)),
    "td_with_two_discounts": ("td", "wrong", "mean", lambda b: td(b, next_values(b) * b.gamma)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_formula_would_be_seen(collected, mistake, monkeypatch):
    """
    Proves that the comparison with theory can fail: with the mistake in the place of the function that the buffers use, the
    mean (or where a mistake leaves that as it is, the variance) is further than ten standard errors from the theory.
    """
    advantage, name, statistic, formula = MISTAKES[mistake]
    model, batches = collected(name)
    monkeypatch.setattr(buffers, FUNCTIONS[advantage], lambda *args: formula(model.rollout_buffer))
    found = gradients(model, batches, advantage)
    assert deviations(found, name, advantage)[statistic] > 10


def timeout_values(infos, worth):
    return np.array([worth(info) if "terminal_observation" in info else 0.0 for info in infos])


def is_timeout(info):
    return info["TimeLimit.truncated"]


def last_value(info):
    return WRONG_VALUES[int(info["terminal_observation"])]


#: Case, and what is taken for the value of what would have followed the last observation of an episode
MISTAKES_AT_ENDS = {
    "terminal_state_taken_for_a_timeout": ("limit_wrong", last_value),
    "timeout_taken_for_a_terminal_state": ("limit_wrong", lambda info: 0.0),
    "terminal_state_and_timeout_exchanged": ("limit_wrong", lambda info: 0.0 if is_timeout(info) else last_value(info)),
    "value_with_the_wrong_sign": ("limit_wrong", lambda info: -last_value(info) if is_timeout(info) else 0.0),
    "value_without_a_discount": ("limit_wrong", lambda info: last_value(info) / GAMMA if is_timeout(info) else 0.0),
    "terminal_state_without_a_limit": ("wrong", last_value),
}


@pytest.mark.parametrize("mistake", MISTAKES_AT_ENDS)
def test_a_mistake_at_the_end_of_an_episode_would_be_seen(mistake, monkeypatch):
    """Proves that terminal states are told from time-outs: episodes are collected again, with the mistake."""
    name, worth = MISTAKES_AT_ENDS[mistake]
    monkeypatch.setattr(rollout, "timeout_values", lambda policy, infos, schedule: timeout_values(infos, worth))
    model, batches = collect(CASES[name], n_batches=300)
    for advantage in ("monte_carlo", "td"):
        found = gradients(model, batches, advantage)
        assert deviations(found, name, advantage)["mean"] > 10


@pytest.mark.parametrize("advantage", ["monte_carlo", "td"])
@pytest.mark.parametrize("name, other", [("limit_wrong", "limit_is_an_end"), ("limit_is_an_end", "limit_wrong")])
def test_the_opposite_of_bootstrap_timeouts_would_be_seen(found, name, other, advantage):
    """Proves that the argument is heeded, either way."""
    assert deviations(found(name, advantage), other, advantage)["mean"] > 10
