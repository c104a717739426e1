"""
Measure the variance and bias of the policy gradient, for each advantage function and baseline.

    python -m benchmarks.variance

For each environment, train a policy on batches of five episodes, otherwise with the default hyperparameters, until it is
half-trained (see ``TARGETS``), and freeze it. Then collect such batches. The gradient of a batch is the sum over its
transitions of ``grad log pi(a|s) A``, divided by the number of episodes, without normalization of the advantages ``A``. All
variants use the same batches. Critics are "fresh" (fitted to the batch that they evaluate), "old" (fitted to the previous
batch only), or have a "memory" (fitted to all previous batches, with the default decay).

Each variant has three figures, with 95% percentile bootstrap intervals over batches:

- total variance: trace of the covariance matrix of the gradient, relative to Monte-Carlo without a baseline;
- signal-to-noise ratio of one batch: squared norm of the mean gradient, divided by the total variance;
- cosine between the mean gradient and the unbiased Monte-Carlo gradient (``REFERENCE``).

All figures are computed from scalar products of gradients of different batches, whose means are unbiased. An estimated cosine
can therefore be above 1. Copies of a batch in a resample do not count as different batches. The bootstrap assumes independent
batches, which is an approximation for critics that are fitted to previous batches.

Write ``results/variance.json``, ``docs/images/variance.png`` and the table in ``docs/advantages.md``. Environments in
``results/variance.json`` are skipped.
"""

import argparse
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.utils import explained_variance
from torch import nn

from benchmarks.common import ADVANTAGES, IMAGES, RESULTS, fill, provenance, write_json
from sb3_reinforce import REINFORCE, EpisodeRolloutBuffer
from sb3_reinforce.baselines import BASELINES, ActionValues, BaselineFeatures, LinearBaseline
from sb3_reinforce.natural_gradient import flatten
from sb3_reinforce.returns import (
    action_advantages,
    monte_carlo_advantages,
    policy_gradient_loss,
    q_advantages,
    steps_since_episode_start,
    td_advantages,
)

RESULT = RESULTS / "variance.json"
#: Training stops at this mean return of the last 20 episodes
TARGETS = {"LunarLanderContinuous-v3": 25.0, "CartPole-v1": 75.0}
SEED = 0
#: Default weight of previous batches
MEMORY = inspect.signature(REINFORCE).parameters["baseline_memory"].default
#: Number of batches that are only used to fit the critics
WARM_UP = 10
N_RESAMPLES = 2000


class Variant(NamedTuple):
    """Advantage function, features of its critics, and the data they are fitted to: "fresh", "old" or "memory"."""

    advantage: str
    critic: str = ""
    fitted: str = ""


NO_BASELINE = Variant("monte_carlo")
REFERENCE = Variant("monte_carlo", "random_features", "memory")
#: Descriptions of the data that the critics are fitted to
FITTED = {"": "", "fresh": "the same batch", "old": "the previous batch", "memory": "all previous batches, decaying"}
COLORS = {"monte_carlo": "tab:blue", "q": "tab:red", "advantage": "tab:green", "td": "tab:orange"}


#: Features of the states of a batch, and steps since the start of their episodes
States = tuple[th.Tensor, th.Tensor]


class Constant(nn.Module):
    """Constant feature: the fit is the mean return."""

    def forward(self, features: th.Tensor, n_steps: th.Tensor | None = None) -> th.Tensor:
        return features.new_ones(len(features), 1)


class Critics:
    """
    State-value and action-value critics on the same features.

    :param name: name of the feature map, or "mean"
    :param n_features: number of state features
    :param action_space: action space
    :param memory: weight of previous batches, see ``LinearBaseline``
    """

    def __init__(self, name: str, n_features: int, action_space: spaces.Space, memory: float = 0.0):
        self.name = name
        self.memory = memory
        n_units, time, ridge = BASELINES.get(name, (0, False, 0.0))
        # Use the same random features with and without memory
        th.manual_seed(SEED)
        self.map: Any = Constant() if name == "mean" else BaselineFeatures(n_features, n_units, time)
        self.values = LinearBaseline(self.map(th.zeros(1, n_features)).shape[1], ridge, memory)
        self.action_values = ActionValues(self.values.n_features, action_space, ridge=ridge, memory=memory)

    def predict(self, states: States, actions: th.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return (n_transitions,) state values and action values."""
        mapped = self.map(*states)
        values = self.values.predict(mapped), self.action_values.predict(mapped, actions)
        return values[0].numpy().flatten(), values[1].numpy().flatten()

    def fit(self, states: States, actions: th.Tensor, returns: np.ndarray) -> None:
        mapped = self.map(*states)
        self.values.fit(mapped.numpy(), returns)
        self.action_values.fit(mapped, actions, returns)


def half_trained(env_id: str) -> REINFORCE:
    """Train a model with the default hyperparameters until its training episodes reach the target."""
    model = REINFORCE("MlpPolicy", env_id, n_steps=None, seed=SEED, device="cpu", stats_window_size=20)
    returns = [-np.inf]
    while len(returns) < 20 or np.mean(returns) < TARGETS[env_id]:
        model.learn(1, reset_num_timesteps=False)
        returns = [info["r"] for info in model.ep_info_buffer or []]
    return model


def batches(model: REINFORCE, n_batches: int) -> Iterator[EpisodeRolloutBuffer]:
    """Collect batches without training the model."""
    callback = ConvertCallback(None)
    callback.init_callback(model)
    assert model.env is not None
    for _ in range(n_batches):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        # Continue with new episodes, as train() does
        model._next_episode += int(model.rollout_buffer.episode_starts.sum())
        yield model.rollout_buffer


def judge(buffer: EpisodeRolloutBuffer, critics: Critics, states: States, fitted: str) -> dict[Variant, np.ndarray]:
    """Compute the advantages of a batch with all advantage functions (only Monte-Carlo with "mean")."""
    name = critics.name
    values, action_values = critics.predict(states, th.as_tensor(buffer.actions))
    advantages = {Variant("monte_carlo", name, fitted): monte_carlo_advantages(buffer.returns, values)}
    if name != "mean":
        td = td_advantages(buffer.rewards, buffer.episode_starts, values, buffer.gamma)
        advantages[Variant("q", name, fitted)] = q_advantages(action_values)
        advantages[Variant("advantage", name, fitted)] = action_advantages(action_values, values)
        advantages[Variant("td", name, fitted)] = td
    return advantages


def all_advantages(buffer: EpisodeRolloutBuffer, critics: list[Critics], states: States) -> dict[Variant, np.ndarray]:
    """Compute the advantages of a batch for all variants, and fit the critics to the batch."""
    advantages = {NO_BASELINE: monte_carlo_advantages(buffer.returns, np.zeros(buffer.size()))}
    for pair in critics:
        advantages |= judge(buffer, pair, states, "memory" if pair.memory else "old")
        pair.fit(states, th.as_tensor(buffer.actions), buffer.returns)
        if not pair.memory:
            advantages |= judge(buffer, pair, states, "fresh")
    return advantages


def gradients(model: REINFORCE, advantages: list[np.ndarray]) -> np.ndarray:
    """
    Compute the policy gradient per episode of the batch in the buffer, for several advantages.

    :param advantages: arrays of shape (n_transitions,)
    :return: (n_variants, n_parameters) float32
    """
    buffer, policy = model.rollout_buffer, model.policy
    parameters = list(policy.parameters())
    batch = next(buffer.get())
    is_discrete = isinstance(model.action_space, spaces.Discrete)
    _, log_prob, _ = policy.evaluate_actions(
        batch.observations, batch.actions.long().flatten() if is_discrete else batch.actions
    )
    # The loss is averaged over transitions
    per_episode = buffer.size() / buffer.episode_starts.sum()
    result = []
    for weights in advantages:
        objective = -per_episode * policy_gradient_loss(log_prob, th.as_tensor(weights, dtype=th.float32))
        result.append(flatten(th.autograd.grad(objective, parameters, retain_graph=True)).numpy())
    return np.array(result)


def pair_mean(products: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    Average products over pairs of different batches.

    :param products: (n, n) products of each pair of batches
    :param counts: (n_resamples, n) count of each batch in each resample
    :return: (n_resamples,)
    """
    squares = counts**2
    total = np.einsum("ri,ri->r", counts @ products, counts) - squares @ np.diag(products)
    return total / (counts.sum(axis=1) ** 2 - squares.sum(axis=1))


def moments(gram: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Estimate the squared norm of the mean gradient and the trace of its covariance matrix, without bias.

    :param gram: (n, n) scalar products of the gradients of n batches
    :param counts: (n_resamples, n) count of each batch in each resample
    :return: (n_resamples,) each
    """
    squared_mean = pair_mean(gram, counts)
    # The trace is half the mean squared difference of different batches
    norms = np.broadcast_to(np.diag(gram), gram.shape)
    return squared_mean, pair_mean((norms + norms.T) / 2, counts) - squared_mean


def resamples(n_batches: int, n_resamples: int = N_RESAMPLES) -> np.ndarray:
    """Return (1 + n_resamples, n_batches) counts of each batch. The first row is the original sample."""
    drawn = np.random.default_rng(0).multinomial(n_batches, np.full(n_batches, 1 / n_batches), size=n_resamples)
    return np.vstack([np.ones(n_batches), drawn])


def estimate(values: np.ndarray) -> list[float]:
    """Return the value of the original sample and the bounds of its 95% bootstrap interval."""
    return [float(f"{value:.4g}") for value in (values[0], *np.nanpercentile(values[1:], [2.5, 97.5]))]


def summary(of_variant: dict[Variant, np.ndarray]) -> list[dict[str, Any]]:
    """
    Compute the figures of each variant.

    :param of_variant: (n_batches, n_parameters) gradients of each variant, for the same batches
    """
    reference, unit = (of_variant[variant].astype(np.float64) for variant in (REFERENCE, NO_BASELINE))
    counts = resamples(len(unit))
    reference_signal, _ = moments(reference @ reference.T, counts)
    _, unit_variance = moments(unit @ unit.T, counts)
    rows = []
    for variant in sorted(of_variant, key=lambda variant: list(COLORS).index(variant.advantage)):
        gradient = of_variant[variant].astype(np.float64)
        signal, variance = moments(gradient @ gradient.T, counts)
        snr = estimate(signal / variance)
        # The direction of a mean close to 0 is undefined
        cosine = None
        if variant != REFERENCE and snr[1] > 0:
            with np.errstate(invalid="ignore"):
                cosine = estimate(pair_mean(gradient @ reference.T, counts) / np.sqrt(signal * reference_signal))
        rows.append(
            dict(
                variant._asdict(),
                variance=float(f"{variance[0]:.4g}"),
                squared_mean=float(f"{signal[0]:.4g}"),
                relative_variance=estimate(variance / unit_variance),
                snr=snr,
                cosine=cosine,
            )
        )
    return rows


def measure(env_id: str, n_batches: int) -> dict[str, Any]:
    """Train a policy and measure the variance of its gradient."""
    model = half_trained(env_id)
    n_trained = model.num_timesteps
    n_features = model.policy.features_dim
    critics = [Critics(name, n_features, model.action_space) for name in ("mean", *BASELINES)]
    critics.append(Critics("random_features", n_features, model.action_space, MEMORY))
    of_variant: dict[Variant, list[np.ndarray]] = defaultdict(list)
    explained: dict[str, list[float]] = defaultdict(list)
    returns: list[float] = []
    n_transitions = 0
    for number, buffer in enumerate(batches(model, WARM_UP + n_batches), start=1 - WARM_UP):
        with th.no_grad():
            features = model.policy.extract_features(next(buffer.get()).observations)
            assert isinstance(features, th.Tensor)
            n_steps = th.as_tensor(steps_since_episode_start(buffer.episode_starts))
        advantages = all_advantages(buffer, critics, (features, n_steps))
        if number < 1:
            continue
        for variant, gradient in zip(advantages, gradients(model, list(advantages.values())), strict=True):
            of_variant[variant].append(gradient)
        for variant, values in advantages.items():
            if variant.critic and variant.advantage in ("monte_carlo", "q"):
                predicted = values if variant.advantage == "q" else buffer.returns - values
                explained[" ".join(variant)].append(explained_variance(predicted, buffer.returns))
        returns += [info["r"] for info in model.ep_info_buffer or []][-5:]
        n_transitions += buffer.size()
        if number % 50 == 0:
            print(f"{env_id}: {number} of {n_batches} batches", flush=True)
    arrays = {variant: np.array(gradient) for variant, gradient in of_variant.items()}
    return dict(
        provenance(),
        seed=SEED,
        target=TARGETS[env_id],
        training_steps=n_trained,
        mean_return=round(float(np.mean(returns)), 2),
        std_return=round(float(np.std(returns)), 2),
        batches=n_batches,
        episodes=len(returns),
        transitions=n_transitions,
        parameters=arrays[NO_BASELINE].shape[1],
        explained_variance={name: round(float(np.mean(values)), 4) for name, values in explained.items()},
        variants=summary(arrays),
    )


def current_variants(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of all variants whose feature map still exists."""
    return [row for row in result["variants"] if row["critic"] in ("", "mean", *BASELINES)]


#: Offsets and markers of the plot, by the data that the critics are fitted to
OFFSETS = {"fresh": 0.2, "memory": -0.2}
MARKERS: dict[str, dict[str, Any]] = {
    "old": dict(marker="o", markersize=5),
    "fresh": dict(marker="o", markersize=5, markerfacecolor="white"),
    "memory": dict(marker="D", markersize=5),
}


def label(variant: Variant) -> str:
    return f"{variant.advantage}, {variant.critic.replace('_', ' ') or 'no baseline'}"


def plot(results: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        2, len(results), figsize=(5.6 * len(results), 8.6), sharey=True, sharex="row", squeeze=False, constrained_layout=True
    )
    names: list[str] = []
    for column, (env_id, result) in enumerate(results.items()):
        panels[0, column].set_title(f"{env_id}, mean return {result['mean_return']:.0f}")
        for row in current_variants(result):
            variant = Variant(row["advantage"], row["critic"], row["fitted"])
            names += [] if label(variant) in names else [label(variant)]
            height = names.index(label(variant)) + OFFSETS.get(variant.fitted, 0.0)
            color = COLORS[variant.advantage]
            for axes, name in zip(panels[:, column], ("relative_variance", "snr"), strict=True):
                # Clip values that the logarithmic axis cannot show
                value, low, high = np.maximum(row[name], 1e-9)
                axes.plot([low, high], [height, height], color=color, linewidth=1.5)
                axes.plot(value, height, color=color, **MARKERS[variant.fitted or "old"])
        panels[0, column].axvline(1, color="gray", linestyle=":")
    panels[0, 0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    for variance, snr in panels.T:
        variance.set(xscale="log", xlabel="variance of the gradient, relative to no baseline")
        snr.set(xscale="log", xlim=(1e-3, None), xlabel="signal-to-noise ratio of one batch")
        for axes in (variance, snr):
            axes.grid(axis="both", alpha=0.3)
    for fitted, style in MARKERS.items():
        panels[1, 0].plot([], [], color="black", linestyle="", **style, label=f"fitted to {FITTED[fitted]}")
    figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "variance.png", dpi=100)


def number(value: float) -> str:
    """Format with two significant digits, without decimals from 100 on."""
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.2g}"


def cell(figures: list[float] | None, as_text: Callable[[float], str] = number) -> str:
    """Format ``value [low, high]``, or nothing if the value is undefined."""
    if figures is None:
        return ""
    value, low, high = (as_text(figure) for figure in figures)
    return value if value == low == high else f"{value} [{low}, {high}]"


def table(results: dict[str, dict[str, Any]]) -> str:
    """List the policies, and create a table with one row per variant and three figures per environment."""
    lines = [
        f"- {env_id}: policy after {result['training_steps']:,} training steps (seed {result['seed']}), mean return "
        f"{result['mean_return']:.0f}; {result['batches']:,} batches of 5 episodes, {result['transitions']:,} transitions."
        for env_id, result in results.items()
    ]
    columns = [f"{env_id}: {name}" for env_id in results for name in ("variance", "SNR", "cosine")]
    lines += ["", "| " + " | ".join(["`advantage`", "`baseline`", "fitted to", *columns]) + " |"]
    lines.append("|" + " --- |" * (3 + len(columns)))
    for rows in zip(*map(current_variants, results.values()), strict=True):
        what = [rows[0]["advantage"], rows[0]["critic"] or "none", FITTED[rows[0]["fitted"]]]
        for row in rows:
            what += [cell(row["relative_variance"]), cell(row["snr"]), cell(row["cosine"], "{:.2f}".format)]
        lines.append("| " + " | ".join(what) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--figures", action="store_true", help="only create the figure and the table, from existing results")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for env_id in () if arguments.figures else arguments.env:
        if env_id not in results:
            results[env_id] = measure(env_id, arguments.batches)
            write_json(RESULT, results)
    plot(results)
    fill(ADVANTAGES, "variance", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
