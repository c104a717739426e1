"""Symptoms of runs that do not learn: found in the committed runs that fail, and not in the cured ones."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import why_figures
from benchmarks.common import WHY
from sb3_reinforce.tools.report import Run, render
from sb3_reinforce.tools.report.symptoms import SYMPTOMS, find_symptoms


def runs(name: str, kind: str) -> list[Run]:
    return [why_figures.report_run(run) for run in why_figures.runs_of(name)[kind]]


@pytest.mark.parametrize("name", SYMPTOMS)
def test_symptoms_are_found_in_runs_that_fail(name: str):
    section = f"\n## {SYMPTOMS[name].title}\n\n<!-- why-{name} -->\n{why_figures.block(name)}\n<!-- /why-{name} -->\n"
    assert section in WHY.read_text(encoding="utf-8")
    found = [SYMPTOMS[name] in [symptom for symptom, _ in find_symptoms(run)] for run in runs(name, "fails")]
    # The return of one run may rise late
    assert len(found) == 3 and sum(found) >= 2
    assert [find_symptoms(run) for run in runs(name, "cured")] == [[], [], []]


def test_the_report_names_the_symptoms():
    (fails, *_), (cured, *_) = runs("few", "fails"), runs("few", "cured")
    page = render([fails])
    assert "<h2>What went wrong</h2>" in page and "A batch has too few episodes" in page
    assert "The median of rollout/episodes is 1 in the second half of the run. A batch of one" in page
    assert "What went wrong" not in render([cured])


def with_returns(run: Run, returns: np.ndarray) -> Run:
    return replace(run, episodes=run.episodes.assign(r=returns))


def test_runs_that_learn_or_cannot_be_judged_have_no_symptoms():
    run, noise = runs("few", "fails")[0], np.random.default_rng(0).normal(size=150)
    late, early = np.linspace(0, 9, 150), np.where(np.arange(150) < 12, 0, 9)
    assert find_symptoms(replace(run, algorithm="REINFORCE")) and find_symptoms(replace(run, algorithm="A2C")) == []
    assert find_symptoms(with_returns(run, noise)) and find_symptoms(replace(run, threshold=0.0))
    for returns in (late, early):
        assert find_symptoms(with_returns(run, noise + returns)) == []
    # A policy that waits below the threshold, slightly below it, and above it with deterministic actions
    learned = with_returns(run, noise + early)
    waits = replace(runs("time", "fails")[0], threshold=0.7)
    assert find_symptoms(waits) and find_symptoms(replace(waits, threshold=0.05)) == []
    assert find_symptoms(replace(learned, threshold=30.0)) == find_symptoms(replace(learned, threshold=9.5)) == []
    assert find_symptoms(replace(waits, final_returns=np.ones(3))) == []
    assert find_symptoms(replace(run, episodes=None)) == find_symptoms(replace(run, episodes=run.episodes[:19])) == []
    short = {tag: (steps[:9], values[:9]) for tag, (steps, values) in run.scalars.items()}
    assert find_symptoms(replace(run, scalars=short)) == []
