"""What `make train` leaves behind, that its settings are those of the hyperparameter file, and that it learns."""

import json
import sys
from inspect import signature
from pathlib import Path

import lunar_lander
import numpy as np
import pytest
from stable_baselines3.common.monitor import load_results

from benchmarks import showcase
from benchmarks.learning import make_model
from sb3_reinforce import REINFORCE


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
    for name in ("model.zip", "learning_curve.png", "landing.mp4", "result.json", "tensorboard"):
        assert name in summary
        assert (folder / name).exists()
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


def test_a_new_run_gets_a_new_folder(tmp_path: Path):
    names = [lunar_lander.new_folder(tmp_path).name for _ in range(2)]
    assert names == [f"{lunar_lander.ENV}_1", f"{lunar_lander.ENV}_2"]


@pytest.mark.slow
def test_the_example_solves_the_lander(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """One seed, as `make train` runs it: the deterministic policy at the end has a mean return of 200 or more."""
    folder = run(monkeypatch, tmp_path)
    assert np.mean(json.loads((folder / "result.json").read_text())["returns"]) >= 200
