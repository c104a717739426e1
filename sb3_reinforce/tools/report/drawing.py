"""Pictures of runs, as SVG in the colors of the page."""

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

#: After Okabe and Ito, with a contrast of at least 3 on white and on black
COLORS = ("#2b84c8", "#d55e00", "#009e73", "#cc79a7")
#: Becomes the color of the page's text
INK = "#123456"
#: Scalars of the TensorBoard log that are shown: title and meaning
DIAGNOSTICS = {
    "train/std": ("Standard deviation", "Of the Gaussian policy's actions: how widely it explores."),
    "train/entropy_loss": ("Entropy loss", "Minus the policy's entropy: it rises as the policy explores less."),
    "train/kl_divergence_loss": ("Divergence", "KL divergence between the policies before and after each step."),
    "train/explained_variance": (
        "Explained variance",
        "Of the returns, by the baseline: 1 is a perfect prediction, 0 no better than a constant. Cut off at −1.",
    ),
    "train/grad_norm": ("Gradient norm", "Of the loss over a whole batch, before any limit."),
    "time/between_rollouts": ("Time between rollouts", "Seconds from the last step of a batch to the first of the next."),
}


@contextmanager
def picture(into: list[dict[str, Any]], title: str, text: str, alt: str, width: float, salt: str) -> Iterator[Any]:
    """
    Draw against steps, as SVG in the colors of the page.

    :param into: gets the picture
    :param title: what is drawn
    :param text: what that means
    :param alt: what can be seen
    :param width: in inches
    :param salt: makes ids in the SVG differ from those of other pictures with this title
    :return: axes to draw in
    """
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": salt + title, "text.parse_math": False, "font.size": 9}
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

    :param axes: to draw in
    :param curve: (n_points,) arrays "steps", "mean", "low" and "high"
    :param color: of both
    :param label: of the curve
    :param marker: of its points
    """
    axes.plot(curve["steps"], curve["mean"], marker=marker, markersize=4, color=color, label=label)
    axes.fill_between(curve["steps"], curve["low"], curve["high"], color=color, alpha=0.25, linewidth=0)


def draw_run(run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    :param run: what to draw
    :return: its learning curve, if there is any, and its diagnostics
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
        text = "The band is the 95 % bootstrap interval of each evaluation, which is of the deterministic policy."
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
            # A few crashes would hide all else
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
                # A constant looks like one
                margin = 0.1 * np.abs(shown).max() + 1e-9
                axes.set_ylim(shown.min() - margin, shown.max() + margin)
    return learning, diagnostics


def draw_comparison(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """
    :param groups: of runs to compare
    :return: a picture of the evaluations in each environment
    """
    pictures: list[dict[str, Any]] = []
    for env_id, of_env in itertools.groupby(groups, lambda group: group.env_id):
        members = list(of_env)
        if not any(run.evaluations for group in members for run in group.runs):
            continue
        text = "Thin: the evaluations of each run. Thick: their IQM, with its 95 % bootstrap interval over runs."
        labels = [f"{group.label}, {count(group.runs, 'run')}" for group in members]
        alt = f"Evaluations in {env_id} against steps: {'; '.join(labels)}"
        with picture(pictures, env_id, text, alt, 4.2, "") as axes:
            axes.set_ylabel("return")
            for group, label, color in zip(members, labels, itertools.cycle(COLORS), strict=False):
                draw_evaluations(axes, [run.evaluations for run in group.runs if run.evaluations], color, label)
    return pictures


def draw_evaluations(axes: Any, curves: list[dict[str, Any]], color: str, label: str) -> None:
    """
    Draw the evaluations of some runs, and their IQM as far as all of them go.

    :param axes: to draw in
    :param curves: of the runs, see :attr:`Run.evaluations`
    :param color: of all lines
    :param label: of the IQM
    """
    for curve in curves:
        axes.plot(curve["steps"], curve["mean"], color=color, linewidth=0.6, alpha=0.6)
    if curves:
        steps = np.linspace(max(curve["steps"][0] for curve in curves), min(curve["steps"][-1] for curve in curves))
        returns = np.array([np.interp(steps, curve["steps"], curve["mean"]) for curve in curves]).T
        low, high = interval(returns, iqm)
        draw_band(axes, dict(steps=steps, mean=iqm(returns), low=low, high=high), color, label)
