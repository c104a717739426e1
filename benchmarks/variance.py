"""
How noisy is the policy gradient, with each advantage function and each baseline?

    python -m benchmarks.variance                  # a few minutes; the picture and the table alone once all is measured

For each environment, a policy is trained with the constructor's defaults until its training episodes return something between
bad and solved, and frozen. It then collects batches of five episodes. The gradient of a batch is the sum over its transitions
of ``grad log pi(a|s) A``, divided by the number of episodes, without normalization of the advantages ``A``. All variants see
the same batches. Critics are "fresh", fitted to the very batch that they judge; or "old", fitted to the batch before, and
nothing else; or have a "memory" of all batches before, which fade as with the constructor's defaults. At time-outs, all
variants add the value that the baseline of the trained model has of the last observation, as the model did in training.

Three figures for each variant, each with a 95 % percentile bootstrap interval over batches:

- total variance, the trace of the covariance matrix of the gradient, relative to Monte-Carlo without a baseline;
- signal-to-noise ratio of one batch, the squared norm of the mean gradient over the total variance;
- cosine between the mean gradient and that of unbiased Monte-Carlo, for which stands ``REFERENCE``.

All are made of scalar products of the gradients of different batches, whose means are unbiased: the noise of a mean gradient
has no part in its norm. So the estimate of a cosine may be above 1. In a resample, copies of a batch are no different batches.
The bootstrap takes batches for independent. With critics they are not quite: what is in one is also in the next one's critic.

Writes ``results/variance.json`` (environments that are there already are skipped), ``docs/images/variance.png`` and the table
in ``docs/advantages.md``.
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
from stable_baselines3.common.utils import explained_variance
from torch import nn

from benchmarks.common import ADVANTAGES, IMAGES, RESULTS, fill, provenance, write_json
from benchmarks.throughput import Nothing
from sb3_reinforce import REINFORCE
from sb3_reinforce.baselines import FEATURE_MAPS, ActionValues, LinearBaseline
from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.natural_gradient import flatten
from sb3_reinforce.returns import action_advantages, monte_carlo_advantages, policy_gradient_loss, q_advantages, td_advantages

RESULT = RESULTS / "variance.json"
#: Mean return of the last 20 training episodes at which training stops
TARGETS = {"LunarLanderContinuous-v3": 25.0, "CartPole-v1": 75.0}
SEED = 0
#: The weight of earlier batches that the constructor gives them
MEMORY = inspect.signature(REINFORCE).parameters["baseline_memory"].default
#: Batches that are there for the critics alone
WARM_UP = 10
N_RESAMPLES = 2000


class Variant(NamedTuple):
    """An advantage function, what its critics are linear in, and what these were fitted to: "fresh", "old" or "memory"."""

    advantage: str
    critic: str = ""
    fitted: str = ""


NO_BASELINE = Variant("monte_carlo")
REFERENCE = Variant("monte_carlo", "random_features", "memory")
#: What the table says of the batch that the critics were fitted to
FITTED = {"": "", "fresh": "the same batch", "old": "the batch before", "memory": "all batches before, fading"}
COLORS = {"monte_carlo": "tab:blue", "q": "tab:red", "advantage": "tab:green", "td": "tab:orange"}


class Constant(nn.Module):
    """One feature that never changes. What is fitted to it is the mean return."""

    def forward(self, features: th.Tensor) -> th.Tensor:
        return features.new_ones(len(features), 1)


class Critics:
    """
    The critics of states and of actions on one feature map.

    :param name: of the feature map, or "mean"
    :param n_features: of a state
    :param action_space: action space
    :param memory: see ``LinearBaseline``
    """

    def __init__(self, name: str, n_features: int, action_space: spaces.Space, memory: float = 0.0):
        self.name = name
        self.memory = memory
        feature_map, ridge = FEATURE_MAPS.get(name, (None, 0.0))
        # With and without memory, the random features are the same
        th.manual_seed(SEED)
        self.map: Any = feature_map(n_features) if feature_map is not None else nn.Identity()
        if name == "mean":
            self.map = Constant()
        self.values = LinearBaseline(self.map(th.zeros(1, n_features)).shape[1], ridge, memory)
        self.action_values = ActionValues(self.values.n_features, action_space, ridge=ridge, memory=memory)

    def predict(self, features: th.Tensor, actions: th.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """:return: (n_transitions,) values of the states, and of the actions in them"""
        mapped = self.map(features)
        values = self.values.predict(mapped), self.action_values.predict(mapped, actions)
        return values[0].numpy().flatten(), values[1].numpy().flatten()

    def fit(self, features: th.Tensor, actions: th.Tensor, returns: np.ndarray) -> None:
        mapped = self.map(features)
        self.values.fit(mapped.numpy(), returns)
        self.action_values.fit(mapped, actions, returns)


def half_trained(env_id: str) -> REINFORCE:
    """A model with the constructor's defaults, trained batch by batch until its training episodes return the target."""
    model = REINFORCE("MlpPolicy", env_id, seed=SEED, device="cpu", stats_window_size=20)
    returns = [-np.inf]
    while len(returns) < 20 or np.mean(returns) < TARGETS[env_id]:
        model.learn(1, reset_num_timesteps=False)
        returns = [info["r"] for info in model.ep_info_buffer or []]
    return model


def batches(model: REINFORCE, n_batches: int) -> Iterator[EpisodeRolloutBuffer]:
    """Batches of a model that does not learn from them."""
    callback = Nothing()
    callback.init_callback(model)
    assert model.env is not None and model.n_episodes is not None
    for _ in range(n_batches):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        # As train() does: other episodes
        model._next_episode += model.n_episodes
        yield model.rollout_buffer


def judge(buffer: EpisodeRolloutBuffer, critics: Critics, features: th.Tensor, fitted: str) -> dict[Variant, np.ndarray]:
    """The advantages of a batch by all functions; of "mean", which says nothing of actions or next states, by one."""
    name = critics.name
    values, action_values = critics.predict(features, th.as_tensor(buffer.actions))
    advantages = {Variant("monte_carlo", name, fitted): monte_carlo_advantages(buffer.returns, values)}
    if name != "mean":
        td = td_advantages(buffer.rewards, buffer.episode_starts, values, buffer.gamma)
        advantages[Variant("q", name, fitted)] = q_advantages(action_values)
        advantages[Variant("advantage", name, fitted)] = action_advantages(action_values, values)
        advantages[Variant("td", name, fitted)] = td
    return advantages


def all_advantages(buffer: EpisodeRolloutBuffer, critics: list[Critics], features: th.Tensor) -> dict[Variant, np.ndarray]:
    """The advantages of a batch by all variants. The critics are fitted to it on the way."""
    advantages = {NO_BASELINE: monte_carlo_advantages(buffer.returns, np.zeros(buffer.size()))}
    for pair in critics:
        advantages |= judge(buffer, pair, features, "memory" if pair.memory else "old")
        pair.fit(features, th.as_tensor(buffer.actions), buffer.returns)
        if not pair.memory:
            advantages |= judge(buffer, pair, features, "fresh")
    return advantages


def gradients(model: REINFORCE, advantages: list[np.ndarray]) -> np.ndarray:
    """
    The policy gradient of the batch in the buffer, per episode, with each of some advantages.

    :param advantages: (n_transitions,) each
    :return: (n_variants, n_parameters) float32
    """
    buffer, policy = model.rollout_buffer, model.policy
    parameters = list(policy.parameters())
    batch = next(buffer.get())
    is_discrete = isinstance(model.action_space, spaces.Discrete)
    _, log_prob, _ = policy.evaluate_actions(
        batch.observations, batch.actions.long().flatten() if is_discrete else batch.actions
    )
    # The loss is a mean over transitions
    per_episode = buffer.size() / buffer.episode_starts.sum()
    result = []
    for weights in advantages:
        objective = -per_episode * policy_gradient_loss(log_prob, th.as_tensor(weights, dtype=th.float32))
        result.append(flatten(th.autograd.grad(objective, parameters, retain_graph=True)).numpy())
    return np.array(result)


def pair_mean(products: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    Mean of products over pairs of different batches.

    :param products: (n, n) one for each pair of batches
    :param counts: (n_resamples, n) how often each batch is in each resample
    :return: (n_resamples,)
    """
    squares = counts**2
    total = np.einsum("ri,ri->r", counts @ products, counts) - squares @ np.diag(products)
    return total / (counts.sum(axis=1) ** 2 - squares.sum(axis=1))


def moments(gram: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Unbiased estimates of the squared norm of the mean gradient, and of the trace of the covariance matrix.

    :param gram: (n, n) scalar products of the gradients of n batches
    :param counts: (n_resamples, n) how often each batch is in each resample
    :return: (n_resamples,) each
    """
    squared_mean = pair_mean(gram, counts)
    # The trace is the mean over pairs of different batches of half the squared difference
    norms = np.broadcast_to(np.diag(gram), gram.shape)
    return squared_mean, pair_mean((norms + norms.T) / 2, counts) - squared_mean


def resamples(n_batches: int, n_resamples: int = N_RESAMPLES) -> np.ndarray:
    """(1 + n_resamples, n_batches) how often each batch is in each resample; the first is the batches themselves."""
    drawn = np.random.default_rng(0).multinomial(n_batches, np.full(n_batches, 1 / n_batches), size=n_resamples)
    return np.vstack([np.ones(n_batches), drawn])


def estimate(values: np.ndarray) -> list[float]:
    """The value of the batches themselves, and the bounds of its 95 % bootstrap interval."""
    return [float(f"{value:.4g}") for value in (values[0], *np.nanpercentile(values[1:], [2.5, 97.5]))]


def summary(of_variant: dict[Variant, np.ndarray]) -> list[dict[str, Any]]:
    """
    The figures of each variant.

    :param of_variant: (n_batches, n_parameters) gradients, of the same batches
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
        # A mean that cannot be told from 0 has no direction
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
    """Train a policy, and measure its gradient."""
    model = half_trained(env_id)
    n_steps = model.num_timesteps
    n_features = model.policy.features_dim
    critics = [Critics(name, n_features, model.action_space) for name in ("mean", *FEATURE_MAPS)]
    critics.append(Critics("random_features", n_features, model.action_space, MEMORY))
    of_variant: dict[Variant, list[np.ndarray]] = defaultdict(list)
    explained: dict[str, list[float]] = defaultdict(list)
    returns: list[float] = []
    n_transitions = 0
    for number, buffer in enumerate(batches(model, WARM_UP + n_batches), start=1 - WARM_UP):
        with th.no_grad():
            features = model.policy.extract_features(next(buffer.get()).observations)
            assert isinstance(features, th.Tensor)
        advantages = all_advantages(buffer, critics, features)
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
        training_steps=n_steps,
        mean_return=round(float(np.mean(returns)), 2),
        std_return=round(float(np.std(returns)), 2),
        batches=n_batches,
        episodes=len(returns),
        transitions=n_transitions,
        parameters=arrays[NO_BASELINE].shape[1],
        explained_variance={name: round(float(np.mean(values)), 4) for name, values in explained.items()},
        variants=summary(arrays),
    )


#: How what the critics were fitted to looks in the picture
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
        panels[0, column].set_title(f"{env_id}, a policy that returns {result['mean_return']:.0f}")
        for row in result["variants"]:
            variant = Variant(row["advantage"], row["critic"], row["fitted"])
            names += [] if label(variant) in names else [label(variant)]
            height = names.index(label(variant)) + OFFSETS.get(variant.fitted, 0.0)
            color = COLORS[variant.advantage]
            for axes, name in zip(panels[:, column], ("relative_variance", "snr"), strict=True):
                # What cannot be told from 0 goes to the edge of the logarithmic axis
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
    """Two digits, or all before the decimal point."""
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.2g}"


def cell(figures: list[float] | None, as_text: Callable[[float], str] = number) -> str:
    """``value [low, high]``; of a direction, nothing where there is none."""
    if figures is None:
        return ""
    value, low, high = (as_text(figure) for figure in figures)
    return value if value == low == high else f"{value} [{low}, {high}]"


def table(results: dict[str, dict[str, Any]]) -> str:
    """What was measured, then a row for each variant, with three figures for each environment."""
    lines = [
        f"- {env_id}: a policy after {result['training_steps']:,} steps (seed {result['seed']}) returns "
        f"{result['mean_return']:.0f}; {result['batches']:,} batches of 5 episodes, {result['transitions']:,} transitions."
        for env_id, result in results.items()
    ]
    columns = [f"{env_id}: {name}" for env_id in results for name in ("variance", "SNR", "cosine")]
    lines += ["", "| " + " | ".join(["`advantage`", "`baseline`", "fitted to", *columns]) + " |"]
    lines.append("|" + " --- |" * (3 + len(columns)))
    for rows in zip(*(result["variants"] for result in results.values()), strict=True):
        what = [rows[0]["advantage"], rows[0]["critic"] or "none", FITTED[rows[0]["fitted"]]]
        for row in rows:
            what += [cell(row["relative_variance"]), cell(row["snr"]), cell(row["cosine"], "{:.2f}".format)]
        lines.append("| " + " | ".join(what) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--figures", action="store_true", help="only the picture and the table, of what is there")
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
