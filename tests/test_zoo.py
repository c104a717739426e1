"""RL Zoo's commands as users start them, this project's hyperparameter files, and what register() changes."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from contextlib import nullcontext
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import huggingface_hub
import huggingface_sb3
import numpy as np
import optuna
import pytest
import rl_zoo3.exp_manager
import rl_zoo3.train
import torch as th
import yaml
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from sb3_reinforce import REINFORCE, zoo
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from tests.integration.common import assert_same_parameters

ENV = "LunarLanderContinuous-v3"
ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "zoo_configs"
ENTRIES = yaml.safe_load((CONFIGS / "reinforce.yml").read_text())
FIRST_RUN = Path("logs", "reinforce", f"{ENV}_1")
MODEL = FIRST_RUN / f"{ENV}.zip"
#: Batches of about 400 transitions
SHORT = ["-n", "1200", "--eval-episodes", "2", "-params", "n_steps:100"]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """No window, no figure that stays open, and no change of other packages that stays."""
    zoo.register()
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv(zoo.WORKERS, "0")
    monkeypatch.setattr(huggingface_sb3, "load_from_hub", huggingface_sb3.load_from_hub)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A working folder in which one model has been trained from the command line, and what was printed."""
    folder = tmp_path_factory.mktemp("work")
    # After the -params that SHORT ends with
    params = ["n_envs:4", "learning_rate:2e-3", "target_kl:0.02", "baseline:'quadratic'"]
    options = ["--eval-freq", "400", "--save-freq", "500", "-tb", "tensorboard", "-P", "--seed", "1"]
    printed = python(folder, "-m", "sb3_reinforce", "train", "--env", ENV, *options, *SHORT, *params).stdout
    return folder, printed


@pytest.fixture
def folder(trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, the working folder of the test."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=300)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sb3-reinforce", *arguments])
    zoo.main()


def experiment(folder: Path, env: str = ENV, algo: str = "reinforce", **kwargs: Any) -> Any:
    """The model that ``train`` would train."""
    manager = rl_zoo3.train.ExperimentManager(
        Namespace(), algo, env, str(folder), eval_freq=-1, seed=1, device="cpu", verbose=0, **kwargs
    )
    return manager.setup_experiment()[0]


def test_trains_from_any_folder(trained: tuple[Path, str]):
    folder, printed = trained
    assert f"Loading hyperparameters from: {CONFIGS / 'reinforce.yml'}" in printed
    assert "Using 4 environments" in printed
    steps = REINFORCE.load(folder / MODEL).num_timesteps
    assert "100% ━" in printed and f" {steps:,}/1,200 " in printed
    run_folder = folder / FIRST_RUN
    config = yaml.unsafe_load((run_folder / ENV / "config.yml").read_text())
    assert (config["n_steps"], config["target_kl"], config["baseline"]) == (100, 0.02, "quadratic")
    assert (run_folder / "best_model.zip").exists()
    assert list(run_folder.glob("rl_model_*_steps.zip"))
    assert len(np.load(run_folder / "evaluations.npz")["timesteps"]) >= 2
    assert list((folder / "tensorboard" / ENV).glob("REINFORCE_1/events.*"))
    assert len(list(run_folder.glob("*.monitor.csv"))) == 4


def test_the_model_needs_no_zoo_to_load(trained: tuple[Path, str]):
    script = f"""
import sys
sys.modules["rl_zoo3"] = None
from sb3_reinforce import REINFORCE
model = REINFORCE.load({str(MODEL)!r}, env={ENV!r})
print(model.target_kl, model.num_timesteps >= 1200)
model.learn(500, reset_num_timesteps=False)
"""
    assert "0.02 True" in python(trained[0], "-c", script).stdout


@pytest.mark.parametrize("options", [[], ["--load-best"], ["--load-last-checkpoint"]])
def test_enjoy(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: list[str]):
    run(monkeypatch, "enjoy", "--env", ENV, "-n", "1100", "--no-render", *options)
    assert "Mean reward: " in capsys.readouterr().out


def test_enjoy_renders(folder: Path, monkeypatch: pytest.MonkeyPatch):
    frames: list[str] = []
    monkeypatch.setattr(DummyVecEnv, "render", lambda self, mode: frames.append(self.render_mode))
    run(monkeypatch, "enjoy", "--env", ENV, "-n", "20")
    assert frames == ["human"] * 20


@pytest.mark.parametrize("option", ["-i", "--trained-agent"])
def test_continues(folder: Path, monkeypatch: pytest.MonkeyPatch, option: str):
    """From a model file, in a folder of its own, with the seed that is given and the steps counted anew."""
    before = REINFORCE.load(MODEL)
    run(monkeypatch, "train", "--env", ENV, *SHORT, option, str(MODEL), "--eval-freq", "-1", "--seed", "9")
    after = REINFORCE.load(FIRST_RUN.with_name(f"{ENV}_2") / MODEL.name)
    assert after._n_updates > before._n_updates
    assert before.seed == 1 and after.seed == 9
    assert after.num_timesteps < before.num_timesteps + 1200
    count = "observation_normalizer.count_0"
    assert after.policy.state_dict()[count] > before.policy.state_dict()[count]


CARTPOLE = "CartPole-v1"
GOES_ON = ["--env", CARTPOLE, "--eval-freq", "-1", "-tb", "tensorboard", "-params", "n_steps:40", "n_envs:2"]


def stop_at_update(monkeypatch: pytest.MonkeyPatch, n_updates: int, number: int) -> None:
    """The process gets a signal after so many updates."""
    gradient_norm = REINFORCE._gradient_norm

    def raise_signal(self: REINFORCE) -> float:
        if self._n_updates == n_updates:
            signal.raise_signal(number)
        return gradient_norm(self)

    monkeypatch.setattr(REINFORCE, "_gradient_norm", raise_signal)


def logs(folder: Path) -> dict[str, Any]:
    """Return and length of each episode of each environment; and what TensorBoard shows, but of speed."""
    run_folder = folder / "logs" / "reinforce" / f"{CARTPOLE}_1"
    found: dict[str, Any] = {}
    for path in sorted(run_folder.glob("*.monitor.csv")):
        header, names, *lines = path.read_text().splitlines()
        assert header.startswith("#{") and names == "r,l,t"
        found[path.name] = [line.rsplit(",", 1)[0] for line in lines]
    (log,) = (folder / "tensorboard" / CARTPOLE).iterdir()
    events = EventAccumulator(str(log))
    events.Reload()
    for name in set(events.Tags()["scalars"]) - {"time/fps", "time/between_rollouts"}:
        found[name] = [(event.step, event.value) for event in events.Scalars(name)]
    return found


def assert_same_as_without_a_stop(folder: Path, monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    """The only run in a folder is, to the last bit, the one that nobody has stopped, of as many steps and with seed 5."""
    model_path = Path("logs", "reinforce", f"{CARTPOLE}_1", f"{CARTPOLE}.zip")
    assert [path.name for path in (folder / "logs" / "reinforce").iterdir()] == [f"{CARTPOLE}_1"]
    whole = folder / "whole"
    whole.mkdir()
    monkeypatch.chdir(whole)
    run(monkeypatch, "train", *GOES_ON, "-n", str(n_steps), "--seed", "5")
    model, expected = (REINFORCE.load(path / model_path) for path in (folder, whole))
    assert_same_parameters(model, expected)
    for name in ("num_timesteps", "_n_updates", "_next_episode", "_n_iterations", "seed"):
        assert getattr(model, name) == getattr(expected, name) > 0
    assert logs(folder) == logs(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_run_that_was_stopped_goes_on_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: int
):
    """With its own seed, to the same weights and logs. Ctrl-C ends in SB3's zoo with a model that is saved."""
    monkeypatch.chdir(tmp_path)
    folder = Path("logs", "reinforce", f"{CARTPOLE}_1")
    with monkeypatch.context() as patch:
        stop_at_update(patch, 3, number)
        with nullcontext() if number == signal.SIGINT else pytest.raises(SystemExit, match="143"):
            run(monkeypatch, "train", *GOES_ON, "-n", "1000", "--seed", "5")
    assert f"To go on: sb3-reinforce train ... -i logs/reinforce/{CARTPOLE}_1, with" in capsys.readouterr().out
    assert (folder / f"{CARTPOLE}.zip").exists() == (number == signal.SIGINT)
    run(monkeypatch, "train", *GOES_ON, "-n", "1000", "-i", str(folder))
    assert "Going on from logs/reinforce" in capsys.readouterr().out
    assert_same_as_without_a_stop(tmp_path, monkeypatch, 1000)


def test_a_run_that_has_ended_goes_on_in_its_folder_for_more_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Twice, and stopped in between."""
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "train", *GOES_ON, "-n", "400", "--seed", "5")
    folder = Path("logs", "reinforce", f"{CARTPOLE}_1")
    with monkeypatch.context() as patch:
        stop_at_update(patch, 5, signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            run(monkeypatch, "train", *GOES_ON, "-n", "1000", "-i", f"{folder}/")
    run(monkeypatch, "train", *GOES_ON, "-n", "1000", "-i", str(tmp_path / folder))
    assert_same_as_without_a_stop(tmp_path, monkeypatch, 1000)


def test_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Batches are as large as without them, training is that on one environment, and a run goes on with other workers."""
    pytest.importorskip("loky")
    # Processes import this package from where this one does
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    one = [*GOES_ON[:-2], "n_steps:80", "n_envs:1", "-n", "600", "--seed", "5"]
    models = {}
    for name, options, path in (
        ("workers", [*GOES_ON, "-n", "300", "--seed", "5", "--workers", "2"], "workers"),
        ("one", one, "one"),
        ("other workers", [*GOES_ON, "-n", "600", "--workers=1", "-i", f"logs/reinforce/{CARTPOLE}_1"], "workers"),
        ("none", [*GOES_ON, "-n", "900", "-i", f"logs/reinforce/{CARTPOLE}_1"], "workers"),
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
    "options, words",
    [
        (["--algo", "ppo", "--env", CARTPOLE], "--workers are for training with reinforce"),
        (["--env", CARTPOLE, "-optimize"], "--workers are for training with reinforce"),
        (["--env", CARTPOLE, "-params", "normalize:True"], "wrappers of a VecEnv"),
        (["--env", CARTPOLE, "-params", "frame_stack:2"], "wrappers of a VecEnv"),
    ],
)
def test_workers_are_refused_where_they_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words):
        run(monkeypatch, "train", *options, "--workers", "2")


def test_a_run_with_vec_normalize_goes_on_with_its_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Those that are saved beside the checkpoint."""
    monkeypatch.chdir(tmp_path)
    options = [*GOES_ON, "normalize:True", "normalize_observations:False", "-n", "1000"]
    with monkeypatch.context() as patch:
        stop_at_update(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            run(monkeypatch, "train", *options)
    folder, counts = Path("logs", "reinforce", f"{CARTPOLE}_1"), []
    (statistics,) = folder.glob("checkpoint_vecnormalize_*.pkl")
    saved = VecNormalize.load(str(statistics), DummyVecEnv([lambda: gym.make(CARTPOLE)])).obs_rms.count

    learn_on = REINFORCE.learn

    def learn(self: REINFORCE, *args: Any, **kwargs: Any) -> REINFORCE:
        counts.append(self.get_vec_normalize_env().obs_rms.count)  # type: ignore[union-attr]
        return learn_on(self, *args, **kwargs)

    monkeypatch.setattr(REINFORCE, "learn", learn)
    run(monkeypatch, "train", *options, "-i", str(folder))
    assert counts == [saved] and saved > 100


@pytest.mark.parametrize("files", [[], [f"{CARTPOLE}.zip", "rl_model_500_steps.zip"], ["checkpoint_5_steps.zip"]], ids=len)
def test_a_folder_without_a_checkpoint_is_refused_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]
):
    """Also one of a file that is cut short."""
    for name in files:
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(SystemExit, match="has no checkpoint to go on from") as stop:
        run(monkeypatch, "train", *GOES_ON, "-i", str(tmp_path))
    assert str(tmp_path) in str(stop.value)


def test_a_folder_is_replaced_by_its_newest_checkpoint_however_the_option_is_written(tmp_path: Path):
    for n_steps in (9, 10):
        REINFORCE("MlpPolicy", CARTPOLE).save(tmp_path / f"checkpoint_{n_steps}_steps.zip")
    folder, path = str(tmp_path), str(tmp_path / "checkpoint_10_steps.zip")
    others = ["--env", CARTPOLE, "-n", "5"]
    for given in (["-i", folder], ["--trained-agent", folder], [f"--trained-agent={folder}"], [f"-i={folder}"]):
        assert zoo.find_checkpoint([*given, *others]) == [*others, "--trained-agent", path]
        assert zoo.find_checkpoint([*others, *given]) == [*others, "--trained-agent", path]
    for given in (["-i", path], ["-i", str(MODEL)], ["-f", folder]):
        assert zoo.find_checkpoint([*given, *others]) == [*given, *others]


def test_records_a_video(folder: Path, monkeypatch: pytest.MonkeyPatch):
    run(monkeypatch, "record_video", "--env", ENV, "-n", "20")
    (video,) = (folder / FIRST_RUN / "videos").glob("*.mp4")
    assert b"ftyp" in video.read_bytes()[:16]


def test_records_the_training(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """It starts ``record_video`` in processes of its own, and ``ffmpeg``, which need not be installed."""
    # One process for each of these
    for model in (FIRST_RUN / "best_model.zip", *FIRST_RUN.glob("rl_model_*_steps.zip")):
        model.unlink()
    path = os.environ["PATH"]
    run(monkeypatch, "record_training", "--env", ENV, "-n", "20", "--gif")
    videos = FIRST_RUN / "videos"
    assert b"ftyp" in (videos / "training.mp4").read_bytes()[:16]
    assert (videos / "training.gif").read_bytes().startswith(b"GIF8")
    assert len(list(videos.glob("final-model-*.mp4"))) == 1
    assert os.environ["PATH"] == path


def test_starts_other_programs_as_ever(folder: Path):
    call = subprocess.call
    with zoo._patch_subprocesses():
        assert subprocess.call([sys.executable, "-c", "raise SystemExit(3)"]) == 3
        assert subprocess.call("exit 4", shell=True) == 4
    assert subprocess.call is call


def test_plots(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    plt = pytest.importorskip("matplotlib.pyplot")
    labels = []
    monkeypatch.setattr(plt, "show", lambda: labels.extend(line.get_label() for line in plt.gca().lines))
    # rl_zoo3 plots no scores of one run alone
    shutil.copytree(FIRST_RUN, FIRST_RUN.with_name(f"{ENV}_2"))
    run(monkeypatch, "plot_train", "-e", ENV, "-w", "3")
    assert sorted(labels) == [f"{ENV}_1", f"{ENV}_2"]
    run(monkeypatch, "all_plots", "-e", ENV, "--no-display", "-o", "results")
    assert f"|{ENV}|" in capsys.readouterr().out
    run(monkeypatch, "plot_from_file", "-i", "results", "-o", "figure.png", "--format", "png")
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    plt.close("all")


def test_benchmark(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """It starts ``enjoy`` in a process of its own."""
    run(monkeypatch, "benchmark", "--no-hub", "-n", "1100")
    assert f"|reinforce|{ENV}|" in (folder / "benchmark.md").read_text()


def test_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """There and back, through a folder that stands for the hub."""
    hub = folder / "the hub"

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        if not (hub / filename).exists():
            response = SimpleNamespace(headers={}, request=None)
            raise huggingface_hub.errors.HfHubHTTPError(f"404: {filename}", response=response)  # type: ignore[arg-type]
        return str(hub / filename)

    def upload(self: Any, repo_id: str, folder_path: Path, **kwargs: Any) -> None:
        shutil.copytree(folder_path, hub)

    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, **kwargs: "url")
    monkeypatch.setattr(api, "snapshot_download", lambda self, local_dir, **kwargs: local_dir.mkdir(parents=True))
    monkeypatch.setattr(api, "upload_folder", upload)
    run(monkeypatch, "push_to_hub", "--env", ENV, "-orga", "someone", "--no-render")
    assert "stable-baselines3" in (hub / "README.md").read_text()

    run(monkeypatch, "load_from_hub", "--env", ENV, "-orga", "someone", "-f", "downloaded")
    run(monkeypatch, "enjoy", "--env", ENV, "-f", "downloaded", "-n", "1100", "--no-render")
    assert "Mean reward: " in capsys.readouterr().out


def test_vec_normalize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    params = ["-params", "normalize:True", "normalize_observations:False", "n_steps:100"]
    run(monkeypatch, "train", "--env", ENV, "-n", "1200", *params, "--eval-freq", "500", "--eval-episodes", "1")
    statistics = tmp_path / FIRST_RUN / ENV / "vecnormalize.pkl"
    env = VecNormalize.load(str(statistics), DummyVecEnv([lambda: gym.make(ENV)]))
    # Each observation once: nothing but what reset() returns is counted beside the steps
    assert env.obs_rms.count >= 1200
    assert not np.allclose(env.obs_rms.mean, 0)
    run(monkeypatch, "enjoy", "--env", ENV, "--no-render", "-n", "20")
    assert "Loading running average" in capsys.readouterr().out


def test_training_environments_are_the_fast_ones(tmp_path: Path):
    env = experiment(tmp_path).env
    assert type(env) is EpisodeVecEnv
    # With a render mode, this environment draws every frame
    assert set(env.get_attr("render_mode")) == {None}
    subproc = experiment(tmp_path, vec_env_type="subproc").env
    assert type(subproc) is SubprocVecEnv
    subproc.close()


def test_other_algorithms_are_left_alone(tmp_path: Path):
    model = experiment(tmp_path, "CartPole-v1", "ppo")
    assert type(model.env) is DummyVecEnv


@pytest.mark.parametrize("env", ENTRIES)
def test_every_entry_builds_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: str):
    # MuJoCo writes a log into the working folder
    monkeypatch.chdir(tmp_path)
    if env == "default":
        assert "MountainCar-v0" not in ENTRIES
        env = "MountainCar-v0"
    if "mujoco" in str(gym.spec(env).entry_point) and find_spec("mujoco") is None:
        pytest.skip("MuJoCo is not installed: pip install 'sb3-reinforce[mujoco]'")
    model = experiment(tmp_path, env)
    assert isinstance(model, REINFORCE)


def test_the_general_recipe(tmp_path: Path):
    """It is the one-liner's."""
    model = experiment(tmp_path, "MountainCar-v0")
    one_liner = REINFORCE("MlpPolicy", "MountainCar-v0")
    for name in signature(REINFORCE).parameters.keys() - {"policy", "env", "verbose", "seed", "device", "_init_setup_model"}:
        assert str(getattr(model, name.replace("stats", "_stats"))) == str(getattr(one_liner, name.replace("stats", "_stats")))


def test_env_kwargs_cut_training_episodes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Neither the evaluations nor ``enjoy`` are cut, unless they are told so."""
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
    model.save(tmp_path / "model")
    script = f"""
import sys
sys.modules["rl_zoo3"] = None
from sb3_reinforce import REINFORCE
print(REINFORCE.load({str(tmp_path / "model")!r}).target_kl(0.75))
"""
    assert python(tmp_path, "-c", script).stdout.strip() == "0.015"
    for wrong in ("falling", "lin_fast"):
        with pytest.raises(ValueError, match=rf"target_kl must be a schedule, .*, got target_kl='{wrong}'"):
            experiment(tmp_path, hyperparams=dict(target_kl=wrong))


def test_the_articles_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    model = experiment(tmp_path, config="article.yml")
    assert (model.n_envs, model.gamma, model.n_episodes) == (1, 0.97, None)
    # Until there are more than 3000
    assert model.n_steps == 3001
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == [1e-3] * 3
    assert (model.ent_coef, model.target_kl) == (0.0, None)
    assert not model.use_sde
    assert (model.normalize_advantage, model.normalize_observations, model.bootstrap_timeouts) == (True, False, False)
    assert (model.baseline, model.baseline_memory, model.policy.value_net.ridge) == ("linear", 0.0, 0.0)
    assert model.max_episode_steps is None
    assert model.env.get_attr("spec")[0].max_episode_steps == gym.spec(ENV).max_episode_steps
    policy = model.policy
    layers = [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]
    assert [type(layer) for layer in policy.mlp_extractor.policy_net] == layers
    linear = [layer for layer in [*policy.mlp_extractor.policy_net, policy.action_net] if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(8, 32), (32, 32), (32, 2)]
    for layer in linear:
        # Glorot-uniform
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.8 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    assert th.equal(policy.log_std, th.zeros(2)) and policy.log_std.requires_grad
    optimizer = policy.optimizer
    assert type(optimizer) is th.optim.Adam
    options = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
    assert options == dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False)
    saved = yaml.safe_load((CONFIGS / "article.yml").read_text())[ENV]
    assert saved["n_timesteps"] == 1.6e6


def test_config_file_is_ours_unless_there_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert zoo.find_config(None) == str(CONFIGS / "reinforce.yml")
    assert zoo.find_config("article.yml") == str(CONFIGS / "article.yml")
    assert zoo.find_config("some.module") == "some.module"
    for name in ("article.yml", "reinforce.yml"):
        (tmp_path / name).touch()
    assert zoo.find_config("article.yml") == "article.yml"
    assert zoo.find_config(None) == str(CONFIGS / "reinforce.yml")


def test_defaults_give_way(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []
    monkeypatch.setattr("rl_zoo3.cli.enjoy", lambda: seen.append(sys.argv[1:]))
    run(monkeypatch, "enjoy", "--algo", "ppo", "-f", "elsewhere")
    assert seen == [[*zoo.COMMANDS["enjoy"], "--algo", "ppo", "-f", "elsewhere"]]


def test_all_commands_of_rl_zoo3():
    package = Path(rl_zoo3.__file__).parent
    scripts = [*package.glob("*.py"), *package.glob("plots/*.py")]
    assert {script.stem for script in scripts if "ArgumentParser(" in script.read_text()} == zoo.COMMANDS.keys()


@pytest.mark.parametrize("command", zoo.COMMANDS)
def test_help(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, command, "--help")
    assert "usage: " in capsys.readouterr().out


def test_register_twice():
    def state() -> tuple[Any, ...]:
        algos = dict(rl_zoo3.ALGOS)
        return algos, rl_zoo3.train.ExperimentManager, rl_zoo3.exp_manager.ExperimentManager

    before = state()
    zoo.register()
    assert state() == before
    assert before[0]["reinforce"] is REINFORCE
    assert before[1] is before[2]


def test_own_script(tmp_path: Path):
    """register() is all that a script needs, whatever it has imported before."""
    script = """
import sys
from rl_zoo3.train import train
import sb3_reinforce.tools.zoo
sb3_reinforce.tools.zoo.register()
sys.argv = ["train", "--algo", "reinforce", "--env", "CartPole-v1", "-n", "100", "--eval-freq", "-1", "-params", "n_steps:20"]
train()
"""
    assert f"Loading hyperparameters from: {CONFIGS / 'reinforce.yml'}" in python(tmp_path, "-c", script).stdout
    assert (tmp_path / "logs" / "reinforce" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


def test_says_what_to_install(tmp_path: Path):
    script = "import sys; sys.modules['rl_zoo3'] = None; from sb3_reinforce.tools.zoo import main; main()"
    process = subprocess.run([sys.executable, "-c", script, "train"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 1
    assert "pip install 'sb3-reinforce[zoo]'" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(("env", "n_actions"), [("CartPole-v1", 0), ("Pendulum-v1", 1)])
def test_search_space(env: str, n_actions: int):
    """Whatever is sampled makes a model, and reading it from the study gives the same."""

    def objective(trial: optuna.Trial) -> float:
        sampled = HYPERPARAMS_SAMPLER["reinforce"](trial, n_actions, 4, {})
        assert sampled == HYPERPARAMS_CONVERTER["reinforce"](trial.params)
        assert ("log_std_init" in sampled["policy_kwargs"]) == (n_actions > 0)
        REINFORCE("MlpPolicy", env, **sampled)
        return 0.0

    optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).optimize(objective, n_trials=20)


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


def test_wheel_has_the_hyperparameter_files(tmp_path: Path):
    python(ROOT, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for file in CONFIGS.iterdir():
            assert archive.read(f"sb3_reinforce/zoo_configs/{file.name}") == file.read_bytes()
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert b"sb3-reinforce = sb3_reinforce.tools.zoo:main" in archive.read(entry_points)
        archive.extractall(tmp_path / "installed")
    script = "from sb3_reinforce import zoo; print(zoo.__file__, zoo.find_config(None))"
    installed = tmp_path / "installed" / "sb3_reinforce"
    assert python(tmp_path / "installed", "-c", script).stdout.split() == [
        str(installed / "zoo.py"),
        str(installed / "zoo_configs" / "reinforce.yml"),
    ]
