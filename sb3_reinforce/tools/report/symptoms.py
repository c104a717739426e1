"""Symptoms of runs that do not learn, found in their logs. docs/why.md has the same texts, and runs with each symptom."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sb3_reinforce.tools.report.estimates import number
from sb3_reinforce.tools.report.runs import Run

#: Shorter runs are not judged
MIN_UPDATES, MIN_EPISODES = 10, 20
#: In standard deviations of the returns. The return rises if the last quarter of the training episodes returns more than the
#: third one and the first episodes, and has risen if it returns far more than the first ones: Pendulum-v1 gains about 4
MIN_RISE, MIN_GAIN = 0.5, 2.0
#: Share of the way to the threshold that counts as solved: training returns include exploration noise
NEAR_THRESHOLD = 0.9
#: Lower signals cannot be distinguished from 0, because the signal is averaged over about ten batches
MIN_SIGNAL = 0.03
#: Ratio of the largest to the smallest standard deviation, which changes less at first if the policy learns its mean
MIN_STD_RATIO = 1.3
#: Share of the variance of the returns: the rest is noise in the advantages. Baselines of runs that learn usually explain more
MIN_EXPLAINED = 0.5
#: Cross-validation needs two halves of a batch, with more than one episode each
MAX_FEW_EPISODES = 2
#: Shares of the last quarter of the training episodes
MIN_TIMEOUTS, MIN_EQUAL_RETURNS = 0.5, 0.9
#: Symptoms of a policy that has learned and is stuck below the threshold
_AFTER_LEARNING = ("time", "rare")


class Symptom(NamedTuple):
    """Reason why a run does not learn."""

    #: Log key that shows it
    key: str
    title: str
    meaning: str
    cure: str
    #: Returns the values that show the symptom, or None
    find: Callable[[Run], str | None]


def find_symptoms(run: Run) -> list[tuple[Symptom, str]]:
    """
    Find the symptoms of a run.

    :param run: run to examine
    :return: symptoms, and the values that show them. Empty if the return rises, is near the threshold of the environment,
        or has risen where the environment has no threshold, and for other algorithms, which have other cures
    """
    if run.algorithm not in ("REINFORCE", Run.algorithm) or not is_stalled(run):
        return []
    names = _AFTER_LEARNING if _has_risen(run) else SYMPTOMS
    found = [(SYMPTOMS[name], SYMPTOMS[name].find(run)) for name in names]
    return [(symptom, values) for symptom, values in found if values is not None]


def is_stalled(run: Run) -> bool:
    """Whether the return of training episodes does not rise, and is low as far as this is known."""
    updates = max((len(values) for _, values in run.scalars.values()), default=0)
    if run.episodes is None or len(run.episodes) < MIN_EPISODES or updates < MIN_UPDATES:
        return False
    first, (*_, third, last) = _first(run, "r"), _quarters(run, "r")
    if min(_gain(third, last), _gain(first, last)) >= MIN_RISE:
        return False
    if run.threshold is None:
        return not _has_risen(run)
    best = max([last.mean(), *([] if run.final_returns is None else [run.final_returns.mean()])])
    return bool(best < first.mean() + NEAR_THRESHOLD * (run.threshold - first.mean()))


def _has_risen(run: Run) -> bool:
    return _gain(_first(run, "r"), _quarters(run, "r")[-1]) >= MIN_GAIN


def _quarters(run: Run, column: str) -> list[np.ndarray]:
    return np.array_split(run.episodes[column].to_numpy(), 4)


def _first(run: Run, column: str) -> np.ndarray:
    """Values of the first episodes, before fast learners improve."""
    return run.episodes[column].to_numpy()[: max(10, len(run.episodes) // 20)]


def _gain(before: np.ndarray, after: np.ndarray) -> float:
    """Difference of the means in standard deviations."""
    return float((after.mean() - before.mean()) / max(np.sqrt((before.var() + after.var()) / 2), 1e-9))


def _second_half(run: Run, tag: str) -> np.ndarray | None:
    """Values in the second half of the run, None if there are none."""
    if tag not in run.scalars:
        return None
    steps, values = run.scalars[tag]
    return values[steps >= run.episodes["steps"].iloc[-1] / 2] if steps[-1] >= run.episodes["steps"].iloc[-1] / 2 else None


def lost_in_noise(run: Run) -> str | None:
    """Whether hardly any of the promised improvement is confirmed."""
    values = _second_half(run, "train/gradient_signal")
    if values is None or values.mean() >= MIN_SIGNAL:
        return None
    return f"`train/gradient_signal` is {number(values.mean())} on average in the second half of the run."


def spent_on_std(run: Run) -> str | None:
    """Whether the standard deviation changes while nothing is learned."""
    first, last = _first(run, "r"), _quarters(run, "r")[-1]
    if "train/std" not in run.scalars:
        return None
    values = run.scalars["train/std"][1]
    if values.max() < MIN_STD_RATIO * values.min():
        return None
    means = f"from {number(first.mean())} to {number(last.mean())}"
    return f"`train/std` is between {number(values.min())} and {number(values.max())}, while the return changes {means}."


def unexplained(run: Run) -> str | None:
    """Whether the baseline explains little of the returns."""
    values = _second_half(run, "train/explained_variance")
    if values is None or np.median(values) >= MIN_EXPLAINED:
        return None
    return f"The median of `train/explained_variance` is {number(float(np.median(values)))} in the second half of the run."


def ended_by_time(run: Run) -> str | None:
    """Whether many of the last episodes, and few of the first ones, have the maximum length."""
    first, last = _first(run, "l"), _quarters(run, "l")[-1]
    limit = run.episodes["l"].max()
    share, before = np.mean(last == limit), np.mean(first == limit)
    if share < MIN_TIMEOUTS or before >= MIN_TIMEOUTS:
        return None
    return f"{share:.0%} of the last training episodes take {number(limit)} steps, compared to {before:.0%} of the first ones."


def too_few_episodes(run: Run) -> str | None:
    """Whether batches have one or two episodes."""
    values = _second_half(run, "rollout/episodes")
    if values is None or np.median(values) > MAX_FEW_EPISODES:
        return None
    return f"The median of `rollout/episodes` is {number(float(np.median(values)))} in the second half of the run."


def equal_returns(run: Run) -> str | None:
    """Whether most of the last episodes have the same return."""
    returns, counts = np.unique(_quarters(run, "r")[-1], return_counts=True)
    share = counts.max() / counts.sum()
    if share < MIN_EQUAL_RETURNS:
        return None
    return f"{share:.0%} of the last training episodes return {number(returns[counts.argmax()])}."


#: Symptoms by the name of their section in docs/why.md
SYMPTOMS = {
    "noise": Symptom(
        "train/gradient_signal",
        "The gradient is lost in noise",
        "One half of a batch confirms less than 3% of the improvement that the other half promises, so steps follow noise.",
        "Use a baseline (the default). If you already do, collect larger batches: raise `n_steps` or `n_episodes`.",
        lost_in_noise,
    ),
    "std": Symptom(
        "train/std",
        "The step is spent on the standard deviation",
        "The standard deviation changes, but the return does not: steps are of limited size, and little is left for the mean.",
        'Use the default `cg_damping="auto"`. If you already do, look for another symptom.',
        spent_on_std,
    ),
    "baseline": Symptom(
        "train/explained_variance",
        "The baseline explains nothing",
        "The differences between returns that the baseline does not predict become noise in the advantages.",
        "Let the baseline know the time (`baseline_kwargs=dict(time=True)`, the default), and use the default `ridge` and "
        "`baseline_memory`. Check that the observation contains the causes of the reward.",
        unexplained,
    ),
    "time": Symptom(
        "rollout/ep_len_mean",
        "Episodes end by time",
        "The policy has learned to wait until the time limit: few episodes fill a batch, and none shows something better.",
        "Reward progress (reward shaping), or shorten training episodes with `max_episode_steps`.",
        ended_by_time,
    ),
    "few": Symptom(
        "rollout/episodes",
        "A batch has too few episodes",
        "A batch of one episode cannot be halved to choose the damping, and with two episodes each half is a single one.",
        "Use the default `n_episodes=5` and `n_steps=1000`.",
        too_few_episodes,
    ),
    "rare": Symptom(
        "rollout/ep_rew_mean",
        "Rewards are too rare",
        "Almost all training episodes have the same return, so no action looks better than another.",
        "Shape the reward. If some episodes reach a reward, collect larger batches. With continuous actions, try gSDE "
        "(`use_sde=True, sde_sample_freq=8`).",
        equal_returns,
    ),
}
