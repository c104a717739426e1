"""The scripts that make the figures: what they measure, and that they say what they measured."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from scipy import stats
from stable_baselines3 import A2C

from benchmarks import common, figures, learning, step_time, throughput
from sb3_reinforce import REINFORCE
from tests.envs import ScriptedEnv


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(learning, "FOLDER", tmp_path / "learning")
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "learning")
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    monkeypatch.setattr(common, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("<!-- headline --><!-- /headline --><!-- learning --><!-- /learning -->")
    return tmp_path


def learn(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    class InThisProcess:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def starmap(self, function: Any, jobs: Any, chunksize: int) -> None:
            for job in jobs:
                function(*job)

    monkeypatch.setattr(learning, "get_context", lambda _: type("Context", (), {"Pool": lambda *_: InThisProcess()}))
    monkeypatch.setattr(sys, "argv", ["learning", *arguments])
    learning.main()


def test_runs_of_the_file_and_of_the_defaults_are_written_once(results: Path, monkeypatch: pytest.MonkeyPatch):
    small = ["--env", "CartPole-v1", "--timesteps", "3000", "--every", "1000", "--episodes", "3"]
    learn(monkeypatch, *small, "--seeds", "0,5", "--algo", "defaults", "--set", "n_steps:500", "gamma:0.9")
    learn(monkeypatch, *small, "--seeds", "5-6")
    paths = sorted(str(path.relative_to(results / "learning")) for path in results.glob("learning/*/*/*"))
    assert paths == [f"CartPole-v1/{run}.json" for run in ("defaults/seed_0", "defaults/seed_5", *REINFORCE_SEEDS)]
    run = json.loads((results / "learning/CartPole-v1/defaults/seed_5.json").read_text())
    assert run["differs"] == {"n_steps": 500, "gamma": 0.9}
    assert (run["seed"], run["algo"], len(run["final_returns"])) == (5, "defaults", 100)
    steps = [point["steps"] for point in run["evaluations"]]
    assert steps == sorted(steps) and len(steps) >= 2 and steps[0] >= 1000
    assert "stable-baselines3" in run["versions"]
    written = {path: path.stat().st_mtime_ns for path in results.glob("learning/*/*/*")}
    learn(monkeypatch, *small, "--seeds", "5-6")
    assert written == {path: path.stat().st_mtime_ns for path in results.glob("learning/*/*/*")}


REINFORCE_SEEDS = ("reinforce/seed_5", "reinforce/seed_6")


def test_algorithms_take_turns_and_a_run_may_be_in_pieces(results: Path, monkeypatch: pytest.MonkeyPatch):
    small = ["--env", "CartPole-v1", "--timesteps", "600", "--every", "200", "--episodes", "3", "--seeds", "0-1"]
    turns: list[tuple[str, int]] = []
    run = learning.run
    monkeypatch.setattr(learning, "run", lambda algo, name, env_id, seed, _: turns.append((name, seed)))
    learn(monkeypatch, *small, "--algo", "defaults", "a2c", "--name", "race")
    assert turns == [("race-defaults", 0), ("race-a2c", 0), ("race-defaults", 1), ("race-a2c", 1)]
    monkeypatch.setattr(learning, "run", run)
    learn(monkeypatch, *small, "--algo", "defaults", "--name", "whole")
    learn(monkeypatch, *small, "--algo", "defaults", "--name", "pieces", "--pieces", "100")
    whole, pieces = (
        json.loads((results / f"learning/CartPole-v1/{name}/seed_1.json").read_text()) for name in ("whole", "pieces")
    )
    assert pieces["pieces"] == 100 and whole["pieces"] is None
    assert [point["mean_return"] for point in pieces["evaluations"]] == [
        point["mean_return"] for point in whole["evaluations"]
    ]
    assert pieces["final_returns"] == whole["final_returns"]


def test_a_run_may_stop_at_its_aim(results: Path, monkeypatch: pytest.MonkeyPatch):
    small = ["--env", "CartPole-v1", "--timesteps", "50000", "--every", "1000", "--episodes", "3", "--seeds", "0"]
    learn(monkeypatch, *small, "--algo", "defaults", "--until", "5")
    run = json.loads((results / "learning/CartPole-v1/defaults/seed_0.json").read_text())
    assert run["timesteps"] < 20_000
    assert run["final_returns"] == [] and run["evaluations"][-1]["mean_return"] >= 5


def fake_run(name: str, seed: int, mean: float, first: int, below: int | None = None) -> None:
    """A run whose evaluations are 200 from some step on, but for one that may be below."""
    evaluations = [
        dict(
            steps=steps,
            seconds=steps / 100_000,
            mean_return=200.0 if steps >= first and steps != below else 0.0,
            training_return=0.0,
        )
        for steps in range(100_000, 1_000_001, 100_000)
    ]
    path = learning.FOLDER / figures.LANDER / name / f"seed_{seed}.json"
    content = dict(seed=seed, evaluations=evaluations, timesteps=1_000_000, seconds=10.0, final_returns=[mean - 1, mean + 1])
    common.write_json(path, content)


def test_figures_are_those_of_the_runs(results: Path):
    means = [100.0, 210, 220, 230, 240, 250, 260, 270]
    for seed, mean in enumerate(means):
        fake_run("reinforce", seed, mean, 100_000 * (seed + 1), below=500_000 if seed == 0 else None)
    fake_run("race-reinforce", 0, 250, 400_000)
    fake_run("race-ppo", 0, 250, 900_000)
    fake_run("race-ppo", 1, 250, 700_000)
    figures.main()
    readme = (results / "README.md").read_text()
    assert "After 1.0 million steps, 7 of 8 seeds return 200 or more: IQM 235 " in readme
    assert "worst 100 " in readme
    assert "after 450,000 steps, nine of ten within 800,000" in readme
    # 9 evaluations of the first seed, 2 of the last
    assert "2.3% of 44 evaluations are below 200" in readme
    assert "REINFORCE 4.0 seconds and 400,000 steps (1 seeds); PPO 8.0 seconds and 800,000 steps (2 seeds, 2.0 times" in readme
    assert f"| {figures.LANDER} | reinforce | 8 | 1 M | 235.0 [" in readme
    assert (results / f"learning_{figures.LANDER}.png").read_bytes().startswith(b"\x89PNG")


def test_interval_covers_the_true_value_as_often_as_it_says():
    """200 experiments of 12 runs from a normal distribution, whose interquartile mean is its mean; fixed seed."""
    rng = np.random.default_rng(0)
    bounds = [figures.interval(rng.normal(3, 2, size=12)) for _ in range(200)]
    covered = sum(low <= 3 <= high for low, high in bounds)
    # The percentile bootstrap of a dozen runs is known to cover a little less than it says
    assert 0.85 <= covered / 200 <= 0.98
    assert figures.iqm(np.array([1.0, 2, 3, 100])) == 2.5 == stats.trim_mean([1, 2, 3, 100], 0.25)


def test_clocks_count_every_moment_once(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]

    def take(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(step_time.time, "perf_counter", lambda: now[0])
    clocks = step_time.Clocks()
    inner = clocks.clocked(lambda: take(2), "environment")
    outer = clocks.clocked(lambda: (take(1), inner(), inner(), take(4)), "VecEnv")
    outer()
    assert clocks.seconds["environment"] == 4
    assert clocks.seconds["VecEnv"] == 5


@pytest.mark.parametrize("cls", [REINFORCE, A2C])
def test_the_parts_of_a_step_add_up_to_it(monkeypatch: pytest.MonkeyPatch, cls: type):
    monkeypatch.setattr(step_time, "N_STEPS", 100)
    microseconds = step_time.measure(throughput.make_model(cls, throughput.vec_env("CartPole-v1", 2), 20))
    assert tuple(microseconds) == step_time.PARTS
    assert min(microseconds.values()) > 0


@pytest.mark.parametrize("algorithm", [REINFORCE, A2C])
def test_what_is_measured_acts_at_random_and_learns_next_to_nothing(algorithm: Any):
    model = throughput.make_model(algorithm, ScriptedEnv([5]), 20)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    assert throughput.learning(model)(100) > 0
    assert all(th.allclose(one, other, atol=0.05) for one, other in zip(before, model.policy.parameters(), strict=True))
    actions = model.rollout_buffer.actions
    assert np.abs(actions.mean()) < 0.5 and 0.8 < actions.std() < 1.2
    assert throughput.environment_alone("CartPole-v1")(200) > 0


def test_the_table_has_the_ratios_of_the_medians():
    rates = {
        f"{throughput.LANDER} x1": {throughput.ALONE: [9, 10, 99], throughput.OURS: [6, 6, 7], "A2C": [1, 1, 1]},
        f"{throughput.LANDER} x8": {throughput.ALONE: [10], throughput.OURS: [7], "A2C": [2]},
    }
    rates[f"{throughput.LANDER} x1"] |= {throughput.OURS + throughput.STRING: [7], "A2C" + throughput.STRING: [0.5]}
    for case in ("CartPole-v1 x1", "Pendulum-v1 x1", f"{throughput.IMAGE_ENV} x8", f"{throughput.BANDIT} x1"):
        rates[case] = {throughput.OURS: [5], "A2C": [1]}
    others = dict(update_share=[0.02], returns_seconds=[0.1], returns_memory=1.5, baseline_seconds=[3], lstsq_seconds=[2])
    text = throughput.table(dict(steps_per_second=rates, **others))
    for row in (
        "environment alone | at least 0.55 | 0.7 |",
        "`DummyVecEnv` of one | at least 0.55 | 0.6 |",
        "from a string, times A2C | at least 5 | 14 |",
        "times A2C | at least 7 | 5 |",
        "normal equations | at most 1.5 | 1.5 |",
    ):
        assert row in text
