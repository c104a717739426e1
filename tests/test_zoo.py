"""RL Zoo: commands, resume, hyperparameter files, and register()."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import gymnasium as gym
import huggingface_sb3
import numpy as np
import optuna
import pytest
import rl_zoo3.exp_manager
import rl_zoo3.train
import yaml
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_reinforce import REINFORCE, EpisodeVecEnv
from sb3_reinforce.tools import zoo
from sb3_reinforce.tools.report import read_run
from tests.runs.common import assert_same_parameters, monitor_rows, scalars, stop_at_update, wait_for_the_next_second
from tests.test_reinforce import ARTICLE

ENV = "LunarLanderContinuous-v3"
ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "zoo_configs"
ENTRIES = yaml.safe_load((CONFIGS / "reinforce.yml").read_text())
FIRST_RUN = Path("logs", "reinforce", f"{ENV}_1")
MODEL = FIRST_RUN / f"{ENV}.zip"
#: Batches of about 400 transitions
SHORT = ["-n", "1200", "--eval-episodes", "2", "-params", "n_episodes:None", "n_steps:100"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without windows, and without lasting changes of other packages."""
    zoo.register()
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(huggingface_sb3, "load_from_hub", huggingface_sb3.load_from_hub)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Working folder of a training from the command line, and its output."""
    folder = tmp_path_factory.mktemp("work")
    # Appended to the -params at the end of SHORT
    params = ["n_envs:4", "learning_rate:2e-3", "target_kl:0.02", "baseline:'linear'"]
    options = ["--eval-freq", "400", "--save-freq", "500", "-tb", "tensorboard", "-P", "--seed", "1"]
    result = python(folder, "-m", "sb3_reinforce", "train", "--env", ENV, *options, *SHORT, *params)
    assert "render_mode" not in result.stderr
    return folder, result.stdout


@pytest.fixture
def folder(trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a copy of this folder."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=300)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sb3-reinforce", *arguments])
    monkeypatch.setattr(sys, "orig_argv", ["python", "sb3-reinforce", *arguments])
    zoo.main()


def experiment(folder: Path, env: str = ENV, algo: str = "reinforce", **kwargs: Any) -> Any:
    """Return the model that ``train`` would train."""
    manager = rl_zoo3.train.ExperimentManager(
        Namespace(), algo, env, str(folder), eval_freq=-1, seed=1, device="cpu", verbose=0, **kwargs
    )
    return manager.setup_experiment()[0]


def test_train(trained: tuple[Path, str]):
    folder, printed = trained
    start = printed.partition("Using")[0]
    assert (
        "Set (reinforce.yml and options): baseline='linear'" in start and "n_envs=4" in start and "n_timesteps=1200" in start
    )
    assert "Default: advantage='monte_carlo'" in start and start.count("baseline=") == start.count("n_timesteps=") == 1
    assert not any(word in printed for word in ("OrderedDict", "unsupported")) and max(map(len, start.splitlines())) < 80
    assert "100% ━━━━━━━━━━━━━━━━━━━━ 1,200/1,200 " in printed
    run_folder = folder / FIRST_RUN
    config = yaml.unsafe_load((run_folder / ENV / "config.yml").read_text())
    assert (config["n_steps"], config["target_kl"], config["baseline"]) == (100, 0.02, "linear")
    assert (run_folder / "best_model.zip").exists()
    assert list(run_folder.glob("rl_model_*_steps.zip"))
    assert len(np.load(run_folder / "evaluations.npz")["timesteps"]) >= 2
    assert list((folder / "tensorboard" / ENV).glob("REINFORCE_1/events.*"))
    assert len(list(run_folder.glob("*.monitor.csv"))) == 4


@pytest.mark.slow
def test_models_can_be_loaded_without_rl_zoo3(trained: tuple[Path, str], tmp_path: Path):
    """Also with a linear schedule of rl_zoo3."""
    experiment(tmp_path, hyperparams=dict(target_kl="lin_0.02")).save(tmp_path / "model")
    script = f"""
import sys
sys.modules["rl_zoo3"] = None
from sb3_reinforce import REINFORCE
model = REINFORCE.load({str(MODEL)!r}, env={ENV!r})
print(model.target_kl, model.num_timesteps >= 1200)
model.learn(500, reset_num_timesteps=False)
print(REINFORCE.load({str(tmp_path / "model")!r}).target_kl(0.75))
"""
    printed = python(trained[0], "-c", script).stdout
    assert "0.02 True\n" in printed and printed.endswith("0.015\n")


def test_enjoy(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    for options in ([], ["--load-best"], ["--load-last-checkpoint"]):
        run(monkeypatch, "enjoy", "--env", ENV, "-n", "1100", "--no-render", *options)
        assert "Mean reward: " in capsys.readouterr().out
    frames: list[str] = []
    monkeypatch.setattr(DummyVecEnv, "render", lambda self, mode: frames.append(self.render_mode))
    run(monkeypatch, "enjoy", "--env", ENV, "-n", "20")
    assert frames == ["human"] * 20
    # What a killed run leaves
    for path in FIRST_RUN.glob("*.zip"):
        if not path.name.startswith("checkpoint_"):
            path.unlink()
    run(monkeypatch, "enjoy", "--env", ENV, "-n", "20", "--no-render", "--load-last-checkpoint")
    assert f"Loading {FIRST_RUN}/checkpoint_" in capsys.readouterr().out


def test_a_model_file_is_trained_further_in_a_new_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """With the given seed, and steps counted from 0."""
    before = REINFORCE.load(MODEL)
    run(monkeypatch, "train", "--env", ENV, *SHORT, "-i", str(MODEL), "--eval-freq", "-1", "--seed", "9")
    after = REINFORCE.load(FIRST_RUN.with_name(f"{ENV}_2") / MODEL.name)
    assert after._n_updates > before._n_updates
    assert before.seed == 1 and after.seed == 9
    assert after.num_timesteps < before.num_timesteps + 1200
    count = "observation_normalizer.count_0"
    assert after.policy.state_dict()[count] > before.policy.state_dict()[count]


# Resume

CARTPOLE = "CartPole-v1"
OPTIONS = "--eval-freq -1 -tb tensorboard -params n_episodes:None n_steps:40 n_envs:2 monitor_kwargs:dict(info_keywords=())"
RESUMABLE = ["--env", CARTPOLE, *OPTIONS.split()]


def logs(folder: Path) -> dict[str, Any]:
    """Return and length of each episode of each environment, and values of TensorBoard without times."""
    run_folder = folder / "logs" / "reinforce" / f"{CARTPOLE}_1"
    (log,) = (folder / "tensorboard" / CARTPOLE).iterdir()
    return monitor_rows(run_folder) | scalars(log)


def assert_same_as_uninterrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    """Compare the only run in a folder to an uninterrupted run with seed 5."""
    model_path = Path("logs", "reinforce", f"{CARTPOLE}_1", f"{CARTPOLE}.zip")
    assert [path.name for path in (folder / "logs" / "reinforce").iterdir()] == [f"{CARTPOLE}_1"]
    whole = folder / "whole"
    whole.mkdir()
    monkeypatch.chdir(whole)
    run(monkeypatch, "train", *RESUMABLE, "-n", str(n_steps), "--seed", "5")
    model, expected = (REINFORCE.load(path / model_path) for path in (folder, whole))
    assert_same_parameters(model, expected)
    for name in ("num_timesteps", "_n_updates", "_next_episode", "_n_iterations", "seed"):
        assert getattr(model, name) == getattr(expected, name) > 0
    assert logs(folder) == logs(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_run_is_resumed_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: int
):
    """With its own seed, command, weights and logs. After Ctrl-C, rl_zoo3 also saves the model."""
    monkeypatch.chdir(tmp_path)
    folder = Path("logs", "reinforce", f"{CARTPOLE}_1")
    with monkeypatch.context() as patch:
        stop_at_update(patch, 3, number)
        with nullcontext() if number == signal.SIGINT else pytest.raises(SystemExit, match="143"):
            run(monkeypatch, "train", *RESUMABLE, "-n", "1000", "--seed", "5")
    program, resume = re.search(r"To resume: (.*) (train .*)\n", capsys.readouterr().out).groups()  # type: ignore[union-attr]
    assert resume == f"train -i logs/reinforce/{CARTPOLE}_1" and shutil.which(shlex.split(program)[0])
    assert (folder / f"{CARTPOLE}.zip").exists() == (number == signal.SIGINT)
    files = {path: path.read_text() for path in (folder / CARTPOLE).iterdir()}
    wait_for_the_next_second()
    run(monkeypatch, *shlex.split(resume))
    assert {path: path.read_text() for path in (folder / CARTPOLE).iterdir()} == files
    checkpoint = str(next(folder.glob("checkpoint_*.zip")))
    manager = rl_zoo3.train.ExperimentManager(Namespace(), "reinforce", CARTPOLE, "logs", trained_agent=checkpoint, seed=1)
    assert manager.seed == 5
    assert "Resuming from logs/reinforce" in capsys.readouterr().out
    assert_same_as_uninterrupted(tmp_path, monkeypatch, 1000)


def test_a_complete_run_is_resumed_for_more_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Twice, and stopped in between."""
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "train", *RESUMABLE, "-n", "400", "--seed", "5")
    folder = Path("logs", "reinforce", f"{CARTPOLE}_1")
    wait_for_the_next_second()
    with monkeypatch.context() as patch:
        stop_at_update(patch, 5, signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            run(monkeypatch, "train", *RESUMABLE, "-n", "1000", "-i", f"{folder}/")
    wait_for_the_next_second()
    with pytest.raises(SystemExit, match="A resumed model keeps its hyperparameters: remove gamma from -params"):
        run(monkeypatch, "train", "-i", str(folder), "-params", "gamma:0.5", "n_steps:40")
    run(monkeypatch, "train", "-i", str(tmp_path / folder))
    # The command that makes this run
    command = read_run(folder).command
    assert command.endswith(" -n 1000") and "-n 400" not in command and "--seed 5" in command  # type: ignore
    assert_same_as_uninterrupted(tmp_path, monkeypatch, 1000)


def test_a_run_is_resumed_with_the_statistics_of_vec_normalize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    options = [*RESUMABLE, "normalize:True", "normalize_observations:False", "-n", "1000"]
    with monkeypatch.context() as patch:
        stop_at_update(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            run(monkeypatch, "train", *options)
    folder, counts = Path("logs", "reinforce", f"{CARTPOLE}_1"), []
    (statistics,) = folder.glob("checkpoint_*vecnormalize_*.pkl")
    saved = VecNormalize.load(str(statistics), DummyVecEnv([lambda: gym.make(CARTPOLE)])).obs_rms.count
    original_learn = REINFORCE.learn

    def learn(self: REINFORCE, *args: Any, **kwargs: Any) -> REINFORCE:
        counts.append(self.get_vec_normalize_env().obs_rms.count)  # type: ignore[union-attr]
        return original_learn(self, *args, **kwargs)

    monkeypatch.setattr(REINFORCE, "learn", learn)
    run(monkeypatch, "train", *options, "-i", str(folder))
    assert counts == [saved] and saved > 100


@pytest.mark.parametrize("name", [None, f"{CARTPOLE}.zip", "rl_model_500_steps.zip", "checkpoint_5_steps.zip"])
def test_a_folder_without_a_complete_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None):
    if name is not None:
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(SystemExit, match="has no checkpoint to resume from") as stop:
        run(monkeypatch, "train", *RESUMABLE, "-i", str(tmp_path))
    assert str(tmp_path) in str(stop.value)


def test_a_folder_gives_the_newest_checkpoint_and_the_options_of_its_run(tmp_path: Path):
    model = REINFORCE("MlpPolicy", CARTPOLE)
    for n_steps in (9, 10):
        model.save(tmp_path / f"checkpoint_{n_steps}_steps.zip")
    (tmp_path / "E").mkdir()
    (tmp_path / "E" / "args.yml").write_text(yaml.dump(dict(trained_agent="", n_timesteps=7, workers=2)))
    path = tmp_path / "checkpoint_10_steps.zip"
    for given, expected in (["-i", tmp_path, "-n", "5"], (path, 5, 2)), (["-i", path], (path, -1, 0)):
        parser = zoo.TrainParser()
        parser.add_argument("-i", "--trained-agent", default="")
        parser.add_argument("-n", "--n-timesteps", type=int, default=-1)
        arguments = parser.parse_args(list(map(str, given)))
        assert (Path(arguments.trained_agent), arguments.n_timesteps, arguments.workers) == expected


# Workers


@pytest.mark.slow
def test_the_commands_of_the_page_work_in_a_new_folder(tmp_path: Path):
    page = (ROOT / "docs" / "rl_zoo.md").read_text().partition("## Your own environment")[2]
    blocks = re.findall(r"```\w*\n(.*?)```", page, re.DOTALL)
    program = f'#!/bin/sh\nPYTHONPATH="{ROOT}:$PYTHONPATH" exec "{sys.executable}" -m sb3_reinforce "$@"\n'
    for name, text in zip(("corridor.py", "my.yml", "commands", "sb3-reinforce"), [*blocks[:3], program], strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "sb3-reinforce").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    result = subprocess.run(["bash", "-e", "commands"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert "Mean reward: -1" in result.stdout and "of no effect" not in result.stderr
    assert "The report is logs/reinforce/Corridor-v0_1/report.html" in result.stdout, result.stderr


@pytest.mark.slow
def test_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Batches have the same size without workers, and a run can be resumed with another number of workers."""
    pytest.importorskip("loky")
    # Worker processes import this package from the same path
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    one = [*RESUMABLE[:-2], "n_steps:80", "n_envs:1", "-n", "600", "--seed", "5"]
    models = {}
    for name, options, path in (
        ("workers", [*RESUMABLE, "-n", "300", "--seed", "5", "--workers", "2"], "workers"),
        ("one", one, "one"),
        ("other workers", [*RESUMABLE, "-n", "600", "--workers=1", "-i", f"logs/reinforce/{CARTPOLE}_1"], "workers"),
        ("none", ["-n", "900", "--workers", "0", "-i", f"logs/reinforce/{CARTPOLE}_1"], "workers"),
    ):
        (tmp_path / path).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / path)
        run(monkeypatch, "train", *options)
        models[name] = REINFORCE.load(f"logs/reinforce/{CARTPOLE}_1/{CARTPOLE}.zip")
    n_steps = [(model.n_steps, model.n_envs) for model in models.values()]
    assert n_steps == [(80, 1), (80, 1), (80, 1), (40, 2)]
    assert_same_parameters(models["other workers"], models["one"])
    assert models["none"].num_timesteps >= 900
    results = load_results(str(tmp_path / "workers" / "logs" / "reinforce" / f"{CARTPOLE}_1"))
    assert set(load_results(str(tmp_path / "one" / "logs" / "reinforce" / f"{CARTPOLE}_1"))["r"]) <= set(results["r"])


@pytest.mark.parametrize(
    "options",
    [["--algo", "ppo"], ["-optimize"], ["-params", "normalize:True"], ["-params", "frame_stack:2"]],
    ids=lambda options: options[-1],
)
def test_workers_raise_an_error_where_they_are_not_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"--workers (is only available for|does not support)"):
        run(monkeypatch, "train", "--env", CARTPOLE, *options, "--workers", "2")


# Other commands of rl_zoo3


@pytest.mark.slow
def test_videos(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """``record_training`` starts ``record_video`` in subprocesses, and ``ffmpeg``, which may come from imageio-ffmpeg."""
    run(monkeypatch, "record_video", "--env", ENV, "-n", "20")
    videos = FIRST_RUN / "videos"
    (video,) = videos.glob("*.mp4")
    assert b"ftyp" in video.read_bytes()[:16]
    # Each of these would start a subprocess
    for model in (FIRST_RUN / "best_model.zip", *FIRST_RUN.glob("rl_model_*_steps.zip")):
        model.unlink()
    path, call = os.environ["PATH"], subprocess.call
    run(monkeypatch, "record_training", "--env", ENV, "-n", "20", "--gif")
    assert b"ftyp" in (videos / "training.mp4").read_bytes()[:16]
    assert (videos / "training.gif").read_bytes().startswith(b"GIF8")
    assert os.environ["PATH"] == path and subprocess.call is call


@pytest.mark.slow
def test_plots_and_benchmark(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    plt = pytest.importorskip("matplotlib.pyplot")
    labels = []
    monkeypatch.setattr(plt, "show", lambda: labels.extend(line.get_label() for line in plt.gca().lines))
    # rl_zoo3 does not plot the scores of a single run
    shutil.copytree(FIRST_RUN, FIRST_RUN.with_name(f"{ENV}_2"))
    run(monkeypatch, "plot_train", "-e", ENV, "-w", "3")
    assert sorted(labels) == [f"{ENV}_1", f"{ENV}_2"]
    run(monkeypatch, "all_plots", "-e", ENV, "--no-display", "-o", "results")
    assert f"|{ENV}|" in capsys.readouterr().out
    run(monkeypatch, "plot_from_file", "-i", "results", "-o", "figure.png", "--format", "png")
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    plt.close("all")
    run(monkeypatch, "benchmark", "--no-hub", "-n", "1100")
    assert f"|reinforce|{ENV}|" in (folder / "benchmark.md").read_text()


# Hyperparameters


def test_training_environments_skip_idle_steps(tmp_path: Path):
    env = experiment(tmp_path).env
    assert type(env) is EpisodeVecEnv
    # With a render mode, the environment would draw every frame
    assert set(env.get_attr("render_mode")) == {None}
    # Other algorithms are not changed
    assert type(experiment(tmp_path, CARTPOLE, "ppo").env) is DummyVecEnv


@pytest.mark.parametrize(("env", "config"), [*((env, "reinforce.yml") for env in ENTRIES), (ENV, "article.yml")])
def test_every_entry_builds_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: str, config: str):
    """Also with the hyperparameters of a trial."""
    # MuJoCo writes a log to the working folder
    monkeypatch.chdir(tmp_path)
    env = "MountainCar-v0" if env == "default" else env
    if "mujoco" in str(gym.spec(env).entry_point) and find_spec("mujoco") is None:
        pytest.skip("MuJoCo is not installed: pip install 'sb3-reinforce[mujoco]'")
    assert isinstance(experiment(tmp_path, env, config=config), REINFORCE)
    tried: list[REINFORCE] = []
    monkeypatch.setattr(REINFORCE, "learn", lambda self, *args, **kwargs: tried.append(self))
    study = ["--storage", "study.log", "--study-name", "study"]
    options = ["--conf-file", config, "--n-trials", "2", "--sampler", "random", "--no-optim-plots", *study]
    run(monkeypatch, "train", "--env", env, "-optimize", *options)
    for number, trial in enumerate(tried):
        model = experiment(tmp_path, env, config=config, storage="study.log", study_name="study", trial_id=number)
        for name in ("n_steps", "n_episodes", "gamma", "target_kl", "cg_damping", "baseline_memory", "policy_kwargs"):
            assert getattr(model, name) == getattr(trial, name), name


def test_the_default_entry_has_the_default_hyperparameters(tmp_path: Path):
    assert "MountainCar-v0" not in ENTRIES
    model = experiment(tmp_path, "MountainCar-v0")
    default = REINFORCE("MlpPolicy", "MountainCar-v0", seed=1, device="cpu")
    for name in signature(REINFORCE).parameters.keys() - {"policy", "env", "_init_setup_model", "unsupported"}:
        assert str(getattr(model, name.replace("stats", "_stats"))) == str(getattr(default, name.replace("stats", "_stats")))


def test_env_kwargs_only_limit_training_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Not those of evaluations, nor those of ``enjoy`` unless it gets the same option."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yml"
    entry = dict(n_timesteps=300, policy="MlpPolicy", n_steps=20, env_kwargs=dict(max_episode_steps=30))
    config.write_text(yaml.safe_dump({"Pendulum-v1": entry}))
    options = ["--conf-file", str(config), "--eval-freq", "150", "--eval-episodes", "1"]
    run(monkeypatch, "train", "--env", "Pendulum-v1", *options)
    folder = tmp_path / "logs" / "reinforce" / "Pendulum-v1_1"
    assert np.loadtxt(folder / "0.monitor.csv", delimiter=",", skiprows=2)[:, 1].tolist() == [30] * 10
    assert np.load(folder / "evaluations.npz")["ep_lengths"].tolist() == [[200], [200]]
    for options, length in (([], 200), (["--env-kwargs", "max_episode_steps:20"], 20)):
        run(monkeypatch, "enjoy", "--env", "Pendulum-v1", "-n", "200", "--no-render", *options)
        assert f"Mean episode length: {length}.00 +/- 0.00" in capsys.readouterr().out


def test_a_linear_schedule_of_the_divergence(tmp_path: Path):
    model = experiment(tmp_path, hyperparams=dict(target_kl="lin_0.02"))
    assert [model.target_kl(progress) for progress in (1.0, 0.5, 0.0)] == [0.02, 0.01, 0.0]
    for wrong in ("falling", "lin_fast"):
        with pytest.raises(ValueError, match=rf"target_kl must be 'auto', a schedule, .*, got target_kl='{wrong}'"):
            experiment(tmp_path, hyperparams=dict(target_kl=wrong))


def test_the_recipe_of_the_article(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its settings are those that give the article's algorithm in tests/test_reinforce.py."""
    monkeypatch.chdir(tmp_path)
    model = experiment(tmp_path, config="article.yml")
    # More than 3000 steps
    assert (model.n_envs, model.n_episodes, model.n_steps, model.max_episode_steps) == (1, None, 3001, None)
    assert (model.advantage, model.use_sde) == ("monte_carlo", False)
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == [ARTICLE["learning_rate"]] * 3
    for name in ARTICLE.keys() - {"learning_rate"}:
        assert getattr(model, name) == ARTICLE[name], name


def test_find_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert zoo.find_config(None) == str(CONFIGS / "reinforce.yml")
    assert zoo.find_config("article.yml") == str(CONFIGS / "article.yml")
    assert zoo.find_config("some.module") == "some.module"
    for name in ("article.yml", "reinforce.yml"):
        (tmp_path / name).touch()
    assert zoo.find_config("article.yml") == "article.yml"
    assert zoo.find_config(None) == str(CONFIGS / "reinforce.yml")


@pytest.mark.parametrize("command", zoo.COMMANDS)
def test_help(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, command, "--help")
    printed = capsys.readouterr().out
    assert "usage: " in printed
    for text in ("--workers N", "(default: reinforce)", "(default: logs)"):
        assert (text in printed) == (command == "train")


#: Command -> part of its message
ERRORS = {
    "enjoy": "logs/reinforce folder was not found",
    "record_video": "logs/reinforce folder was not found",
    "push_to_hub --env CartPole-v1 -orga me": "logs/reinforce folder was not found",
    "plot_from_file -i no": "No such file or directory: 'no.pkl'",
    "report no": "no is not a run: no such folder",
    "trian": "invalid choice: 'trian'",
    "train --nope": "unrecognized arguments: --nope",
    "train -i no": "no such file or folder: no",
    "train --env No-v0": "No-v0 not found in gym registry",
    "train --conf-file no": "No module named 'no'",
    "train --conf-file wrong.yml": 'in "wrong.yml", line 2',
    "train --conf-file empty.yml": "empty.yml has no dictionary of hyperparameters",
    "train -params no:2": "REINFORCE has no argument 'no'",
    "train -params n:(": "'(' was never closed",
    "train -params n_envs:0": "n_envs must be an integer of at least 1",
    "train --workers -1": "argument --workers: must be at least 0",
    "train -n 9 -tb empty.yml": "Not a directory: 'empty.yml",
    "train --storage study.log --study-name s --trial-id 0": "study.log has no trial 0",
}


@pytest.mark.parametrize("command", ERRORS)
def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command: str):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yml").write_text("a:\n  - [")
    Path("empty.yml").touch()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *command.split())
    printed = capsys.readouterr().err.strip() if stop.value.code == 2 else str(stop.value)
    assert ERRORS[command] in printed and "\n" not in printed


def test_an_error_in_an_environment_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gym.envs.classic_control.CartPoleEnv, "step", lambda self, action: {}["speed"])
    with pytest.raises(KeyError, match="speed"):
        run(monkeypatch, "train", "--env", CARTPOLE, "-n", "10")


def test_names_the_extra_if_rl_zoo3_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    with pytest.raises(SystemExit, match=r"pip install 'sb3-reinforce\[zoo\]'"):
        run(monkeypatch, "train", "--env", CARTPOLE)


@pytest.mark.slow
def test_two_processes_search_in_one_study(tmp_path: Path):
    options = ["--env", "CartPole-v1", "-n", "500", "--n-trials", "2", "--n-evaluations", "2", "--eval-episodes", "1"]
    study = ["--optimize-hyperparameters", "--no-optim-plots", "--storage", "study.log", "--study-name", "both"]
    command = [sys.executable, "-m", "sb3_reinforce", "train", *options, *study]
    processes = [
        subprocess.Popen([*command, "--seed", seed], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for seed in "12"
    ]
    for process in processes:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log")))
    trials = optuna.load_study(study_name="both", storage=storage).trials
    assert len(trials) == 4
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}

    model = experiment(tmp_path, "CartPole-v1", storage=str(tmp_path / "study.log"), study_name="both", trial_id=3)
    assert model.gamma == trials[3].user_attrs["gamma"]
