"""``examples/lunar_lander.py``: files of a run, hyperparameters, and resuming after signals."""

import json
import os
import re
import shlex
import signal
import sys
import time
from functools import partial
from inspect import signature
from pathlib import Path

import lunar_lander
import numpy as np
import pytest
from stable_baselines3.common.monitor import load_results

from benchmarks import showcase
from benchmarks.learning import make_model
from sb3_reinforce import REINFORCE
from tests.runs import small_lander
from tests.runs.common import assert_same_parameters, monitor_rows, scalars, start_process


def run(monkeypatch: pytest.MonkeyPatch, runs: Path, *arguments: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["lunar_lander.py", "--runs", str(runs), *arguments])
    lunar_lander.main()
    return runs / f"{lunar_lander.ENV}_1"


def test_the_folder_of_a_run_contains_all_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    monkeypatch.setattr(lunar_lander, "record_video", partial(lunar_lander.record_video, tries=1))
    folder = run(monkeypatch, tmp_path, "--timesteps", "4000", "--evaluation-episodes", "3")
    printed = capsys.readouterr().out
    assert f"everything goes to {folder}\n" in printed
    printed = printed[printed.index("\nThe policy returns ") :]
    assert f" of 3 new episodes reach 200 (solved).\nEverything is in {folder}:\n" in printed
    assert max(map(len, printed.replace(str(folder), "").splitlines())) <= 80 and "|" not in printed
    summary = (folder / "summary.md").read_text()
    for name in ("model.zip", "learning_curve.png", "landing.mp4", "report.html", "result.json", "tensorboard"):
        assert name in summary and name in printed
        assert (folder / name).exists()
    assert list((folder / "tensorboard").rglob("events.*"))
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert b"ftyp" in (folder / "landing.mp4").read_bytes()[:16]
    returns = np.array(json.loads((folder / "result.json").read_text())["returns"])
    assert len(returns) == 3
    model = REINFORCE.load(folder / "model")
    assert load_results(str(folder))["l"].sum() == model.num_timesteps >= 4000

    # benchmarks/showcase.py copies the figures of a run to the docs
    monkeypatch.setattr(showcase, "IMAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["showcase", str(folder)])
    showcase.main()
    assert (tmp_path / "train.png").read_bytes() == (folder / "learning_curve.png").read_bytes()
    assert (tmp_path / "landing.gif").read_bytes().startswith(b"GIF8")


def test_hyperparameters_are_those_of_the_hyperparameter_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Stop(Exception):
        pass

    def learn(self: REINFORCE, total_timesteps: int, **kwargs: object) -> None:
        raise Stop(self, total_timesteps)

    monkeypatch.setattr(REINFORCE, "learn", learn)
    with pytest.raises(Stop) as stop:
        run(monkeypatch, tmp_path)
    model, timesteps = stop.value.args
    expected, learning = make_model("reinforce", lunar_lander.ENV, 0, None, {})
    assert timesteps == learning["total_timesteps"]
    assert type(model.env) is type(expected.env) and model.n_envs == expected.n_envs
    for env in (model.env, expected.env):
        assert [spec.max_episode_steps for spec in env.get_attr("spec")] == [400] * 8
    others = {"policy", "env", "stats_window_size", "tensorboard_log", "verbose", "_init_setup_model", "unsupported"}
    for name in signature(REINFORCE).parameters.keys() - others:
        assert getattr(model, name) == getattr(expected, name), name
    assert type(model.policy) is type(expected.policy)


def test_each_run_has_a_new_folder_with_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for number, seed in ((1, "7"), (2, "8")):
        monkeypatch.setattr(sys, "argv", ["lunar_lander.py", "--runs", str(tmp_path), "--seed", seed])
        arguments = lunar_lander.parse_arguments()
        folder = lunar_lander.new_folder(arguments)
        assert folder == tmp_path / f"{lunar_lander.ENV}_{number}"
        monkeypatch.setattr(sys, "argv", ["lunar_lander.py", "--resume", str(folder), "--threshold", "3"])
        resumed = vars(lunar_lander.parse_arguments())
        assert resumed == vars(arguments) | dict(resume=folder, runs=Path("runs"), threshold=3.0)


@pytest.mark.parametrize("content", [None, '{"seed": 3, "thresh'], ids=["missing", "incomplete"])
def test_resuming_a_folder_without_a_run_is_an_error(content: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if content is not None:
        (tmp_path / "arguments.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["lunar_lander.py", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit, match="no run to resume") as stop:
        lunar_lander.main()
    assert f"--resume {tmp_path}: " in str(stop.value)


@pytest.mark.slow
def test_the_example_solves_the_lander(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    folder = run(monkeypatch, tmp_path)
    assert np.mean(json.loads((folder / "result.json").read_text())["returns"]) >= 200


# Resume


class Example:
    """A small version of the example in another process."""

    def __init__(self, runs: Path, *arguments: str):
        if "--resume" not in arguments:
            arguments = ("--timesteps", "4800", "--evaluation-episodes", "2", "--seed", "3", *arguments)
        self.folder = runs / f"{lunar_lander.ENV}_1"
        self.process = start_process(small_lander.main, "--runs", str(runs), *arguments, printed=runs / "printed")

    def wait(self) -> int:
        """Return the exit code, or minus the number of the signal."""
        self.process.join(timeout=300)
        return self.process.exitcode

    def stop_after(self, n_episodes: int, number: int) -> int:
        """Send a signal after a number of episodes, and return the exit code."""
        paths = [self.folder / f"{index}.monitor.csv" for index in range(8)]
        # Two lines of each file are no episodes
        while (
            self.process.is_alive()
            and sum(max(0, path.read_text().count("\n") - 2) for path in paths if path.exists()) < n_episodes
        ):
            time.sleep(0.001)
        os.kill(self.process.pid, number)
        code = self.wait()
        assert not (self.folder / "model.zip").exists(), "The run ended before the signal"
        return code


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run."""
    example = Example(tmp_path_factory.mktemp("whole"))
    assert example.wait() == 0
    return example.folder


def assert_same_runs(folder: Path, whole: Path) -> None:
    model, expected = (REINFORCE.load(path / "model") for path in (folder, whole))
    assert_same_parameters(model, expected)
    assert model.num_timesteps == expected.num_timesteps and model._n_updates == expected._n_updates >= 4
    results, expected_results = (json.loads((path / "result.json").read_text()) for path in (folder, whole))
    for name in ("seed", "steps", "returns", "lengths"):
        assert results[name] == expected_results[name]
    with np.load(folder / "evaluations.npz") as evaluations, np.load(whole / "evaluations.npz") as expected_evaluations:
        assert len(evaluations["timesteps"]) >= 3
        for name in ("timesteps", "results", "ep_lengths"):
            np.testing.assert_array_equal(evaluations[name], expected_evaluations[name])
    assert monitor_rows(folder) == monitor_rows(whole)
    assert scalars(folder / "tensorboard" / "REINFORCE_1") == scalars(whole / "tensorboard" / "REINFORCE_1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_a_stopped_run_is_resumed_exactly(number: int, code: int, whole: Path, tmp_path: Path):
    """With the same weights, evaluations, monitor files and curves. A killed run is resumed twice."""
    n_episodes = sum(map(len, monitor_rows(whole).values()))
    example = Example(tmp_path)
    folder = example.folder
    assert example.stop_after(n_episodes // 3, number) == code
    if number == signal.SIGKILL:
        assert Example(tmp_path, "--resume", str(folder)).stop_after(2 * n_episodes // 3, number) == code
    else:
        (resume,) = re.findall("To resume: (.*)\n", (tmp_path / "printed").read_text())
        words = [word for word in shlex.split(resume) if not word.startswith("OMP_NUM_THREADS=")]
        assert Path(words[0]).samefile(sys.executable) and words[1:] == ["lunar_lander.py", "--resume", str(folder)]
    assert Example(tmp_path, "--resume", str(folder)).wait() == 0
    printed = (tmp_path / "printed").read_text()
    assert f"everything goes to {folder}\n" in printed and f"Resuming from {folder / 'checkpoints'}" in printed
    assert_same_runs(folder, whole)
    # A complete run ends immediately
    assert Example(tmp_path, "--resume", str(folder)).wait() == 0
    assert_same_runs(folder, whole)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(whole: Path, tmp_path: Path):
    example = Example(tmp_path)
    assert example.stop_after(1, signal.SIGKILL) == -signal.SIGKILL
    assert not list((example.folder / "checkpoints").glob("*.zip"))
    assert Example(tmp_path, "--resume", str(example.folder)).wait() == 0
    assert_same_runs(example.folder, whole)
