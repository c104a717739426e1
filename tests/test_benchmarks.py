"""The scripts that make the figures: what they measure, and that they say what they measured."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import A2C

from benchmarks import article, common, figures, learning, soak, step_time, throughput, variance, where, where_figures
from sb3_reinforce import REINFORCE
from sb3_reinforce.baselines import ActionValues, LinearBaseline
from tests.envs import ScriptedEnv


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(learning, "FOLDER", tmp_path / "learning")
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "learning")
    monkeypatch.setattr(where, "FOLDER", tmp_path / "where")
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    monkeypatch.setattr(where_figures, "IMAGES", tmp_path)
    pages = dict(
        README=("headline", "peers"), PAGE=("learning", "commands", "mujoco", "beside"), ADVANTAGES=("advantages",), WHERE=()
    )
    pages["WHERE"] = tuple(f"where-{task}" for task in where.TASKS)
    for name, blocks in pages.items():
        monkeypatch.setattr(where_figures if name == "WHERE" else figures, name, tmp_path / name)
        (tmp_path / name).write_text("\n".join(f"<!-- {block} --><!-- /{block} -->" for block in blocks))
    return tmp_path


def learn(monkeypatch: pytest.MonkeyPatch, *arguments: str, module: Any = learning) -> None:
    monkeypatch.setattr(module, "run_all", lambda function, jobs, _: [function(*job) for job in jobs])
    monkeypatch.setattr(sys, "argv", [module.__name__.rpartition(".")[2], *arguments])
    module.main()


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


def test_a_run_of_tianshou_is_written_as_those_of_others(results: Path, monkeypatch: pytest.MonkeyPatch):
    point = dict(steps=2050, seconds=0.5, mean_return=-100.0, training_return=-200.0)
    went = dict(python="3.11", versions=dict(tianshou="2.0.1"), timesteps=4100, seconds=1.0)
    went |= dict(evaluations=[point], final_returns=[-90.0])
    commands = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout=json.dumps(went))

    monkeypatch.setattr(common.subprocess, "run", run)
    small = ["--env", figures.LANDER, "--timesteps", "4000", "--every", "2000", "--episodes", "3", "--seeds", "7"]
    learn(monkeypatch, *small, "--algo", "tianshou")
    (command,) = commands
    assert command[0] == str(common.PEERS) and command[-7:-5] == ["learn", figures.LANDER]
    assert set(command[-5:]) == {
        "--timesteps=4000",
        "--every=2000",
        "--episodes=3",
        "--seed=7",
        f"--evaluation-seed={learning.EVALUATION_SEED}",
    }
    run = json.loads((results / f"learning/{figures.LANDER}/tianshou/seed_7.json").read_text())
    assert run.items() >= went.items() and (run["algo"], run["seed"]) == ("tianshou", 7)
    assert run["command"].startswith("python -m benchmarks.")
    with pytest.raises(SystemExit):
        learn(monkeypatch, *small, "--algo", "tianshou", "--pieces", "1000")


@pytest.mark.slow
@pytest.mark.skipif(not common.PEERS.exists(), reason="needs make peers")
def test_tianshou_learns_in_its_own_environment(results: Path, monkeypatch: pytest.MonkeyPatch):
    small = ["--env", figures.LANDER, "--timesteps", "5000", "--every", "2000", "--episodes", "2", "--seeds", "0"]
    learn(monkeypatch, *small, "--algo", "tianshou", "--name", "whole")
    learn(monkeypatch, *small, "--algo", "tianshou", "--name", "stopped", "--until", "-1000")
    whole, stopped = (
        json.loads((results / f"learning/{figures.LANDER}/{name}/seed_0.json").read_text()) for name in ("whole", "stopped")
    )
    # In ten environments, so that 2048 steps are 2050
    assert [point["steps"] for point in whole["evaluations"]] == [2050, 4100, 6150]
    assert whole["timesteps"] == 6150 and len(whole["final_returns"]) == 100
    assert (stopped["timesteps"], stopped["final_returns"]) == (2050, [])
    assert stopped["evaluations"][0]["mean_return"] == whole["evaluations"][0]["mean_return"]


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
    what = dict(env=figures.LANDER, name=name, algo=name.removeprefix("race-"))
    common.write_json(path, content | what | dict(command=f"python -m benchmarks.learning --seeds {seed}"))


def test_figures_are_those_of_the_runs(results: Path):
    means = [100.0, 210, 220, 230, 240, 250, 260, 270]
    for seed, mean in enumerate(means):
        fake_run("reinforce", seed, mean, 100_000 * (seed + 1), below=500_000 if seed == 0 else None)
    fake_run("race-reinforce", 0, 250, 400_000)
    fake_run("race-ppo", 0, 250, 900_000)
    fake_run("race-ppo", 1, 250, 700_000)
    # Two of three never pass
    for seed in range(3):
        fake_run("race-trpo", seed, 100, 500_000 if seed == 0 else 2_000_000)
    figures.main()
    readme = (results / "README").read_text()
    assert "After 1.0 million steps, 7 of 8 seeds return 200 or more: IQM 235 [" in readme
    assert "worst 100 " in readme
    assert "after 450,000 steps, nine of ten within 800,000" in readme
    # 9 evaluations of the first seed, 2 of the last
    assert "2.3% of 44 evaluations are below 200" in readme
    assert "REINFORCE 4.0 seconds and 400,000 steps (1 of 1 seeds); TRPO never passes (1 of 3 seeds); PPO 8.0 " in readme
    assert "PPO 8.0 seconds and 800,000 steps (2 of 2 seeds, 2.0 times as long)" in readme
    assert "\n| TRPO | never | never | 1 of 3 | not measured | | |\n" in readme
    assert "\n| PPO | 800,000 | 8.0 | 2 of 2 | not measured | | |\n" in readme
    assert "\n| A2C | not measured | | | not measured | | |\n" in readme
    assert f"| {figures.LANDER} | reinforce | 8 | 1 M | 235.0 [" in (results / "PAGE").read_text()
    assert (results / f"learning_{figures.LANDER}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_never_passes_counts_as_late(results: Path):
    fake_run("race-reinforce", 0, 250, 400_000)
    for seed, first in enumerate((500_000, 600_000, 2_000_000)):
        fake_run("race-trpo", seed, 100, first)
    fake_run("reinforce", 0, 250, 400_000)
    assert "TRPO 6.0 seconds and 600,000 steps (2 of 3 seeds, 1.5 times as long)" in figures.headline()
    assert "\n| TRPO | 600,000 | 6.0 | 2 of 3 |" in figures.peers()


def test_final_returns_of_peers_are_beside_those_of_as_many_steps(results: Path):
    for seed in range(2):
        fake_run("reinforce-300k", seed, 250 + 10 * seed, 400_000)
        fake_run("race-ppo", seed, 200, 500_000)
        fake_run("final-ppo", seed, 245 + 10 * seed, 500_000)
    assert figures.peers().splitlines()[2] == "| REINFORCE | not measured | | | **255** [250, 260], 2 seeds | 1.0 M |  |"
    assert "\n| PPO | 500,000 | 5.0 | 2 of 2 | 250 [245, 255], 2 seeds | 1.0 M | 0.75 [0.00, 1.00] |\n" in figures.peers()


def test_a_race_has_a_final_return_only_of_all_seeds(results: Path):
    for seed in range(2):
        fake_run("reinforce-300k", seed, 250, 400_000)
        fake_run("race-tianshou", seed, 100 + 20 * seed, 2_000_000)
    row = "\n| Tianshou's Reinforce | never | never | 0 of 2 | "
    assert f"{row}110 [100, 120], 2 seeds | 1.0 M | 1.00 [1.00, 1.00] |" in figures.peers()
    path = learning.FOLDER / figures.LANDER / "race-tianshou" / "seed_1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(final_returns=[])))
    assert f"{row}not measured | | |" in figures.peers()


def test_advantage_functions_have_a_page_of_their_own(results: Path):
    fake_run("reinforce", 0, 250, 400_000)
    for seed in range(4):
        fake_run("advantage-monte_carlo", seed, 260 + seed, 300_000)
    fake_run("advantage-td", 0, -50, 2_000_000)
    figures.main()
    rows = (results / "ADVANTAGES").read_text().splitlines()
    assert rows[3].startswith(f"| {figures.LANDER} | monte_carlo | 4 | 261.5 [") and rows[3].endswith("| 260.0, 263.0 |")
    assert rows[4] == f"| {figures.LANDER} | td | 1 | -50.0 | -50.0, -50.0 |"
    assert (results / "advantages.png").read_bytes().startswith(b"\x89PNG")
    assert all("advantage" not in (results / page).read_text() for page in ("README", "PAGE"))


def fake_finals(env_id: str, name: str, means: tuple[float, ...], timesteps: int) -> None:
    for seed, mean in enumerate(means):
        content = dict(seed=seed, evaluations=[], timesteps=timesteps, seconds=9.0, final_returns=[mean - 1, mean + 1])
        command = f"python -m benchmarks.learning --env {env_id} --seeds {seed} --every 9 --algo {name} --jobs 2"
        content |= dict(env=env_id, name=name, algo=name.rpartition("-")[2], command=command)
        common.write_json(learning.FOLDER / env_id / name / f"seed_{seed}.json", content)


def test_mujoco_is_bold_where_it_is_at_least_what_others_of_its_kind_have(results: Path):
    for env_id, name, means in (
        ("Hopper-v5", "reinforce", (900.0, 1100.0)),
        ("Swimmer-v5", "reinforce", (40.0, 50.0)),
        ("Swimmer-v5", "gamma-0.9999", (60.0,)),
        ("InvertedPendulum-v5", "reinforce", (1000.0, 1000.0)),
    ):
        fake_finals(env_id, name, means, 3_000_000)
    assert figures.mujoco().splitlines()[2:] == [
        "| Hopper | 2 | **1000.0** [900.0, 1100.0] | 900.0, 1100.0 | 416 | 800 | 3618 |",
        "| Swimmer | 2 | 45.0 [40.0, 50.0] | 40.0, 50.0 | 36 | 51 | 366 |",
        "| Swimmer, `gamma=0.9999` | 1 | **60.0** | 60.0, 60.0 | 36 | 51 | 366 |",
        "| InvertedPendulum | 2 | **1000.0** [1000.0, 1000.0] | 1000.0, 1000.0 | 1000 | - | - |",
    ]


def test_on_mujoco_others_are_beside_the_runs_of_their_gamma(results: Path):
    for env_id, name, means, timesteps in (
        ("Hopper-v5", "reinforce", (900.0, 1100.0), 3_000_000),
        ("Hopper-v5", "trpo", (1000.0, 800.0), 1_000_000),
        ("Swimmer-v5", "reinforce", (10.0,), 3_000_000),
        ("Swimmer-v5", "gamma-0.9999", (60.0,), 3_000_000),
        ("Swimmer-v5", "a2c", (50.0,), 1_000_000),
    ):
        fake_finals(env_id, name, means, timesteps)
    assert figures.beside().splitlines()[2:] == [
        "| Hopper | reinforce | 2 | 3 M | 9 | 1000 [900, 1100] |  |",
        "| Hopper | trpo | 2 | 1 M | 9 | 900 [800, 1000] | 0.75 [0.00, 1.00] |",
        "| Swimmer | gamma-0.9999 | 1 | 3 M | 9 | 60 |  |",
        "| Swimmer | a2c | 1 | 1 M | 9 | 50 | 1.00 |",
    ]


def test_commands_of_the_same_options_and_seeds_are_one(results: Path):
    for env_id, name, n_seeds in (
        ("Hopper-v5", "reinforce", 2),
        ("Swimmer-v5", "reinforce", 2),
        ("Hopper-v5", "trpo", 3),
        ("Hopper-v5", "a2c", 3),
        ("CartPole-v1", "race-ppo", 1),
        ("CartPole-v1", "race-a2c", 2),
        ("CartPole-v1", "race-trpo", 2),
    ):
        fake_finals(env_id, name, (1.0,) * n_seeds, 1000)
    (results / "learning" / "Hopper-v5" / "a2c" / "seed_1.json").unlink()
    assert figures.commands().splitlines() == [
        "```",
        "python -m benchmarks.learning --env CartPole-v1 --algo ppo --name race-ppo --seeds 0 --every 9",
        "python -m benchmarks.learning --env CartPole-v1 --algo a2c trpo --name race --seeds 0-1 --every 9",
        "python -m benchmarks.learning --env Hopper-v5 --algo a2c --seeds 0,2 --every 9",
        "python -m benchmarks.learning --env Hopper-v5 --algo trpo --seeds 0-2 --every 9",
        "python -m benchmarks.learning --env Hopper-v5 Swimmer-v5 --seeds 0-1 --every 9",
        "```",
    ]


def test_the_commands_repeat_the_committed_results(results: Path, monkeypatch: pytest.MonkeyPatch):
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
    paths = [path for path in committed.glob("*/*/*.json") if not path.parent.name.startswith(figures.ADVANTAGE)]
    assert sorted(f"{env_id}/{name}/seed_{seed}.json" for env_id, name, seed in runs) == sorted(
        path.relative_to(committed).as_posix() for path in paths
    )


@pytest.mark.parametrize("algo", ["a2c", "trpo"])
def test_a_task_that_rl_zoo_has_in_another_version_has_the_settings_of_that(algo: str, tmp_path: Path):
    path = learning.settings_of_v4(algo, "Swimmer-v5", tmp_path)
    assert path is not None
    (env_id, settings), *others = yaml.safe_load(Path(path).read_text()).items()
    assert env_id == "Swimmer-v5" and not others
    assert (settings["gamma"], settings["normalize"], settings["n_timesteps"]) == (0.9999, True, 1e6)
    # Those that it has, and those of which it has nothing
    assert learning.settings_of_v4(algo, "CartPole-v1", tmp_path) is None
    assert learning.settings_of_v4(algo, "Unknown-v5", tmp_path) is None


def test_a_block_is_filled_and_a_missing_one_is_an_error(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("before <!-- a -->old<!-- /a --> <!-- b -->kept<!-- /b -->")
    common.fill(page, "a", r"new \1")
    assert page.read_text() == "before <!-- a -->\nnew \\1\n<!-- /a --> <!-- b -->kept<!-- /b -->"
    with pytest.raises(ValueError, match=r"page\.md has no block <!-- c -->"):
        common.fill(page, "c", "")


def test_the_pages_say_what_the_committed_results_say():
    results = {name: json.loads((common.RESULTS / f"{name}.json").read_text()) for name in ("soak", "throughput")}
    filled = {
        common.README: dict(headline=figures.headline(), peers=figures.peers()),
        common.ADVANTAGES: dict(advantages=figures.advantage_table()),
        common.PAGE: dict(
            article=article.comparison(article.read_runs()),
            beside=figures.beside(),
            commands=figures.commands(),
            learning=figures.table(),
            mujoco=figures.mujoco(),
            soak=soak.summary(results["soak"]),
            throughput=throughput.table(results["throughput"]),
        ),
        common.WHERE: {f"where-{task}": where_figures.block(task) for task in where.TASKS},
    }
    for page, blocks in filled.items():
        content = page.read_text(encoding="utf-8")
        assert [name for name, text in blocks.items() if f"<!-- {name} -->\n{text}\n<!-- /{name} -->" not in content] == []


@pytest.mark.parametrize("task", where.TASKS)
def test_the_tasks_are_environments(task: str):
    env = where.TASKS[task].env()
    check_env(env.unwrapped, skip_render_check=True)
    assert env.observation_space == env.unwrapped.observation_space


def play(env: Any, actions: Any, seed: int = 0) -> list[float]:
    """The rewards of an episode, whose actions may be a function of the environment."""
    env.reset(seed=seed)
    rewards, ended = [], False
    while not ended:
        action = actions(env.unwrapped) if callable(actions) else actions[len(rewards)]
        _, reward, terminated, truncated, _ = env.step(action)
        rewards.append(reward)
        ended = terminated or truncated
    return rewards


def test_a_delayed_reward_is_the_sum_of_an_episode_and_begins_anew():
    env = where.delayed_cartpole()
    for seed in (0, 1):
        at_once = play(env.env, lambda _: 1, seed)
        assert play(env, lambda _: 1, seed) == [0.0] * (len(at_once) - 1) + [sum(at_once)]


def test_coins_are_paid_once_and_the_exit_ends_the_episode():
    up, down, right = 0, 1, 2
    actions = [right, *[up] * 4, up, down, *[right] * 4, *[down] * 2, *[up] * 3, *[right] * 2, *[up] * 2]
    assert where.Treasure.moves[:3] == ((0, 1), (0, -1), (1, 0))
    rewards = play(where.Treasure(), actions)
    assert [step for step, reward in enumerate(rewards) if reward] == [4, 12, 18]
    assert len(rewards) == 19 and sum(rewards) == 3
    # Who never leaves has so many steps
    assert play(where.delayed_treasure(), lambda _: down) == [0.0] * 100


def test_arms_pay_what_the_context_says_on_average():
    env = where.Bandit()
    env.reset(seed=0)
    rewards = []
    for _ in range(4000):
        env.context = np.ones(8, np.float32)
        _, reward, terminated, _, _ = env.step(3)
        rewards.append(reward)
        assert terminated
    assert np.mean(rewards) == pytest.approx(where.Bandit.weights[3].sum(), abs=0.1)
    assert np.std(rewards) == pytest.approx(1, abs=0.1)


def test_each_ball_can_be_caught_and_the_image_has_it():
    def follow(env: where.Catch) -> int:
        image = env.observe()[:: env.scale, :: env.scale, 0]
        assert (image[env.row, env.column], image[-1, env.paddle]) == (255, 255) and (image > 0).sum() == 2
        return 1 + int(np.sign(env.column - env.paddle))

    for seed in range(20):
        assert sum(play(where.Catch(), follow, seed)) == where.Catch.balls
    assert len(play(where.Catch(), follow)) == where.Catch.balls * (where.Catch.cells - 1)


def test_who_follows_the_target_is_paid_for_it():
    def follow(env: where.Track) -> int:
        return 1 + int(np.sign(env.target - env.position - 9 * env.velocity))

    followed, idle = (play(where.track(), actions) for actions in (follow, lambda _: 1))
    assert len(followed) == len(idle) == 1000
    assert np.mean(followed) > np.mean(idle) + 0.2


@pytest.mark.parametrize("task", where.TASKS)
def test_all_algorithms_of_a_task_are_made(task: str):
    for algorithm in where.TASKS[task].algorithms.values():
        model = where.make_model(where.TASKS[task], algorithm, seed=0)
        assert type(model) is algorithm.cls and model.n_envs == algorithm.n_envs
        assert all(name in str(where.describe(algorithm)) for name in algorithm.kwargs)


def test_evaluations_go_through_the_same_episodes():
    task = where.TASKS["bandit"]
    evaluations = where.Evaluations(where.evaluation_env(task), 100, 20)
    model = A2C("MlpPolicy", task.env(), learning_rate=0.0, n_steps=100, seed=0)
    model.learn(300, callback=evaluations)
    first, *others = [point["mean_return"] for point in evaluations.points]
    assert others == [first, first]


def test_tasks_are_run_once_and_shown(results: Path, monkeypatch: pytest.MonkeyPatch):
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
    assert "\n2 seeds are too few to tell who returns more.\n" in page
    assert "](images/where_bandit.png)" in page and page.count("\nNot measured yet: ") == len(where.TASKS) - 1
    assert (results / "where_bandit.png").read_bytes().startswith(b"\x89PNG")


def test_a_verdict_says_what_the_intervals_say(results: Path):
    better, worse, same = np.array([9.0, 8, 9, 8, 9]), np.array([1.0, 2, 3, 1, 2]), np.array([5.0, 3, 1, 2, 9])
    for name, returns in (("reinforce", same), ("a2c", worse - 5), ("ppo", better + 5), ("ppo-long", same[::-1])):
        for seed, value in enumerate(returns):
            run = dict(seed=seed, final_returns=[value - 1, value + 1], training_return=7, settings="n_steps=5", seconds=3)
            common.write_json(where.FOLDER / "delayed-cartpole" / name / f"seed_{seed}.json", run)
    said = "reinforce returns more than a2c; returns less than ppo; cannot be told from ppo-long."
    assert where_figures.verdict("delayed-cartpole") == f"After 30,000 steps, {said}"
    rows = where_figures.table("delayed-cartpole").splitlines()
    assert rows[2] == "| reinforce | `n_steps=5` | 5 | 3.333 [1.333, 7.667] | 1, 9 | 7 |  | 3 |"
    assert [row.split(" | ")[6] for row in rows[3:5]] == ["1.00 [1.00, 1.00]", "0.00 [0.00, 0.00]"]
    (where.FOLDER / "delayed-cartpole" / "ppo" / "seed_4.json").unlink()
    assert where_figures.block("delayed-cartpole").startswith("Not measured yet: `python -m benchmarks.where --tasks")


runs_of_one = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6)


@given(runs_of_one, runs_of_one)
def test_the_probability_of_improvement_counts_pairs_and_half_of_ties(ours: list[float], theirs: list[float]):
    wins = 0.0
    for one in ours:
        for other in theirs:
            wins += 1 if one > other else 0.5 if one == other else 0
    found = where_figures.probability_of_improvement(np.array(ours), np.array(theirs))
    assert found == pytest.approx(wins / (len(ours) * len(theirs)))
    # Resamples are rows
    stacked = where_figures.probability_of_improvement(np.array([ours, ours[::-1]]), np.array([theirs, theirs]))
    np.testing.assert_allclose(stacked, [found, found])
    assert found + where_figures.probability_of_improvement(np.array(theirs), np.array(ours)) == pytest.approx(1)


def test_the_interval_of_an_improvement_holds_it():
    ours, theirs = np.array([1.0, 2, 3, 4, 5]), np.array([0.0, 2, 2.5, 6, 1])
    value, low, high = where_figures.improvement(ours, theirs)
    assert low < value < high and value == pytest.approx(16 / 25)
    assert where_figures.improvement(ours + 10, theirs) == (1, 1, 1)
    assert np.isnan(where_figures.improvement(ours[:1], theirs)[1:]).all()


def test_the_article_is_compared_up_to_the_same_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
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
    assert "our seeds return 40, 64 (interquartile mean 52) and the article's one seed 60: 1 of our 2 return less." in text
    assert "40 to 64 against 70" in text and "2 to 2 seconds, the article's 9." in text


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


@pytest.fixture
def gradients() -> np.ndarray:
    """30 made-up gradients of 4 parameters."""
    return np.random.default_rng(0).normal([1.0, 0, 0, 0], 0.5, size=(30, 4))


def test_moments_are_those_of_the_gradients(gradients: np.ndarray):
    n = len(gradients)
    (squared_mean,), (trace,) = variance.moments(gradients @ gradients.T, np.ones((1, n)))
    assert trace == pytest.approx(np.trace(np.cov(gradients.T)))
    assert squared_mean == pytest.approx(np.sum(gradients.mean(axis=0) ** 2) - trace / n)


def test_a_resample_pairs_no_batch_with_itself(gradients: np.ndarray):
    counts = variance.resamples(len(gradients), n_resamples=3)
    assert (counts[0] == 1).all() and (counts.sum(axis=1) == len(gradients)).all()
    squared_means, traces = variance.moments(gradients @ gradients.T, counts)
    for count, squared_mean, trace in zip(counts, squared_means, traces, strict=True):
        drawn = np.repeat(np.arange(len(gradients)), count.astype(int))
        pairs = [(gradients[i], gradients[j]) for i in drawn for j in drawn if i != j]
        assert squared_mean == pytest.approx(np.mean([one @ other for one, other in pairs]))
        assert trace == pytest.approx(np.mean([np.sum((one - other) ** 2) / 2 for one, other in pairs]))


def test_the_figures_of_variants_with_known_moments():
    """The same noise, halved, and a mean turned by 60 degrees. Fixed seed."""
    n, size = 500, 5
    noise = np.random.default_rng(0).normal(0, 1, size=(n, size))
    mean, turned = np.zeros((2, size))
    mean[0], turned[:2] = 1, (0.5, 0.75**0.5)
    none, other = variance.NO_BASELINE, variance.Variant("td", "linear", "old")
    lost = variance.Variant("q", "linear", "old")
    samples = {none: mean + noise, lost: noise, other: turned + noise / 4, variance.REFERENCE: mean + noise / 2}
    rows = {variance.Variant(*(row[name] for name in variance.Variant._fields)): row for row in variance.summary(samples)}
    # Resampling is paired: a ratio that is the same for all batches has no interval
    assert rows[variance.REFERENCE]["relative_variance"] == [0.25] * 3 and rows[none]["relative_variance"] == [1] * 3
    assert rows[none]["variance"] == pytest.approx(size, rel=0.1)
    for variant, snr in ((none, 1 / 5), (variance.REFERENCE, 4 / 5), (other, 16 / 5)):
        value, low, high = rows[variant]["snr"]
        assert low < value < high and low < snr < high
    value, low, high = rows[other]["cosine"]
    assert low < value < high < low + 0.2 and value == pytest.approx(0.5, abs=0.05)
    assert rows[variance.REFERENCE]["cosine"] is None and rows[lost]["cosine"] is None


def test_an_interval_covers_the_true_value_as_often_as_it_says():
    """200 experiments of 40 batches whose signal-to-noise ratio is 0.25; fixed seed."""
    rng = np.random.default_rng(2)
    counts = variance.resamples(40, n_resamples=400)
    covered = 0
    for _ in range(200):
        gradient = rng.normal([1.0, 0, 0, 0], 1, size=(40, 4))
        squared_mean, trace = variance.moments(gradient @ gradient.T, counts)
        _, low, high = variance.estimate(squared_mean / trace)
        covered += low <= 0.25 <= high
    assert 0.88 <= covered / 200 <= 0.99


def made_up_batch(seed: int, returns: np.ndarray | None = None) -> Any:
    """Two episodes of 30 steps of two state features and three actions."""
    rng = np.random.default_rng(seed)
    n = 60
    return SimpleNamespace(
        features=th.as_tensor(rng.normal(size=(n, 2)), dtype=th.float32),
        actions=rng.integers(3, size=(n, 1)),
        rewards=rng.normal(size=n),
        returns=rng.normal(size=n) if returns is None else returns,
        episode_starts=np.arange(n) % 30 == 0,
        gamma=0.9,
        size=lambda: n,
    )


def test_an_old_critic_has_not_seen_the_batch_and_a_fresh_one_has():
    first, second = made_up_batch(0), made_up_batch(1)
    other = made_up_batch(1, returns=2 * second.returns + 1)
    judged = []
    for latest in (second, other):
        critics = [variance.Critics(name, 2, spaces.Discrete(3)) for name in ("mean", "linear")]
        critics.append(variance.Critics("linear", 2, spaces.Discrete(3), memory=0.5))
        variance.all_advantages(first, critics, first.features)
        judged.append(variance.all_advantages(latest, critics, latest.features))
    one, two = judged
    assert len(one) == 1 + 2 + 3 * 4
    for advantage in ("q", "advantage", "td"):
        old, fresh, memory = (variance.Variant(advantage, "linear", fitted) for fitted in ("old", "fresh", "memory"))
        for variant in (old, memory):
            np.testing.assert_array_equal(one[variant], two[variant])
        assert np.abs(one[fresh] - two[fresh]).max() > 0.1
    # They are those of the package
    baseline, action_values = LinearBaseline(2), ActionValues(2, spaces.Discrete(3))
    for batch, fitted in ((first, "old"), (second, "fresh")):
        baseline.fit(batch.features.numpy(), batch.returns)
        action_values.fit(batch.features, th.as_tensor(batch.actions), batch.returns)
        values = baseline.predict(second.features).numpy().flatten()
        np.testing.assert_allclose(one["monte_carlo", "linear", fitted], second.returns - values)
        expected = action_values.predict(second.features, th.as_tensor(second.actions)).numpy().flatten()
        np.testing.assert_allclose(one["q", "linear", fitted], expected)
        np.testing.assert_allclose(one["advantage", "linear", fitted], expected - values)
        np.testing.assert_allclose(one["monte_carlo", "mean", fitted], second.returns - batch.returns.mean())
    np.testing.assert_array_equal(one[variance.NO_BASELINE], second.returns)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_the_gradient_is_a_sum_over_transitions_and_a_mean_over_episodes(env_id: str):
    model = REINFORCE("MlpPolicy", env_id, n_episodes=2, max_episode_steps=20, seed=0, policy_kwargs=dict(net_arch=[3]))
    model.learn(1)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    seen = []
    for buffer in variance.batches(model, 2):
        seen.append(buffer.rewards.copy())
        weights = np.random.default_rng(0).normal(size=(2, buffer.size()))
        found = variance.gradients(model, list(weights))
        expected = np.zeros_like(found)
        observations, actions, *_ = next(buffer.get())
        for t in range(buffer.size()):
            action = actions[t : t + 1].flatten() if env_id == "CartPole-v1" else actions[t : t + 1]
            log_prob = model.policy.get_distribution(observations[t : t + 1]).log_prob(action)
            score = th.cat([part.flatten() for part in th.autograd.grad(log_prob.sum(), model.policy.parameters())])
            expected += weights[:, t, None] * score.numpy() / 2
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    # The policy is frozen, and goes through other episodes
    assert all(th.equal(one, other) for one, other in zip(before, model.policy.parameters(), strict=True))
    assert len(seen[0]) != len(seen[1]) or not np.array_equal(*seen)


def test_variance_is_measured_once_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(variance, "TARGETS", {"CartPole-v1": 10.0})
    for name, path in (("RESULT", "variance.json"), ("ADVANTAGES", "page.md"), ("IMAGES", "")):
        monkeypatch.setattr(variance, name, tmp_path / path)
    (tmp_path / "page.md").write_text("<!-- variance --><!-- /variance -->")
    monkeypatch.setattr(sys, "argv", ["variance", "--batches", "6"])
    variance.main()
    result = json.loads((tmp_path / "variance.json").read_text())["CartPole-v1"]
    assert (result["batches"], result["episodes"], result["seed"]) == (6, 30, 0)
    # A reward of 1 a step
    assert result["mean_return"] == pytest.approx(result["transitions"] / 30, abs=0.01)
    assert result["training_steps"] > 0 and "command" in result and "torch" in result["versions"]
    assert len(result["variants"]) == 1 + 4 * 2 + 3 * 3 * 2 + 4
    assert result["explained_variance"]["monte_carlo mean fresh"] == pytest.approx(0, abs=1e-6)
    page = (tmp_path / "page.md").read_text()
    assert page.count("\n| monte_carlo |") == 10 and page.count("\n| td |") == 7
    assert "| monte_carlo | none |  | 1 |" in page
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "variance.png").unlink()
    monkeypatch.setattr(variance, "measure", None)
    for arguments in ([], ["--figures"]):
        monkeypatch.setattr(sys, "argv", ["variance", *arguments])
        variance.main()
    assert (tmp_path / "page.md").read_text() == page and (tmp_path / "variance.png").exists()
