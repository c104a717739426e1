"""What `make train` leaves behind, and that it learns."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import common, showcase, train
from sb3_reinforce import REINFORCE


def run(monkeypatch: pytest.MonkeyPatch, runs: Path, *arguments: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["train", "--runs", str(runs), *arguments])
    train.main()
    return runs / "LunarLanderContinuous-v3_1"


def show(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The README gets the pictures, and figures that are those of the run."""
    readme = tmp_path / "README.md"
    readme.write_text("before <!-- train -->old<!-- /train --> after")
    monkeypatch.setattr(common, "README", readme)
    monkeypatch.setattr(showcase, "IMAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["showcase", str(folder)])
    showcase.main()
    assert (tmp_path / "train.png").read_bytes() == (folder / "learning_curve.png").read_bytes()
    assert (tmp_path / "landing.gif").read_bytes().startswith(b"GIF8")
    text = readme.read_text()
    returns = np.array(json.loads((folder / "result.json").read_text())["returns"])
    assert text.startswith("before <!-- train -->\n") and text.endswith("\n<!-- /train --> after")
    assert f"returns {returns.mean():.0f} ± {returns.std():.0f} " in text


def test_leaves_everything_in_the_folder_it_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
):
    monkeypatch.delenv("DISPLAY", raising=False)
    folder = run(monkeypatch, tmp_path, "--timesteps", "7000", "--evaluation-episodes", "3")
    printed = capsys.readouterr().out
    assert f"Everything is in {folder}: return " in printed
    assert "over 3 episodes" in printed
    summary = (folder / "summary.md").read_text()
    for name in ("model.zip", "monitor.csv", "learning_curve.png", "landing.mp4", "tensorboard"):
        assert name in summary
        assert (folder / name).exists()
    assert list((folder / "tensorboard").rglob("events.*"))
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert b"ftyp" in (folder / "landing.mp4").read_bytes()[:16]
    with open(folder / "monitor.csv") as file:
        file.readline()
        lengths = [int(row["l"]) for row in csv.DictReader(file)]
    show(folder, monkeypatch, tmp_path)
    # Every transition that was learned from is in one of these episodes
    model = REINFORCE.load(folder / "model", env=train.ENV)
    assert sum(lengths) == model.num_timesteps >= 7000


def test_a_new_run_gets_a_new_folder(tmp_path: Path):
    assert [train.new_folder(tmp_path).name for _ in range(2)] == [f"{train.ENV}_1", f"{train.ENV}_2"]


@pytest.mark.slow
def test_solves_the_lander(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """One seed, as `make train` runs it: the deterministic policy at the end has a mean return of 200 or more."""
    folder = run(monkeypatch, tmp_path)
    rows = [line.split("|") for line in (folder / "summary.md").read_text().splitlines()]
    (result,) = [row[2] for row in rows if len(row) > 2 and row[1].startswith(" return of the deterministic policy")]
    assert float(result.split("±")[0]) >= 200
