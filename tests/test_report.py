"""HTML reports: content, missing and damaged parts, comparison of runs, and valid and harmless HTML."""

import json
import os
import re
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_reinforce import REINFORCE, AtomicCheckpointCallback
from sb3_reinforce.tools import report, write_report, zoo
from sb3_reinforce.tools.report import estimates
from sb3_reinforce.tools.report.runs import read_run

ENV = "CartPole-v1"
VOID = ("meta", "link", "br", "img", "input", "hr", "source")


class Page(HTMLParser):
    """Check that tags match, headings are in order, ids are unique, and that nothing is loaded or executed."""

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.level = 0
        self.labels: list[str] = []
        self.texts: list[str] = []
        self.feed(self.html)
        self.close()
        assert self.open == []
        assert self.html.startswith("<!doctype html>\n<html lang=")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag not in VOID:
            self.open.append(tag)
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name, value in values.items():
            assert not name.startswith("on")
            assert value.startswith(("data:", "#")) or name not in ("src", "href", "xlink:href", "poster", "action")
            assert "url(" not in value.replace("url(#", "")
        if "id" in values:
            assert values["id"] not in self.ids
            self.ids.add(values["id"])
        if re.fullmatch(r"h[1-6]", tag):
            assert int(tag[1]) <= self.level + 1
            self.level = int(tag[1])
        if tag == "th":
            assert values["scope"] in ("row", "col")
        if tag == "video" or values.get("role") == "img":
            assert values["aria-label"]
            self.labels.append(values["aria-label"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        else:
            self.texts.append(data)


def train(folder: Path, seed: int, **kwargs: Any) -> REINFORCE:
    """Small run with the logs of SB3 and a checkpoint."""
    env = make_vec_env(ENV, 2, monitor_dir=str(folder))
    tensorboard = str(folder / "tensorboard")
    model = REINFORCE("MlpPolicy", env, n_steps=100, n_episodes=None, seed=seed, tensorboard_log=tensorboard, **kwargs)
    evaluations = EvalCallback(make_vec_env(ENV, 2), n_eval_episodes=3, eval_freq=200, log_path=str(folder), verbose=0)
    model.learn(1500, callback=[evaluations, AtomicCheckpointCallback(folder / "checkpoints")])
    model.save(folder / "model")
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, two of them with the same hyperparameters, and the files of the example in the first."""
    folder = tmp_path_factory.mktemp("runs")
    for number, (seed, gamma) in enumerate([(5, 0.99), (6, 0.99), (7, 0.9)], start=1):
        train(folder / f"{ENV}_{number}", seed, gamma=gamma)
    first = folder / f"{ENV}_1"
    result = dict(versions={"stable-baselines3": "2.3.4"}, seed=5, steps=2345, seconds=1, returns=[90, 110, 130])
    result |= dict(lengths=[90, 110, 130], machine=dict(platform="Atari", processors=2))
    (first / "result.json").write_text(json.dumps(result))
    (first / "arguments.json").write_text(json.dumps(dict(seed=5, threshold=475.0, evaluation_episodes=3)))
    (first / "landing.mp4").write_bytes(b"no real video")
    # Not where the models say
    return folder.rename(folder.with_name("moved"))


@pytest.fixture
def runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Copy of these runs in the working folder."""
    shutil.copytree(trained, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return sorted(Path("runs").iterdir())


def test_a_page_contains_all_parts_of_a_run(runs: list[Path]):
    path = write_report(runs[:1])
    assert path == runs[0] / "report.html"
    page = Page(path)
    model = REINFORCE.load(runs[0] / "model")
    evaluations = np.load(runs[0] / "evaluations.npz")
    for text in (
        f"{ENV}, seed 5 algorithm REINFORCE mean return [95% interval] 110 [",
        f"steps 2,345 updates {model._n_updates} training episodes ",
        "stable-baselines3 2.3.4 machine Atari, 2 processors",
        "Settings that differ from the defaults of REINFORCE name value n_envs 2 n_steps 100 n_episodes None 25 settings",
        "policy_class MlpPolicy n_envs 2 learning_rate 0.001 n_steps 100 gamma 0.99",
        "worst and best 90, 130 mean length 110 steps episodes with at least 475 0%",
        f"{len(evaluations['timesteps'])} evaluations during training",
        "python examples/lunar_lander.py --seed 5 --threshold 475.0 --evaluation-episodes 3",
    ):
        assert text in page.text
    assert 'src="data:video/mp4;base64,bm8gcmVhbCB2aWRlbw=="' in page.html
    assert "Not in this report" not in page.text
    # Discrete actions have no standard deviation
    titles = (
        "Return, Video without sound, Entropy loss, Divergence, Explained variance, Gradient signal, Damping, Episode length"
    )
    assert ", ".join(re.split(" against|:", label)[0] for label in page.labels) == titles
    returns = evaluations["results"].mean(axis=1)
    assert f"from {estimates.number(returns[0])} to {estimates.number(returns[-1])}, at best" in page.labels[0]


EVALUATIONS = "Evaluations during training"
PIECES: dict[str, tuple[str, str]] = {
    "Training episodes": ("*.monitor.csv", "no *.monitor.csv"),
    EVALUATIONS: ("evaluations.npz", "no evaluations.npz"),
    "Hyperparameters": ("**/*.zip", "no model file"),
    "Evaluation after training": ("result.json", "no result.json"),
    "Diagnostics": ("**/events.*", "no TensorBoard log"),
    "Command": ("*.json", "no arguments.json or command.txt"),
    "Video": ("*.mp4", "no *.mp4"),
}


def spoil(pattern: str, folder: Path, change: Callable[[Path], object]) -> None:
    paths = list(folder.glob(pattern))
    assert paths
    for path in paths:
        change(path)


@pytest.mark.parametrize("what", PIECES)
def test_missing_parts_are_listed(runs: list[Path], what: str):
    pattern, why = PIECES[what]
    spoil(pattern, runs[0], Path.unlink)
    assert f"{what}: {why}" in Page(write_report(runs[:1])).text


def test_runs_with_different_missing_parts_are_compared(runs: list[Path]):
    for run, lacks in zip(runs, ("Hyperparameters", "Evaluations during training", "Diagnostics"), strict=True):
        spoil(PIECES[lacks][0], run, Path.unlink)
    text = Page(write_report(runs, "page.html")).text
    for line in ("unknown settings", "gamma=0.99", f"{ENV}_2 REINFORCE (2) 6 yes ", "last 100 training episodes"):
        assert line in text


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 neither", b"[1]", b"\xff\xfe\x00"])
def test_damaged_parts_are_listed(runs: list[Path], content: bytes):
    for pattern in ("*.monitor.csv", "evaluations.npz", "**/*.zip", "*.json", "**/events.*"):
        spoil(pattern, runs[0], lambda path: path.write_bytes(content))
    with pytest.raises(ValueError, match="is not a run"):
        read_run(runs[0])
    shutil.copy(runs[1] / "evaluations.npz", runs[0])
    page = Page(write_report(runs[:1]))
    assert all(f"{what}: " in page.text for what in PIECES.keys() - {EVALUATIONS, "Video", "Diagnostics"})
    assert "Hyperparameters: BadZipFile: File is not a zip file" in page.text
    np.savez(runs[1] / "evaluations.npz", timesteps=[1], results=[[1e308]])
    assert "numbers below" in read_run(runs[1]).missing[EVALUATIONS]


def test_an_incomplete_tensorboard_log_is_read_up_to_its_end(runs: list[Path]):
    whole = read_run(runs[0]).scalars["train/grad_norm"][0]
    spoil("**/events.*", runs[0], lambda path: path.write_bytes(path.read_bytes()[:-2000]))
    part = read_run(runs[0]).scalars["train/grad_norm"][0]
    assert 0 < len(part) < len(whole)
    np.testing.assert_array_equal(part, whole[: len(part)])


def test_a_killed_run_has_the_hyperparameters_of_its_newest_checkpoint(runs: list[Path]):
    for name in ("model.zip", "result.json", "arguments.json"):
        (runs[0] / name).unlink()
    page = Page(write_report(runs[:1]))
    steps = REINFORCE.load(next(runs[0].glob("checkpoints/*.zip"))).num_timesteps
    assert f"steps {steps:,}" in page.text and "gamma 0.99" in page.text and "PyTorch" in page.text
    assert "in the last evaluation during training" in page.text


@pytest.mark.parametrize("name", ["nowhere", "empty", "runs", "models"])
def test_a_folder_without_a_run_is_an_error(runs: list[Path], name: str, capsys: pytest.CaptureFixture):
    Path("empty").mkdir()
    Path("models").mkdir()
    Path("models", "notes.zip").write_bytes(b"no model")
    with pytest.raises(SystemExit, match=f"^{name} is not a run: ") as error:
        report.main([str(runs[0]), name])
    assert (str(runs[0]) in str(error.value)) == (name == "runs")
    assert not Path("report.html").exists()


def test_several_runs_are_compared(runs: list[Path], capsys: pytest.CaptureFixture):
    # Without duplicates
    report.main([*map(str, runs), str(runs[0].resolve())])
    assert capsys.readouterr().out == "The report is report.html\n"
    page = Page(Path("report.html"))
    assert write_report([*runs, runs[0].resolve()], "again.html").read_bytes() == Path("report.html").read_bytes()
    means = [110.0] + [np.load(run / "evaluations.npz")["results"][-1].mean() for run in runs[1:]]
    low, high = sorted(map(estimates.number, means[:2]), key=float)
    # The bootstrap interval of two runs contains both
    for line in (
        f"(1) {ENV} 2 {estimates.number(np.mean(means[:2]))} [{low}, {high}] {low}, {high} gamma=0.99 ",
        f"(2) {ENV} 1 {estimates.number(means[2])} ",
    ):
        assert line in page.text
    for x in ("steps", "seconds"):
        assert f"Evaluations in {ENV} against {x}: REINFORCE (1), 2 seeds; REINFORCE (2), 1 seed" in page.labels
    for run, group, seed in zip(runs, "112", "567", strict=True):
        assert re.search(rf"{run.name} REINFORCE \({group}\) {seed} yes [\d,]+ \d+ [\d.]+ \[", page.text)


def test_names_are_escaped(runs: list[Path]):
    evil = "<script>alert(1)</script> $x_{$ \"'&"
    folder = runs[0].rename(Path("runs", "<img src=x onerror=alert(2)> [a] *"))
    for path in folder.glob("*.monitor.csv"):
        path.write_text(path.read_text().replace(f'"{ENV}"', json.dumps(f"{evil}\ud800")))
    (folder / "landing.mp4").rename(folder / "<b>.mp4")
    saved = json.loads((folder / "result.json").read_text())
    (folder / "arguments.json").unlink()
    (folder / "result.json").write_text(json.dumps({**saved, "versions": {evil: evil}}))
    for folders in ([folder], [folder, runs[1]]):
        # Page checks for scripts, handlers and addresses
        page = Page(write_report(folders, "page.html"))
        assert page.text.count(evil) >= 3 and folder.name in page.text and "<b>.mp4" in page.text


def test_the_interquartile_mean_and_its_interval():
    values = np.array([-1000.0, 1, 2, 3, 4, 5, 6, 1000])
    assert estimates.iqm(values) == 3.5
    sample = np.random.default_rng(1).normal(10, 2, (2, 400))
    low, high = estimates.interval(sample, np.mean)
    # About two standard errors to each side
    np.testing.assert_allclose(sample.mean(axis=1) - low, 1.96 * sample.std(axis=1) / 20, rtol=0.1)
    np.testing.assert_allclose(high - sample.mean(axis=1), 1.96 * sample.std(axis=1) / 20, rtol=0.1)
    assert estimates.interval(np.full(5, 3.0), estimates.iqm) == (3, 3)
    assert np.isnan(estimates.interval(np.ones((4, 1)), np.mean)).all()


@pytest.fixture
def zoo_run(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run as RL Zoo writes it: the model is named after the environment."""
    Path("logs").mkdir()
    folder = runs[1].rename(Path("logs", f"{ENV}_1"))
    (folder / "model.zip").rename(folder / f"{ENV}.zip")
    shutil.rmtree(folder / "checkpoints")
    write_zoo_files(folder, "python -m sb3_reinforce train --env CartPole-v1")
    return folder


def write_zoo_files(folder: Path, command: str, algo: str | None = None, **config: Any) -> None:
    (folder / ENV).mkdir(exist_ok=True)
    if algo is not None:
        (folder / ENV / "args.yml").write_text(yaml.dump(OrderedDict(algo=algo, seed=4, n_timesteps=600)))
    (folder / ENV / "command.txt").write_text(command)
    (folder / ENV / "config.yml").write_text(yaml.dump(OrderedDict(n_timesteps=1e6, policy="MlpPolicy", **config)))


def test_a_run_of_rl_zoo(zoo_run: Path):
    write_zoo_files(zoo_run, "python -m sb3_reinforce train --env CartPole-v1", env_kwargs=dict(max_episode_steps=60))
    page = Page(write_report([zoo_run]))
    assert "sb3-reinforce train --env CartPole-v1 --seed 6" in page.text
    assert "env_kwargs max_episode_steps: 60" in page.text and "n_timesteps" not in page.text
    assert "Gradient signal" in page.text and "PyTorch" in page.text
    assert page.text.endswith("Not in this report Evaluation after training: no result.json Video: no *.mp4")


@pytest.fixture
def a2c_runs(zoo_run: Path) -> list[Path]:
    """Two runs of A2C as RL Zoo writes them: a finished one, and one that was killed before it saved a model."""
    folders = [Path("logs", "a2c", f"{ENV}_{number}") for number in (1, 2)]
    A2C("MlpPolicy", make_vec_env(ENV, 2, monitor_dir=str(folders[0])), gamma=0.9).learn(600).save(folders[0] / ENV)
    np.savez(folders[0] / "evaluations.npz", timesteps=[200, 600], results=[[10.0], [20.0]])
    shutil.copytree(folders[0], folders[1], ignore=shutil.ignore_patterns("*.zip"))
    np.savez(folders[1] / "evaluations.npz", timesteps=[200], results=[[900.0]])
    spoil("*.csv", folders[1], lambda path: path.write_text("".join(path.read_text().splitlines(True)[:4])))
    for folder in folders:
        write_zoo_files(folder, "python -m sb3_reinforce train --algo a2c", "a2c", n_envs=2, gamma=0.9)
    return folders


def test_algorithms_are_compared_without_unfinished_runs(zoo_run: Path, a2c_runs: list[Path]):
    page = Page(write_report([zoo_run, *a2c_runs], "page.html"))
    assert page.text.startswith("REINFORCE, A2C: 3 runs")
    for x in ("steps", "seconds"):
        assert f"Evaluations in {ENV} against {x}: REINFORCE, 1 seed; A2C, 1 seed" in page.labels
    assert f"A2C {ENV} 1 20 20, 20 same settings Unfinished runs" in page.text
    assert re.search(rf"averaged: a2c/{ENV}_2: A2C, \d+ of 600 steps", page.text)
    differ = "Settings that differ from the defaults of A2C name value n_envs 2 gamma 0.9 "
    assert page.text.count(differ) == 2
    # Without evaluations, training episodes are compared
    (a2c_runs[0] / "evaluations.npz").unlink()
    page = Page(write_report([zoo_run, *a2c_runs], "page.html"))
    assert f"Training episodes in {ENV} against seconds: REINFORCE, 1 seed; A2C, 1 seed" in page.labels
    last = estimates.number(read_run(a2c_runs[0]).episodes["r"].tail(100).mean())
    assert f"A2C {ENV} 1 {last} {last}, {last} same settings" in page.text


def test_a_run_that_reached_its_threshold_is_finished(runs: list[Path], a2c_runs: list[Path]):
    (runs[0] / "arguments.json").write_text(json.dumps(dict(timesteps=9000)))
    spoil("**/*.zip", runs[0], Path.unlink)
    assert read_run(runs[0]).is_finished
    (runs[0] / "result.json").unlink()
    assert read_run(runs[0]).is_finished is False
    shutil.copy(a2c_runs[0] / f"{ENV}.zip", a2c_runs[1] / "best_model.zip")
    assert [read_run(folder).is_finished for folder in a2c_runs] == [True, False]


@pytest.mark.parametrize("algorithm", [REINFORCE, A2C, PPO, DQN, SAC])
def test_defaults_are_no_changed_settings(tmp_path: Path, algorithm: Any):
    folder = tmp_path / algorithm.__name__.lower() / "run"
    algorithm("MlpPolicy", "Pendulum-v1" if algorithm is SAC else ENV).save(folder / "model")
    run = read_run(folder)
    assert run.algorithm == algorithm.__name__ and run.changed == {} and "gamma" in run.settings


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("/a/python -m sb3_reinforce train --env E --seed 6", "sb3-reinforce train --env E --seed 6"),
        ("python3 /b/bin/sb3-reinforce train --env E --seed 7", "sb3-reinforce train --env E --seed 7 --seed 6"),
        ("python mine.py --env E", "python mine.py --env E --seed 6"),
        (
            "'a b/python' -m sb3_reinforce train -params 'policy:dict(net_arch=[16, 16], a=1)' n:5",
            "sb3-reinforce train -params 'policy:dict(net_arch=[16, 16], a=1)' n:5 --seed 6",
        ),
        ("x sb3-reinforce train -i model.zip --env E", "sb3-reinforce train -i model.zip --env E --seed 6"),
    ],
)
def test_the_command_of_rl_zoo_is_completed(zoo_run: Path, written: str, expected: str):
    write_zoo_files(zoo_run, written)
    assert read_run(zoo_run).command == expected


# Folders from strangers


def test_hyperparameters_create_no_objects(zoo_run: Path):
    """Neither Python's nor the billions of items that a few lines of aliases stand for."""
    lines = ["- - - a", "    - !!python/object/apply:os.mkdir [made]", "  - - b0", "    - &b0 [1, 1, 1, 1, 1, 1, 1, 1]"]
    for i in range(1, 12):
        lines += [f"  - - b{i}", f"    - &b{i} [{', '.join([f'*b{i - 1}'] * 8)}]"]
    (zoo_run / ENV / "config.yml").write_text("\n".join(["!!python/object/apply:collections.OrderedDict", *lines]))
    settings = read_run(zoo_run).settings
    assert settings["a"] == "!!python/object/apply:os.mkdir [made]" and settings["b11"].startswith("&b11 [*b10, *b10")
    assert not Path("made").exists()


@pytest.mark.parametrize("kind", ["link", "linked folder", "pipe"])
def test_only_regular_files_are_read(runs: list[Path], kind: str):
    """Links may lead out of the folder, and pipes do not end."""
    outside = runs[0].rename("outside").resolve()
    runs[0].mkdir()
    for path in outside.iterdir() if kind == "linked folder" else outside.rglob("*"):
        inside = runs[0] / path.relative_to(outside)
        if path.is_dir() and kind != "linked folder":
            inside.mkdir()
        elif kind == "pipe":
            os.mkfifo(inside)
        elif path.is_dir() == (kind == "linked folder"):
            inside.symlink_to(path)
    (runs[0] / "evaluations.npz").unlink(missing_ok=True)
    shutil.copy(outside / "evaluations.npz", runs[0])
    assert read_run(runs[0]).missing == {what: why for what, (_, why) in PIECES.items() if what != EVALUATIONS}


def test_large_files_are_not_read(runs: list[Path]):
    for what in PIECES.keys() - {EVALUATIONS}:
        spoil(PIECES[what][0], runs[0], lambda path: os.truncate(path, 31_000_000))
    missing = read_run(runs[0]).missing
    assert len(missing) == 7 and all(re.search(r"more than [\d,]+ bytes|too large", why) for why in missing.values())


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_archives_are_unpacked_up_to_a_limit(runs: list[Path], method: int):
    for path in [runs[0] / "evaluations.npz", *runs[0].rglob("*.zip")]:
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("timesteps.npy" if path.suffix == ".npz" else "data", bytes(31_000_000))
    missing = read_run(runs[0]).missing
    for what in (EVALUATIONS, "Hyperparameters"):
        assert re.search(r"has more than [\d,]+ bytes|another method than deflate", missing[what])


def test_a_report_replaces_nothing_but_itself(runs: list[Path]):
    Path("other").write_text("other")
    for name in ("report.html", ".report.html.tmp"):
        (runs[0] / name).symlink_to(Path("other").resolve())
    assert not write_report(runs[:1]).is_symlink()
    assert Path("other").read_text() == "other"


def test_the_command_line(runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def no_zoo() -> None:
        raise ImportError("rl_zoo3 is not needed")

    monkeypatch.setattr(zoo, "register", no_zoo)
    monkeypatch.setattr(sys, "argv", ["sb3-reinforce", "report", str(runs[0]), "--output", "page.html"])
    zoo.main()
    assert capsys.readouterr().out == "The report is page.html\n"
    assert Page(Path("page.html")).text.startswith(f"REINFORCE: {ENV}_1")
    with pytest.raises(SystemExit, match="nowhere"):
        report.main([str(runs[0]), "--output", "nowhere/page.html"])
