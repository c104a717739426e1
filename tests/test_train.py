"""What `make train` leaves behind, and that it learns."""

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import train
from sb3_reinforce import REINFORCE


def run(monkeypatch: pytest.MonkeyPatch, runs: Path, *arguments: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["train", "--runs", str(runs), *arguments])
    train.main()
    return runs / "LunarLanderContinuous-v3_1"


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
