"""Report page and command-line interface."""

import argparse
import base64
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from sb3_reinforce.tools.checkpoints import write_atomically
from sb3_reinforce.tools.report.drawing import draw_comparison, draw_run
from sb3_reinforce.tools.report.estimates import count, estimate, interval, number
from sb3_reinforce.tools.report.groups import group_runs
from sb3_reinforce.tools.report.runs import Run, read_file, read_run
from sb3_reinforce.tools.report.symptoms import find_symptoms


def render(runs: Sequence[Run]) -> str:
    """
    Render the report.

    :param runs: a single run, or several runs to compare
    :return: HTML page
    """
    options: Any = dict(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env = Environment(loader=PackageLoader("sb3_reinforce.tools.report", "."), extensions=["jinja2.ext.do"], **options)
    env.filters["base64"] = lambda path: base64.b64encode(read_file(path)).decode()
    env.globals |= dict(count=count, draw_run=draw_run, facts_of=facts_of, find_symptoms=find_symptoms, estimate=estimate)
    env.globals |= dict(interval=interval, number=number, np=np, zip=zip)
    groups = group_runs(runs) if len(runs) > 1 else []
    return env.get_template("report.html").render(runs=runs, groups=groups, pictures=draw_comparison(groups))


def facts_of(run: Run) -> dict[str, str]:
    """
    Summarize a run.

    :param run: run of the report
    :return: name and text of each known fact
    """
    facts: dict[str, str | None] = {"algorithm": run.algorithm}
    if run.final_returns is not None:
        interval_ = interval(run.final_returns, np.mean)
        facts["mean return [95% interval]"] = estimate(run.final_returns.mean(), interval_)
    facts["steps"] = run.progress + (", unfinished" if run.is_finished is False else "")
    facts["updates"] = None if run.updates is None else number(run.updates)
    facts["training episodes"] = None if run.episodes is None else number(len(run.episodes))
    facts["duration"] = None if run.seconds is None else str(timedelta(seconds=round(run.seconds)))
    versions = {name.lower(): version for name, version in run.versions.items()}
    for package in ("sb3-reinforce", "stable-baselines3", "python"):
        facts[package] = versions.get(package)
    facts["machine"] = run.machine
    return {name: text for name, text in facts.items() if text is not None}


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """
    Write a report of one run, or a comparison of several runs.

    :param folders: folders of the runs
    :param output: path of the report. If None, ``report.html`` in the folder of a single run, or in the current folder
    :return: path of the report
    :raises ValueError: if a folder is not a run
    """
    runs = [read_run(folder) for folder in {Path(folder).resolve(): folder for folder in folders}.values()]
    # logs/a2c/CartPole-v1_1 and logs/ppo/CartPole-v1_1 have the same name
    for names in ([run.folder.resolve().parts[-2:] for run in runs], [run.folder.parts for run in runs]):
        if len({run.name for run in runs}) < len(runs):
            for run, parts in zip(runs, names, strict=True):
                run.name = str(Path(*parts))
    path = Path(output) if output is not None else (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    # File names and JSON may contain characters that cannot be encoded
    write_atomically(path, render(runs).encode(errors="replace"))
    return path


def main(options: Sequence[str] | None = None) -> None:
    """
    Run the command ``sb3-reinforce report``.

    :param options: command-line arguments, None to use ``sys.argv``
    """
    parser = argparse.ArgumentParser(prog="sb3-reinforce report", description="Write an HTML report of training runs.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run")
    parser.add_argument(
        "--output", metavar="FILE", help="default: report.html in the folder of a single run, or in the current folder"
    )
    arguments = parser.parse_args(options)
    try:
        print(f"The report is {write_report(arguments.runs, arguments.output)}")
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
