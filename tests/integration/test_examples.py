"""What `make train` leaves behind, also when it is stopped; that its settings are those of the zoo; and that it learns."""

import json
import os
import shutil
import signal
import sys
import time
from inspect import signature
from pathlib import Path

import lunar_lander
import numpy as np
import pytest
from stable_baselines3.common.monitor import load_results
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import showcase
from benchmarks.learning import make_model
from sb3_reinforce import REINFORCE
from tests.integration import small_lander
from tests.integration.common import assert_same_parameters, start_process


def run(monkeypatch: pytest.MonkeyPatch, runs: Path, *arguments: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["lunar_lander.py", "--runs", str(runs), *arguments])
    lunar_lander.main()
    return runs / f"{lunar_lander.ENV}_1"


def test_the_example_leaves_everything_in_the_folder_it_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    folder = run(monkeypatch, tmp_path, "--timesteps", "7000", "--evaluation-episodes", "3")
    printed = capsys.readouterr().out
    assert f"everything goes to {folder}\n" in printed
    assert f"Everything is in {folder}: return " in printed
    summary = (folder / "summary.md").read_text()
    assert "new episodes" in summary and summary in printed
    for name in ("model.zip", "learning_curve.png", "landing.mp4", "report.html", "result.json", "tensorboard"):
        assert name in summary
        assert (folder / name).exists()
    assert f"The report, to open in a browser: {folder / 'report.html'}\n" in printed
    assert list((folder / "tensorboard").rglob("events.*"))
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert b"ftyp" in (folder / "landing.mp4").read_bytes()[:16]
    assert len(json.loads((folder / "result.json").read_text())["returns"]) == 3

    # Every transition that was learned from is in one of the episodes
    model = REINFORCE.load(folder / "model", env=lunar_lander.ENV)
    assert load_results(str(folder))["l"].sum() == model.num_timesteps >= 7000

    # The README gets the pictures, and figures that are those of the run
    readme = tmp_path / "README.md"
    readme.write_text("before <!-- train -->old<!-- /train --> after")
    monkeypatch.setattr(showcase, "README", readme)
    monkeypatch.setattr(showcase, "IMAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["showcase", str(folder)])
    showcase.main()
    assert (tmp_path / "train.png").read_bytes() == (folder / "learning_curve.png").read_bytes()
    assert (tmp_path / "landing.gif").read_bytes().startswith(b"GIF8")
    text = readme.read_text()
    returns = np.array(json.loads((folder / "result.json").read_text())["returns"])
    assert text.startswith("before <!-- train -->\n") and text.endswith("\n<!-- /train --> after")
    assert f"returns {returns.mean():.0f} ± {returns.std():.0f} " in text


def test_the_example_has_the_settings_of_the_hyperparameter_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Stop(Exception):
        pass

    def learn(self: REINFORCE, total_timesteps: int, **kwargs: object) -> None:
        raise Stop(self, total_timesteps)

    monkeypatch.setattr(REINFORCE, "learn", learn)
    with pytest.raises(Stop) as stop:
        run(monkeypatch, tmp_path)
    model, timesteps = stop.value.args
    of_file, learning = make_model("reinforce", lunar_lander.ENV, 0, None, {})
    assert timesteps == learning["total_timesteps"]
    assert type(model.env) is type(of_file.env) and model.n_envs == of_file.n_envs
    specs, specs_of_file = model.env.get_attr("spec"), of_file.env.get_attr("spec")
    assert [spec.max_episode_steps for spec in specs] == [spec.max_episode_steps for spec in specs_of_file] == [400] * 8
    others = {"policy", "env", "stats_window_size", "tensorboard_log", "verbose", "_init_setup_model"}
    for name in signature(REINFORCE).parameters.keys() - others:
        assert getattr(model, name) == getattr(of_file, name), name
    assert type(model.policy) is type(of_file.policy)


def test_a_new_run_gets_a_new_folder_that_knows_its_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for number, seed in ((1, "7"), (2, "8")):
        monkeypatch.setattr(sys, "argv", ["lunar_lander.py", "--runs", str(tmp_path), "--seed", seed])
        arguments = lunar_lander.parse_arguments()
        folder = lunar_lander.new_folder(arguments)
        assert folder == tmp_path / f"{lunar_lander.ENV}_{number}"
        monkeypatch.setattr(sys, "argv", ["lunar_lander.py", "--resume", str(folder), "--threshold", "3"])
        resumed = vars(lunar_lander.parse_arguments())
        assert resumed == vars(arguments) | dict(resume=folder, runs=Path("runs"), threshold=3.0)


class Example:
    """The example, made small, in a process of its own."""

    def __init__(self, runs: Path, *arguments: str):
        arguments = ("--timesteps", "4800", "--evaluation-episodes", "2", "--seed", "3", *arguments)
        if "--resume" in arguments:
            # With the arguments that the run began with
            arguments = arguments[6:]
        self.runs = runs
        self.folder = runs / f"{lunar_lander.ENV}_1"
        self.process = start_process(small_lander.main, "--runs", str(runs), *arguments, printed=runs / "printed")

    def wait(self) -> int:
        """Its exit code, or minus the signal that has ended it."""
        self.process.join(timeout=300)
        return self.process.exitcode

    def signal_at(self, n_episodes: int, number: int) -> int:
        """Send a signal after so many episodes; the exit code."""
        while self.process.is_alive() and sum(map(len, rows(self.folder).values())) < n_episodes:
            time.sleep(0.001)
        os.kill(self.process.pid, number)
        code = self.wait()
        assert not (self.folder / "model.zip").exists(), "It ended before it was stopped"
        return code


def rows(folder: Path) -> dict[str, list[str]]:
    """Return and length of each episode in each monitor file."""
    found = {}
    for path in sorted(folder.glob("*.monitor.csv")):
        found[path.name] = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()[2:]]
    return found


def scalars(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Steps and values of all that TensorBoard shows, but of speed, run by run."""
    found = {}
    for log in (folder / "tensorboard").iterdir():
        events = EventAccumulator(str(log))
        events.Reload()
        names = set(events.Tags()["scalars"]) - {"time/fps", "time/between_rollouts"}
        found[log.name] = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody has stopped."""
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
    assert rows(folder) == rows(whole)
    assert scalars(folder) == scalars(whole)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_the_example_goes_on_where_it_was_stopped(number: int, code: int, whole: Path, tmp_path: Path):
    """Twice if it was killed, to the same weights, evaluations, monitor files and curves as without a stop."""
    n_episodes = sum(map(len, rows(whole).values()))
    first = Example(tmp_path)
    folder = first.folder
    assert first.signal_at(n_episodes // 3, number) == code
    for n_before in (2 * n_episodes // 3, None) if number == signal.SIGKILL else (None,):
        if number != signal.SIGKILL:
            line = f"To go on: python examples/lunar_lander.py --resume {folder}\n"
            assert line in (tmp_path / "printed").read_text()
        example = Example(tmp_path, "--resume", str(folder))
        if n_before is not None:
            assert example.signal_at(n_before, number) == code
    assert example.wait() == 0
    printed = (tmp_path / "printed").read_text()
    assert f"everything goes to {folder}\n" in printed and f"Going on from {folder / 'checkpoints'}" in printed
    assert_same_runs(folder, whole)


def test_the_example_begins_anew_where_it_was_killed_before_its_first_checkpoint(whole: Path, tmp_path: Path):
    example = Example(tmp_path)
    assert example.signal_at(1, signal.SIGKILL) == -signal.SIGKILL
    assert not list((example.folder / "checkpoints").glob("*.zip"))
    assert Example(tmp_path, "--resume", str(example.folder)).wait() == 0
    assert_same_runs(example.folder, whole)


def test_the_example_goes_on_where_it_was_killed_while_it_wrote_its_evaluations(whole: Path, tmp_path: Path):
    """Those before are lost, but not the run."""
    example = Example(tmp_path)
    assert example.signal_at(sum(map(len, rows(whole).values())) // 2, signal.SIGKILL) == -signal.SIGKILL
    path = example.folder / "evaluations.npz"
    os.truncate(path, path.stat().st_size // 2)
    assert Example(tmp_path, "--resume", str(example.folder)).wait() == 0
    assert_same_parameters(*(REINFORCE.load(folder / "model") for folder in (example.folder, whole)))


def test_the_example_that_is_done_ends_at_once_when_it_is_to_go_on(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / whole.name)
    example = Example(tmp_path, "--resume", str(tmp_path / whole.name))
    assert example.wait() == 0
    assert_same_runs(example.folder, whole)


@pytest.mark.parametrize("content", [None, "", '{"seed": 3, "thresh'], ids=["missing", "empty", "half"])
def test_a_folder_that_is_no_run_is_refused_with_words(content: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        if content is not None and folder == tmp_path:
            (folder / "arguments.json").write_text(content)
        monkeypatch.setattr(sys, "argv", ["lunar_lander.py", "--resume", str(folder)])
        with pytest.raises(SystemExit, match="there is no run to go on with") as stop:
            lunar_lander.main()
        assert f"--resume {folder}: " in str(stop.value)


@pytest.mark.slow
def test_the_example_solves_the_lander(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """One seed, as `make train` runs it: the deterministic policy at the end has a mean return of 200 or more."""
    folder = run(monkeypatch, tmp_path)
    assert np.mean(json.loads((folder / "result.json").read_text())["returns"]) >= 200
