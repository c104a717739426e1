"""Figures of runs, as SVG in the colors of the page."""

import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from sb3_reinforce.tools.report.estimates import count, interval, iqm, number
from sb3_reinforce.tools.report.groups import Group
from sb3_reinforce.tools.report.runs import Run

#: Based on the palettes of Okabe and Ito, and of Tol, with a contrast of at least 3 on both pages
COLORS = ("#2b84c8", "#d55e00", "#009e73", "#cc79a7", "#a67c00", "#8f6fd1", "#7d8590", "#d94a64")
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
    "train/gradient_signal": (
        "Gradient signal",
        "Share of the promised improvement that the other half of the batch confirms: 0 is noise.",
    ),
    "train/cg_damping": (
        "Damping",
        "Damping of the Fisher matrix: small values give the natural gradient, large values the gradient.",
    ),
    "rollout/ep_len_mean": ("Episode length", "Mean length of the last 100 training episodes."),
}


@contextmanager
def picture(
    into: list[dict[str, Any]], title: str, text: str, alt: str, width: float, salt: str, x: str = "steps"
) -> Iterator[Any]:
    """
    Draw a figure, as SVG in the colors of the page.

    :param into: list to append the figure to
    :param title: title of the figure
    :param text: description of the figure
    :param alt: alternative text for screen readers
    :param width: width in inches
    :param salt: salt of the ids in the SVG, which must be unique for figures with the same title
    :param x: label of the horizontal axis
    :return: axes to draw on
    """
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": ascii(salt + title), "text.parse_math": False, "font.size": 9}
    style |= {"axes.grid": True, "grid.alpha": 0.15, "axes.spines.top": False, "axes.spines.right": False}
    style |= {f"{part}color": INK for part in ("axes.edge", "axes.label", "text.", "xtick.", "ytick.", "grid.")}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, 0.7 * width), layout="constrained")
        axes = figure.subplots()
        yield axes
        axes.set_xlabel(x)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        labels = axes.get_legend_handles_labels()[1]
        if labels:
            # Above the axes, where it covers no curve
            columns = 2 if max(map(len, labels)) < 24 else 1
            figure.legend(loc="outside upper left", ncols=columns, frameon=False)
            figure.set_figheight(0.65 * width + 0.17 * math.ceil(len(labels) / columns))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r' id="[\w.]+_\d+"', "", file.getvalue()).replace(INK, "currentColor")
    into.append(dict(title=title, text=text, alt=alt, svg=Markup(svg[svg.index("<svg") :])))


def draw_band(axes: Any, curve: dict[str, Any], color: str, label: str, marker: str = "", x: str = "steps") -> None:
    """
    Draw a curve and its interval.

    :param axes: axes to draw on
    :param curve: (n_points,) arrays "mean", "low", "high" and of the horizontal axis
    :param color: color of the curve and the interval
    :param label: label of the curve
    :param marker: marker of the points
    :param x: name of the array of the horizontal axis
    """
    axes.plot(curve[x], curve["mean"], marker=marker, markersize=4, color=color, label=label)
    axes.fill_between(curve[x], curve["low"], curve["high"], color=color, alpha=0.25, linewidth=0)


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
        # The entropy of a Gaussian policy only depends on its standard deviation
        if tag in run.scalars and not (tag == "train/entropy_loss" and "train/std" in run.scalars):
            steps, values = run.scalars[tag]
            first, last, least, most = map(number, (values[0], values[-1], values.min(), values.max()))
            alt = f"{title} against steps: from {first} to {last}, between {least} and {most}"
            with picture(diagnostics, title, text, alt, 3.3, run.name) as axes:
                shown = values.clip(min=-1) if title == "Explained variance" else values
                axes.plot(steps, shown, color=COLORS[0])
                if tag == "train/cg_damping" and values.min() > 0:
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter("{x:g}")
                    continue
                # Show a constant as a horizontal line, without noise
                margin = 0.1 * np.abs(shown).max() + 1e-9
                axes.set_ylim(shown.min() - margin, shown.max() + margin)
    return learning, diagnostics


def draw_comparison(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """
    Draw the returns of groups of runs.

    :param groups: groups to compare
    :return: figures against steps and against seconds, for each environment
    """
    pictures: list[dict[str, Any]] = []
    # The same color in all environments
    colors = dict(zip(dict.fromkeys(group.label for group in groups), itertools.cycle(COLORS), strict=False))
    for env_id, of_env in itertools.groupby(groups, lambda group: group.env_id):
        env_groups = list(of_env)
        what = "Evaluations" if env_groups[0].is_evaluated else "Training episodes"
        text = (
            "evaluations of each run" if env_groups[0].is_evaluated else "mean of the last 100 training episodes of each run"
        )
        text = f"Thin lines: {text}. Thick line: IQM over runs, with its 95% bootstrap interval."
        if any(group.unfinished for group in env_groups):
            text += " Dotted lines: unfinished runs, which are not averaged."
        for x in ("steps", "seconds"):
            curves = [
                [
                    [curve for run in some if (curve := group.curve(run)) and x in curve]
                    for some in (group.runs, group.unfinished)
                ]
                for group in env_groups
            ]
            if not any(itertools.chain(*curves)):
                continue
            alt = f"{what} in {env_id} against {x}: {'; '.join(group.title for group in env_groups)}"
            with picture(pictures, f"{env_id}, return against {x}", text, alt, 4.2, "", x) as axes:
                axes.set_ylabel("return")
                for (finished, unfinished), group in zip(curves, env_groups, strict=True):
                    draw_evaluations(axes, finished, colors[group.label], group.title, x)
                    for curve in unfinished:
                        label = "" if finished or curve is not unfinished[0] else group.title
                        axes.plot(curve[x], curve["mean"], ":", color=colors[group.label], linewidth=1.2, label=label)
    return pictures


def draw_evaluations(axes: Any, curves: list[dict[str, Any]], color: str, label: str, x: str = "steps") -> None:
    """
    Draw the evaluations of runs, and their IQM where all runs have some.

    :param axes: axes to draw on
    :param curves: evaluations of each run, see :attr:`Run.evaluations`
    :param color: color of all lines
    :param label: label of the IQM
    :param x: "steps" or "seconds"
    """
    for curve in curves:
        axes.plot(curve[x], curve["mean"], color=color, linewidth=0.6, alpha=0.6, marker="." if len(curve[x]) == 1 else "")
    if curves:
        start, end = max(curve[x][0] for curve in curves), min(curve[x][-1] for curve in curves)
        points = np.linspace(start, end, 50 if start <= end else 0)
        returns = np.array([np.interp(points, curve[x], curve["mean"]) for curve in curves]).T
        low, high = interval(returns, iqm)
        draw_band(axes, {x: points, "mean": iqm(returns), "low": low, "high": high}, color, label, x=x)
