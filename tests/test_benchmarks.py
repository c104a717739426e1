"""Benchmarks: measurements, tasks, statistics, and pages that contain the committed results."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import (
    article,
    common,
    figures,
    league_figures,
    learning,
    soak,
    threads,
    throughput,
    variance,
    where,
    where_figures,
    workers,
)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(learning, "FOLDER", tmp_path / "learning")
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "learning")
    monkeypatch.setattr(where, "FOLDER", tmp_path / "where")
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    monkeypatch.setattr(where_figures, "IMAGES", tmp_path)
    pages = dict(
        README=("headline", "peers", "stops"),
        PAGE=("learning", "commands", "mujoco", "beside"),
        WHERE=tuple(f"where-{task}" for task in where.TASKS),
    )
    groups = [group._replace(page=tmp_path / group.page.name) for group in figures.GROUPS]
    monkeypatch.setattr(figures, "GROUPS", groups)
    pages |= {group.page.name: (group.block,) for group in groups}
    monkeypatch.setattr(figures, "STEP", tmp_path / "step.md")
    pages["step.md"] += ("search",)
    for name, blocks in pages.items():
        monkeypatch.setattr(where_figures if name == "WHERE" else figures, name, tmp_path / name, raising=False)
        (tmp_path / name).write_text("\n".join(f"<!-- {block} --><!-- /{block} -->" for block in blocks))
    return tmp_path


def learn(monkeypatch: pytest.MonkeyPatch, *arguments: str, module: Any = learning) -> None:
    monkeypatch.setattr(module, "run_all", lambda function, jobs, _: [function(*job) for job in jobs])
    monkeypatch.setattr(sys, "argv", [module.__name__.rpartition(".")[2], *arguments])
    module.main()


def test_each_run_is_written_once(results: Path, monkeypatch: pytest.MonkeyPatch):
    small = ["--env", "CartPole-v1", "--timesteps", "900", "--every", "300", "--episodes", "3"]
    learn(monkeypatch, *small, "--seeds", "0", "--algo", "defaults", "--set", "n_steps:200", "gamma:0.9")
    learn(monkeypatch, *small, "--seeds", "0-1")
    paths = sorted(results.glob("learning/CartPole-v1/*/*"))
    assert [f"{path.parent.name}/{path.stem}" for path in paths] == ["defaults/seed_0", "reinforce/seed_0", "reinforce/seed_1"]
    run = json.loads(paths[0].read_text())
    assert run["differs"] == {"n_steps": 200, "gamma": 0.9}
    assert (run["seed"], run["algo"], len(run["final_returns"])) == (0, "defaults", 100)
    steps = [point["steps"] for point in run["evaluations"]]
    assert steps == sorted(steps) and len(steps) >= 2 and steps[0] >= 300
    assert "stable-baselines3" in run["versions"]
    written = [path.stat().st_mtime_ns for path in paths]
    learn(monkeypatch, *small, "--seeds", "0-1")
    assert written == [path.stat().st_mtime_ns for path in paths]


def test_algorithms_take_turns_and_runs_can_be_divided(results: Path, monkeypatch: pytest.MonkeyPatch):
    small = ["--env", "CartPole-v1", "--timesteps", "600", "--every", "200", "--episodes", "3"]
    turns: list[tuple[str, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(learning, "run", lambda algo, name, env_id, seed, _: turns.append((name, seed)))
        learn(monkeypatch, *small, "--seeds", "0-1", "--algo", "defaults", "a2c", "--name", "race")
    assert turns == [("race-defaults", 0), ("race-a2c", 0), ("race-defaults", 1), ("race-a2c", 1)]
    for name, options in (("whole", []), ("pieces", ["--pieces", "1"]), ("short", ["--until", "5"])):
        options = [*options, "--set", "n_steps:50", "n_episodes:1"]
        learn(monkeypatch, *small, "--seeds", "1", "--algo", "defaults", "--name", name, *options)
    whole, pieces, short = (
        json.loads((results / f"learning/CartPole-v1/{name}/seed_1.json").read_text()) for name in ("whole", "pieces", "short")
    )
    assert pieces["pieces"] == 1 and whole["pieces"] is None
    means = [[point["mean_return"] for point in run["evaluations"]] for run in (whole, pieces, short)]
    assert means[0] == means[1] and means[2] == means[0][:1]
    assert pieces["final_returns"] == whole["final_returns"] and short["final_returns"] == []


def fake_run(name: str, seed: int, mean: float, first: int, reached: float = 200.0) -> None:
    """Write a run whose evaluations have reached a return from some step on."""
    evaluations = [
        dict(
            steps=steps,
            seconds=steps / 100_000,
            mean_return=reached if steps >= first else 0.0,
            training_return=0.0,
        )
        for steps in range(100_000, 1_000_001, 100_000)
    ]
    path = learning.FOLDER / figures.LANDER / name / f"seed_{seed}.json"
    content = dict(seed=seed, evaluations=evaluations, timesteps=1_000_000, seconds=10.0, final_returns=[mean - 1, mean + 1])
    what = dict(env=figures.LANDER, name=name, algo=name.removeprefix("race-"))
    common.write_json(path, content | what | dict(command=f"python -m benchmarks.learning --seeds {seed}"))


def test_figures_of_runs(results: Path):
    means = [100.0, 210, 220, 230, 240, 250, 260, 270]
    for seed, mean in enumerate(means):
        fake_run("defaults", seed, mean, 100_000 * (seed + 1))
    fake_run("reinforce-300k", 0, 260, 300_000, reached=260.0)
    fake_run("reinforce-300k", 1, 260, 500_000, reached=260.0)
    fake_run("race-defaults", 0, 250, 400_000)
    fake_run("race-ppo", 0, 250, 900_000)
    fake_run("race-ppo", 1, 250, 700_000)
    # Two of three seeds never pass
    for seed in range(3):
        fake_run("race-trpo", seed, 100, 500_000 if seed == 0 else 2_000_000)
    figures.main()
    readme = (results / "README").read_text()
    assert "- Defaults, 1.0 million steps: 7 of 8 seeds return 200 or more, IQM 235 [" in readme
    assert "worst 100, best 270. The median seed first passes 200 after 450,000 steps, the first after 100,000, and" in readme
    assert "relative to REINFORCE with its defaults, with one thread each: TRPO never, PPO 2.0. " in readme
    assert "after 300,000 to 500,000 steps with 2 seeds, with a median of 400,000" in readme
    assert "\n| TRPO | never | never | 1 of 3 | not measured | |\n" in readme
    assert "\n| PPO | 800,000 | 8.0 | 2 of 2 | not measured | |\n" in readme
    assert "\n| A2C | not measured | | | not measured | |\n" in readme
    assert f"| {figures.LANDER} | defaults | 8 | 1 M | 235.0 [" in (results / "PAGE").read_text()
    assert (results / f"learning_{figures.LANDER}.png").read_bytes().startswith(b"\x89PNG")


def test_commands_reproduce_the_committed_results(results: Path, monkeypatch: pytest.MonkeyPatch):
    committed = common.RESULTS / "learning"
    with monkeypatch.context() as patch:
        patch.setattr(figures, "FOLDER", committed)
        _, *lines, _ = figures.commands().splitlines()
    runs: list[tuple[str, str, int]] = []
    monkeypatch.setattr(
        learning, "run_all", lambda _, jobs, __: runs.extend((env_id, name, seed) for _, name, env_id, seed, _ in jobs)
    )
    for line in lines:
        monkeypatch.setattr(sys, "argv", line.split()[2:])
        learning.main()
    paths = [path for path in committed.glob("*/*/*.json") if not path.parent.name.startswith(figures.PREFIXES)]
    assert sorted(f"{env_id}/{name}/seed_{seed}.json" for env_id, name, seed in runs) == sorted(
        path.relative_to(committed).as_posix() for path in paths
    )


@pytest.mark.parametrize("n_threads", ["1", "2"])
def test_speeds_are_measured_with_the_given_number_of_threads(n_threads: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threads, "CODE", "import benchmarks, torch; input(); print(torch.get_num_threads())")
    process = threads.start(n_threads)
    assert threads.measure(process) == int(n_threads)
    process.communicate()


def test_the_time_between_rollouts_includes_the_last_update(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(1, 100))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    callback = throughput.BetweenRollouts()
    for _ in range(3):
        callback._on_rollout_start()
        callback._on_step()
    callback._on_training_end()
    assert callback.between == 3


def test_pages_contain_the_committed_results():
    names = ("threads", "throughput", "variance", "workers")
    results = {name: json.loads((common.RESULTS / f"{name}.json").read_text()) for name in names}
    filled = {
        common.README: dict(headline=figures.headline(), peers=figures.peers(), stops=figures.stops()),
        common.ADVANTAGES: dict(
            advantages=figures.group_table(figures.GROUPS[0]), variance=variance.table(results["variance"])
        ),
        common.PAGE: dict(
            article=article.comparison(article.read_runs()),
            beside=figures.beside(),
            commands=figures.commands(),
            league=league_figures.table(*league_figures.read_all()),
            learning=figures.table(),
            mujoco=figures.mujoco(),
            soak=soak.summary(),
            throughput=throughput.table(results["throughput"]),
        ),
        common.STEP: {"step-table": figures.group_table(figures.GROUPS[1]), "search": figures.search()},
        common.SCALING: dict(
            paper=workers.paper(results["workers"]["curve"]),
            threads=threads.text(results["threads"]),
            workers=workers.table(results["workers"]),
        ),
        common.WHERE: {f"where-{task}": where_figures.block(task) for task in where.TASKS},
    }
    for page, blocks in filled.items():
        content = page.read_text(encoding="utf-8")
        assert [name for name, text in blocks.items() if f"<!-- {name} -->\n{text}\n<!-- /{name} -->" not in content] == []


@pytest.mark.parametrize("task", where.TASKS)
def test_tasks_are_valid_environments(task: str):
    env = where.TASKS[task].env()
    check_env(env.unwrapped, skip_render_check=True)
    assert env.observation_space == env.unwrapped.observation_space


def play(env: Any, actions: Any, seed: int = 0) -> list[float]:
    """Return the rewards of an episode. ``actions`` can be a function of the environment."""
    env.reset(seed=seed)
    rewards, ended = [], False
    while not ended:
        action = actions(env.unwrapped) if callable(actions) else actions[len(rewards)]
        _, reward, terminated, truncated, _ = env.step(action)
        rewards.append(reward)
        ended = terminated or truncated
    return rewards


def test_a_delayed_reward_is_the_sum_of_an_episode():
    env = where.delayed_cartpole()
    for seed in (0, 1):
        at_once = play(env.env, lambda _: 1, seed)
        assert play(env, lambda _: 1, seed) == [0.0] * (len(at_once) - 1) + [sum(at_once)]


@pytest.mark.parametrize("task", where.TASKS)
def test_all_algorithms_of_a_task_can_be_created(task: str):
    for algorithm in where.TASKS[task].algorithms.values():
        model = where.make_model(where.TASKS[task], algorithm, seed=0)
        assert type(model) is algorithm.cls and model.n_envs == algorithm.n_envs
        assert all(name in str(where.describe(algorithm)) for name in algorithm.kwargs)


def test_each_task_is_run_once(results: Path, monkeypatch: pytest.MonkeyPatch):
    small = ["--tasks", "bandit", "--seeds", "0-1", "--timesteps", "1000"]
    learn(monkeypatch, *small, module=where)
    written = {path: path.stat().st_mtime_ns for path in results.glob("where/bandit/*/*")}
    assert len(written) == 6
    run = json.loads((results / "where/bandit/reinforce/seed_1.json").read_text())
    assert (run["task"], run["algo"], run["seed"], run["settings"]) == ("bandit", "reinforce", 1, "n_steps=500")
    assert [point["steps"] for point in run["evaluations"]] == [0, 500] and len(run["final_returns"]) == 1000
    learn(monkeypatch, *small, module=where)
    assert written == {path: path.stat().st_mtime_ns for path in results.glob("where/bandit/*/*")}
    fake_run("reinforce", 0, 250, 400_000)
    figures.main()
    page = (results / "WHERE").read_text()
    assert "\n| reinforce | `n_steps=500` | 2 |" in page and "\n| ppo | defaults | 2 |" in page
    assert "\n2 seeds are too few for a comparison.\n" in page
    assert "](images/where_bandit.png)" in page and page.count("\nNot measured yet: ") == len(where.TASKS) - 1
    assert (results / "where_bandit.png").read_bytes().startswith(b"\x89PNG")


def test_verdicts_follow_the_intervals(results: Path):
    better, worse, same = np.array([9.0, 8, 9, 8, 9]), np.array([1.0, 2, 3, 1, 2]), np.array([5.0, 3, 1, 2, 9])
    for name, returns in (("reinforce", same), ("a2c", worse - 5), ("ppo", better + 5), ("ppo-long", same[::-1])):
        for seed, value in enumerate(returns):
            run = dict(seed=seed, final_returns=[value - 1, value + 1], training_return=7, settings="n_steps=5", seconds=3)
            common.write_json(where.FOLDER / "delayed-cartpole" / name / f"seed_{seed}.json", run)
    said = "reinforce returns more than a2c; returns less than ppo; is not distinguishable from ppo-long."
    assert where_figures.verdict("delayed-cartpole") == f"After 30,000 steps, {said}"
    rows = where_figures.table("delayed-cartpole").splitlines()
    assert rows[2] == "| reinforce | `n_steps=5` | 5 | 3.333 [1.333, 7.667] | 1, 9 | 7 |  | 3 |"
    assert [row.split(" | ")[6] for row in rows[3:5]] == ["1.00 [1.00, 1.00]", "0.00 [0.00, 0.00]"]
    (where.FOLDER / "delayed-cartpole" / "ppo" / "seed_4.json").unlink()
    assert where_figures.block("delayed-cartpole").startswith("Not measured yet: `python -m benchmarks.where --tasks")


runs_of_one = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6)


@given(runs_of_one, runs_of_one)
def test_probability_of_improvement(ours: list[float], theirs: list[float]):
    wins = 0.0
    for one in ours:
        for other in theirs:
            wins += 1 if one > other else 0.5 if one == other else 0
    found = where_figures.probability_of_improvement(np.array(ours), np.array(theirs))
    assert found == pytest.approx(wins / (len(ours) * len(theirs)))
    # With one resample per row
    stacked = where_figures.probability_of_improvement(np.array([ours, ours[::-1]]), np.array([theirs, theirs]))
    np.testing.assert_allclose(stacked, [found, found])
    assert found + where_figures.probability_of_improvement(np.array(theirs), np.array(ours)) == pytest.approx(1)


def test_the_article_is_compared_after_the_same_number_of_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    names = ("steps", "seconds", "mean_return", "episodes")
    (tmp_path / "article_seed0.csv").write_text(
        ",".join(names) + "\n1000,1.5,50.0,4\n" + f"{article.TIMESTEPS},9,70.0,4\n{article.TIMESTEPS + 1},10,200,4\n"
    )
    for seed, mean in enumerate((40.0, 64.0)):
        rows = [dict(zip(names, (article.TIMESTEPS * part, 2 * part, mean * part, 4), strict=True)) for part in (1, 2)]
        common.write_json(tmp_path / f"seed_{seed}.json", dict(batches=rows))
    for name, path in (("REFERENCE", tmp_path), ("FOLDER", tmp_path), ("FIGURE", tmp_path / "article.png")):
        monkeypatch.setattr(article, name, path)
    runs = article.read_runs()
    article.plot(runs)
    assert (tmp_path / "article.png").read_bytes().startswith(b"\x89PNG")
    text = article.comparison(runs)
    assert "our seeds return 40, 64 (interquartile mean 52) and the article's single seed returns 60; 1 of our 2 seeds" in text
    assert "40 to 64, compared to 70" in text and "2 to 2 seconds, compared to 9 with the article's code." in text


@pytest.fixture
def gradients() -> np.ndarray:
    """30 random gradients of 4 parameters."""
    return np.random.default_rng(0).normal([1.0, 0, 0, 0], 0.5, size=(30, 4))


def test_moments(gradients: np.ndarray):
    n = len(gradients)
    (squared_mean,), (trace,) = variance.moments(gradients @ gradients.T, np.ones((1, n)))
    assert trace == pytest.approx(np.trace(np.cov(gradients.T)))
    assert squared_mean == pytest.approx(np.sum(gradients.mean(axis=0) ** 2) - trace / n)


def test_scores_of_a_task_are_normalized_by_its_lowest_and_highest_iqm():
    low, middle, high = (np.array([value, value]) for value in (-3.0, 1.0, 5.0))
    normalized = league_figures.normalize({"a": middle, "b": low, "c": high})
    assert {name: values[0] for name, values in normalized.items()} == {"a": 0.5, "b": 0.0, "c": 1.0}
    assert league_figures.normalize({"a": low, "b": low})["b"].tolist() == [1.0, 1.0]


def test_small_batches_of_sleeping_environments_are_several(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "SLEEP", 0)
    assert workers.sleeper_rate(None, workers.EPISODES) > 0
