"""Figures of runs, as SVG in the colors of the page."""

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from sb3_reinforce.tools.report.estimates import count, interval, iqm, number
from sb3_reinforce.tools.report.groups import Group
from sb3_reinforce.tools.report.runs import Run

#: Based on the palette of Okabe and Ito, with a contrast of at least 3 on white and on black
COLORS = ("#2b84c8", "#d55e00", "#009e73", "#cc79a7")
#: Placeholder for the text color of the page
INK = "#123456"
#: TensorBoard scalars in the report: title and description
DIAGNOSTICS = {
    "train/std": ("Standard deviation", "Exploration noise of the Gaussian policy."),
    "train/entropy_loss": ("Entropy loss", "Negative entropy of the policy: it increases when the policy explores less."),
    "train/kl_divergence_loss": ("Divergence", "KL divergence between the policies before and after each update."),
    "train/explained_variance": (
        "Explained variance",
        "Quality of the baseline: 1 is a perfect prediction of the returns, 0 is no better than a constant. Clipped at −1.",
    ),
    "train/grad_norm": ("Gradient norm", "Norm of the gradient of the loss over a batch, before clipping."),
    "time/between_rollouts": (
        "Time between rollouts",
        "Seconds from the last step of a batch to the first step of the next batch.",
    ),
}


@contextmanager
def picture(into: list[dict[str, Any]], title: str, text: str, alt: str, width: float, salt: str) -> Iterator[Any]:
    """
    Draw a figure against steps, as SVG in the colors of the page.

    :param into: list to append the figure to
    :param title: title of the figure
    :param text: description of the figure
    :param alt: alternative text for screen readers
    :param width: width in inches
    :param salt: salt of the ids in the SVG, which must be unique for figures with the same title
    :return: axes to draw on
    """
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": ascii(salt + title), "text.parse_math": False, "font.size": 9}
    style |= {"axes.grid": True, "grid.alpha": 0.15, "axes.spines.top": False, "axes.spines.right": False}
    style |= {f"{part}color": INK for part in ("axes.edge", "axes.label", "text.", "xtick.", "ytick.", "grid.")}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, 0.7 * width), layout="constrained")
        axes = figure.subplots()
        yield axes
        axes.set_xlabel("steps")
        axes.xaxis.set_major_formatter(EngFormatter())
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=2, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r' id="[\w.]+_\d+"', "", file.getvalue()).replace(INK, "currentColor")
    into.append(dict(title=title, text=text, alt=alt, svg=Markup(svg[svg.index("<svg") :])))


def draw_band(axes: Any, curve: dict[str, Any], color: str, label: str, marker: str = "") -> None:
    """
    Draw a curve and its interval.

    :param axes: axes to draw on
    :param curve: (n_points,) arrays "steps", "mean", "low" and "high"
    :param color: color of the curve and the interval
    :param label: label of the curve
    :param marker: marker of the points
    """
    axes.plot(curve["steps"], curve["mean"], marker=marker, markersize=4, color=color, label=label)
    axes.fill_between(curve["steps"], curve["low"], curve["high"], color=color, alpha=0.25, linewidth=0)


def draw_run(run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Draw the figures of a run.

    :param run: run to draw
    :return: learning curve (empty without data), and diagnostics
    """
    learning: list[dict[str, Any]] = []
    diagnostics: list[dict[str, Any]] = []
    episodes, evaluations = run.episodes, run.evaluations
    seen, lows = [], []
    if episodes is not None:
        seen.append(count(episodes, "training episode"))
        lows.append(episodes["r"].quantile(0.01))
    if evaluations is not None:
        first, last, best = map(number, (*evaluations["mean"][[0, -1]], evaluations["mean"].max()))
        seen.append(f"{count(evaluations['steps'], 'evaluation')}, from {first} to {last}, at best {best}")
        lows.append(evaluations["mean"].min())
    if seen:
        text = "Evaluations use the deterministic policy. The band is their 95% bootstrap interval."
        alt = f"Return against steps: {'; '.join(seen)}"
        with picture(learning, "Learning curve", text, alt, 4.2, run.name) as axes:
            axes.set_ylabel("return")
            if episodes is not None:
                dots = dict(markersize=3, alpha=0.5, color=COLORS[0], rasterized=True)
                axes.plot(episodes["steps"], episodes["r"], ".", label="training episode", **dots)
                mean = episodes["r"].rolling(100, min_periods=1).mean()
                axes.plot(episodes["steps"], mean, color=COLORS[1], label="mean of the last 100")
            if evaluations is not None:
                draw_band(axes, evaluations, COLORS[2], "evaluation", marker="o" if len(evaluations["steps"]) < 50 else "")
            if run.threshold is not None:
                axes.axhline(run.threshold, color=INK, linestyle=":", label="solved")
            # Ignore outliers: a few crashes would dominate the axis
            if np.isfinite(lows).all():
                axes.set_ylim(bottom=min(lows) - 0.02 * abs(min(lows)))
    for tag, (title, text) in DIAGNOSTICS.items():
        if tag in run.scalars:
            steps, values = run.scalars[tag]
            first, last, least, most = map(number, (values[0], values[-1], values.min(), values.max()))
            alt = f"{title} against steps: from {first} to {last}, between {least} and {most}"
            with picture(diagnostics, title, text, alt, 3.3, run.name) as axes:
                shown = values.clip(min=-1) if title == "Explained variance" else values
                axes.plot(steps, shown, color=COLORS[0])
                # Show a constant as a horizontal line, without noise
                margin = 0.1 * np.abs(shown).max() + 1e-9
                axes.set_ylim(shown.min() - margin, shown.max() + margin)
    return learning, diagnostics


def draw_comparison(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """
    Draw the evaluations of groups of runs.

    :param groups: groups to compare
    :return: one figure per environment
    """
    pictures: list[dict[str, Any]] = []
    for env_id, of_env in itertools.groupby(groups, lambda group: group.env_id):
        env_groups = list(of_env)
        if not any(run.evaluations for group in env_groups for run in group.runs):
            continue
        text = "Thin lines: evaluations of each run. Thick line: IQM over runs, with its 95% bootstrap interval."
        labels = [f"{group.label}, {count(group.runs, 'run')}" for group in env_groups]
        alt = f"Evaluations in {env_id} against steps: {'; '.join(labels)}"
        with picture(pictures, env_id, text, alt, 4.2, "") as axes:
            axes.set_ylabel("return")
            for group, label, color in zip(env_groups, labels, itertools.cycle(COLORS), strict=False):
                draw_evaluations(axes, [run.evaluations for run in group.runs if run.evaluations], color, label)
    return pictures


def draw_evaluations(axes: Any, curves: list[dict[str, Any]], color: str, label: str) -> None:
    """
    Draw the evaluations of runs, and their IQM up to the end of the shortest run.

    :param axes: axes to draw on
    :param curves: evaluations of each run, see :attr:`Run.evaluations`
    :param color: color of all lines
    :param label: label of the IQM
    """
    for curve in curves:
        axes.plot(curve["steps"], curve["mean"], color=color, linewidth=0.6, alpha=0.6)
    if curves:
        steps = np.linspace(max(curve["steps"][0] for curve in curves), min(curve["steps"][-1] for curve in curves))
        returns = np.array([np.interp(steps, curve["steps"], curve["mean"]) for curve in curves]).T
        low, high = interval(returns, iqm)
        draw_band(axes, dict(steps=steps, mean=iqm(returns), low=low, high=high), color, label)
