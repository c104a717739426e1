"""
Reading of runs written by ``examples/lunar_lander.py`` or RL Zoo.

The folder may come from a stranger: links are not followed, a bounded part of each file is read, and no objects are unpickled.
"""

import io
import itertools
import json
import os
import re
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd
from gymnasium import registry
from stable_baselines3.common.monitor import Monitor

from sb3_reinforce.episodes.checks import FILE_FORMAT
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.tools.report.estimates import interval, number
from sb3_reinforce.tools.report.settings import default_settings, find_algorithm, model_settings, read_config

#: Bytes of a file, of a text, and numbers of an array
_MAX_BYTES, _MAX_TEXT, _MAX_NUMBERS = 30_000_000, 300_000, 100_000
#: Plots fail with numbers near the limits of float64
_MAX_VALUE = 1e30


@dataclass(eq=False)
class Run:
    """Content of the folder of a run. Missing parts are None or empty, and listed in ``missing``."""

    folder: Path
    name: str
    env_id: str
    #: Name of the class of the algorithm, or RL Zoo's name for it
    algorithm: str = "unknown algorithm"
    seed: str = "unknown"
    steps: int | None = None
    #: Argument of ``learn()``
    total_timesteps: int | None = None
    #: Whether a file shows that training has ended, possibly before ``total_timesteps``
    has_ended: bool = False
    updates: int | None = None
    #: Training episodes: return "r", length "l", "steps" and "seconds" at the end
    episodes: Any = None
    evaluations: dict[str, np.ndarray] | None = None
    #: Returns of the evaluation after training, or of the last evaluation during training
    final_returns: np.ndarray | None = None
    mean_length: float | None = None
    scalars: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    #: Settings other than the defaults of the algorithm
    changed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    #: Duration of training
    seconds: float | None = None
    machine: str | None = None
    command: str | None = None
    #: Mean return at which the environment is considered solved
    threshold: float | None = None
    videos: list[Path] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    #: Content of RL Zoo's ``args.yml`` and ``config.yml``
    zoo_arguments: dict[str, str] = field(default_factory=dict)
    zoo_config: dict[str, str] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool | None:
        """Whether training has ended or reached ``total_timesteps``; None if this is unknown."""
        if self.has_ended:
            return True
        return None if self.total_timesteps is None or self.steps is None else self.steps >= self.total_timesteps

    @property
    def progress(self) -> str:
        """Number of steps, and of how many if the run is unfinished."""
        steps = "unknown" if self.steps is None else number(self.steps)
        return f"{steps} of {number(self.total_timesteps)}" if self.is_finished is False and self.total_timesteps else steps


def read_run(folder: str | Path) -> Run:
    """
    Read the folder of a run.

    :param folder: folder written by ``examples/lunar_lander.py`` or RL Zoo, with any of its algorithms
    :return: content of the folder; ``missing`` lists missing and damaged parts
    :raises ValueError: if the folder is not a run
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a run: no such folder")
    name = folder.resolve().name
    run = Run(folder, name, env_id=re.sub(r"_\d+$", "", name))
    readers: dict[str, Callable[[Run], None]] = {
        "Training episodes": _read_episodes,
        "Evaluations during training": _read_evaluations,
        "Arguments": _read_arguments,
        "Hyperparameters": _read_model,
        "Settings": _derive_settings,
        "Evaluation after training": _read_result,
        "Diagnostics": _read_scalars,
        "Command": _read_command,
        "Video": _find_videos,
    }
    for what, read in readers.items():
        # Damaged files raise exceptions of many types
        try:
            read(run)
        except Exception as error:
            run.missing[what] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    run.threshold = getattr(registry.get(run.env_id), "reward_threshold", None)
    if run.episodes is None and run.final_returns is None and not (run.model or run.scalars):
        inside = find_files(folder, f"*/*{Monitor.EXT}", "*/evaluations.npz")
        hint = f" (try {inside[0].parent})" if inside else ""
        raise ValueError(f"{folder} is not a run: it has no monitor files, evaluations, model or TensorBoard log{hint}")
    _complete(run)
    return run


def _complete(run: Run) -> None:
    """Derive steps and seconds from several files."""
    episodes, evaluations = run.episodes, run.evaluations
    if run.steps is None:
        ends = [curve["steps"].max() for curve in (episodes, evaluations) if curve is not None]
        run.steps = int(max(ends)) if ends else None
    if episodes is not None:
        # Instead of the seconds in result.json, so that all algorithms are measured in the same way
        run.seconds = float(episodes["seconds"].iloc[-1])
        if evaluations is not None:
            evaluations["seconds"] = np.interp(evaluations["steps"], episodes["steps"], episodes["seconds"])


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """
    Find regular files, without following links.

    :param folder: folder of a run
    :param patterns: patterns of paths relative to the folder, with at most two folders
    :return: sorted paths
    """
    found = []
    for root, folders, names in os.walk(folder):
        inside = PurePath("/", Path(root).relative_to(folder))
        if len(inside.parts) > 2:
            folders.clear()
        found += [Path(root, name) for name in names if any((inside / name).match(f"/{pattern}") for pattern in patterns)]
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def read_file(path: Path, limit: int = _MAX_BYTES) -> bytes:
    """
    Read a file.

    :param path: path from :func:`find_files`
    :param limit: maximum number of bytes
    :return: content of the file
    :raises ValueError: if the file is larger
    """
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path.name} has more than {limit:,} bytes")
    return content


def _unpack(archive: zipfile.ZipFile, name: str) -> bytes:
    member = archive.getinfo(name)
    # The zipfile module unpacks other methods without a bound
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed by another method than deflate")
    with archive.open(member) as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{name} has more than {_MAX_BYTES:,} bytes")
    return content


def _read_json(run: Run, name: str) -> Any:
    for path in find_files(run.folder, name):
        return json.loads(read_file(path, _MAX_TEXT))
    raise ValueError(f"no {name}")


def _numbers(values: Any, n_dims: int = 1) -> np.ndarray:
    numbers = np.array(values, dtype=float)
    if numbers.ndim != n_dims or not 0 < numbers.size <= _MAX_NUMBERS or not (np.abs(numbers) < _MAX_VALUE).all():
        raise ValueError(f"expected {n_dims} dimensions, and 1 to {_MAX_NUMBERS:,} numbers below {_MAX_VALUE}")
    return numbers


def _read_episodes(run: Run) -> None:
    headers, tables = [], []
    for path in find_files(run.folder, f"*{Monitor.EXT}"):
        header, _, table = read_file(path).decode().partition("\n")
        if len(header) + table.find("\n") > 10_000:
            raise ValueError(f"{path.name} has a header of more than 10,000 characters")
        headers.append(json.loads(header[1:]))
        episodes = pd.read_csv(io.StringIO(table), usecols=["r", "l", "t"], index_col=False).astype(float).dropna()
        tables.append(episodes.assign(t=episodes["t"] + headers[-1]["t_start"]))
    if not tables:
        raise ValueError(f"no *.{Monitor.EXT}")
    episodes = pd.concat(tables).sort_values("t", ignore_index=True)
    run.env_id = str(headers[0].get("env_id") or run.env_id)
    episodes = episodes[(episodes.abs() < _MAX_VALUE).all(axis=1)]
    if episodes.empty:
        raise ValueError("no finished episode")
    # Wall-clock time since the environments were created: includes evaluations, and pauses of resumed runs
    seconds = episodes["t"] - min(header["t_start"] for header in headers)
    run.episodes = episodes.assign(steps=episodes["l"].cumsum(), seconds=seconds)


def _read_evaluations(run: Run) -> None:
    paths = find_files(run.folder, "evaluations.npz")
    if not paths:
        raise ValueError("no evaluations.npz")
    with zipfile.ZipFile(io.BytesIO(read_file(paths[0]))) as archive:
        steps, results = [np.load(io.BytesIO(_unpack(archive, name))) for name in ("timesteps.npy", "results.npy")]
    steps, results = _numbers(steps), _numbers(results, n_dims=2)
    if len(steps) != len(results):
        raise ValueError(f"{len(steps)} steps, but {len(results)} results")
    low, high = interval(results, np.mean)
    run.final_returns = results[-1]
    run.evaluations = dict(steps=steps, results=results, mean=results.mean(axis=-1), low=low, high=high)


def _read_arguments(run: Run) -> None:
    """Read the arguments of RL Zoo, or of the example."""
    for path in find_files(run.folder, "*/args.yml"):
        run.zoo_arguments = read_config(read_file(path, _MAX_TEXT).decode())
    for path in find_files(run.folder, "*/config.yml"):
        run.zoo_config = read_config(read_file(path, _MAX_TEXT).decode())
        # RL Zoo saves the model after training, also after Ctrl-C
        is_saved = bool(find_files(run.folder, f"{path.parent.name}.zip"))
        run.has_ended = is_saved and "StopTraining" in run.zoo_config.get("callback", "")
    # logs/a2c/CartPole-v1_1
    name = run.zoo_arguments.get("algo", "").strip("'") or run.folder.resolve().parent.name
    total = run.zoo_arguments.get("n_timesteps")
    if total is not None and float(total) < 0:
        total = run.zoo_config.get("n_timesteps")
    if find_files(run.folder, "arguments.json"):
        name, total = "reinforce", _read_json(run, "arguments.json").get("timesteps")
    known = find_algorithm(name)
    if known is not None or "algo" in run.zoo_arguments:
        run.algorithm = name[:40] if known is None else known.__name__
    if total is not None:
        run.total_timesteps = int(_numbers(total, 0))
    run.seed = run.zoo_arguments.get("seed", run.seed)


def _derive_settings(run: Run) -> None:
    algorithm = find_algorithm(run.algorithm.lower())
    own = model_settings(run.model, algorithm)
    policy = run.zoo_config.get("policy", "").strip("'") or own.get("policy_class")
    defaults = default_settings(algorithm, policy) if algorithm is not None and (own or run.zoo_config) else {}
    # RL Zoo's text is shorter: lin_0.001 for a schedule
    own |= {name: text for name, text in run.zoo_config.items() if name not in ("policy", "n_timesteps")}
    run.settings = defaults | own
    run.changed = {name: text for name, text in run.settings.items() if text != defaults.get(name)}
    if run.settings and run.total_timesteps is not None:
        run.settings["total_timesteps"] = str(run.total_timesteps)


def _read_model(run: Run) -> None:
    """Read the latest model, without unpickling."""
    models: list[tuple[int, dict[str, Any], str, bool]] = []
    problem: Exception = ValueError("no model file")
    for path in find_files(run.folder, "*.zip", "checkpoints/*.zip"):
        try:
            # Training continues after SB3's best_model.zip
            models.append((*_read_model_file(path), path.name != "best_model.zip"))
        except Exception as error:
            problem = error
    if not models:
        raise problem
    steps, run.model, info, is_latest = max(models, key=lambda model: (model[0], model[-1]))
    run.steps = steps if is_latest else None
    run.updates = int(_numbers(run.model.get("_n_updates", 0), 0))
    run.total_timesteps = int(_numbers(run.model["_total_timesteps"], 0))
    if "file_format" in run.model:
        run.algorithm = REINFORCE.__name__
    if run.model["seed"] is not None:
        run.seed = str(run.model["seed"])
    elif "run_seed" in run.model:
        run.seed = f"{run.model['run_seed']} (drawn)"
    run.versions = dict(re.findall(r"^- ([^:]+): (.*)$", info, re.MULTILINE))
    # Without the build of the kernel
    run.machine = run.versions["OS"].partition(" ")[0] if "OS" in run.versions else None


def _read_model_file(path: Path) -> tuple[int, dict[str, Any], str]:
    """Return the steps, the attributes that are not pickled, and the package versions."""
    with zipfile.ZipFile(io.BytesIO(read_file(path))) as archive:
        saved, info = json.loads(_unpack(archive, "data")), _unpack(archive, "system_info.txt").decode()
    if saved.get("file_format", FILE_FORMAT) != FILE_FORMAT:
        raise ValueError(f"{path.name} holds a model of another version of REINFORCE")
    return int(_numbers(saved["num_timesteps"], 0)), saved, info


def _read_result(run: Run) -> None:
    result = _read_json(run, "result.json")
    returns, length = _numbers(result["returns"]), float(_numbers(result["lengths"]).mean())
    versions = {str(name): str(version) for name, version in result["versions"].items()}
    seconds = float(_numbers(result["seconds"], 0))
    machine = result.get("machine")
    run.steps, run.versions, run.seconds, run.has_ended = int(_numbers(result["steps"], 0)), versions, seconds, True
    run.machine = f"{machine['platform']}, {machine['processors']} processors" if machine else run.machine
    run.final_returns, run.mean_length = returns, length


def _read_scalars(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = find_files(run.folder, *(f"{folders}*tfevents*" for folders in ("", "*/", "*/*/")))
    logs = []
    for folder in sorted({path.parent for path in files}):
        # TensorBoard opens all of these
        inside = set(folder.glob("*tfevents*"))
        if not inside.issubset(files) or sum(path.stat().st_size for path in inside) > _MAX_BYTES:
            raise ValueError(f"the TensorBoard log in {folder.name} contains links, or more than {_MAX_BYTES:,} bytes")
        logs.append(EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload())
    logs = [log for log in logs if log.Tags()["scalars"]]
    if not logs:
        raise ValueError("no TensorBoard log")
    log = max(logs, key=lambda log: log.FirstEventTimestamp())
    for tag in log.Tags()["scalars"]:
        points = np.array([(event.step, event.value) for event in log.Scalars(tag) if abs(event.value) < _MAX_VALUE])
        if len(points):
            run.scalars[tag] = points[:, 0], points[:, 1]


def _read_command(run: Run) -> None:
    commands = find_files(run.folder, "*/command.txt")
    if find_files(run.folder, "arguments.json"):
        given = _read_json(run, "arguments.json")
        options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
        run.command = shlex.join(["python", "examples/lunar_lander.py", *itertools.chain(*options)])
    elif commands:
        run.command = _zoo_command(read_file(commands[0], _MAX_TEXT).decode(), run)
    else:
        raise ValueError("no arguments.json or command.txt")


def _zoo_command(text: str, run: Run) -> str:
    """Complete the command of ``sb3-reinforce train`` with the random seed."""
    words = shlex.split(text)
    if words[1:3] == ["-m", "sb3_reinforce"] or Path(words[1]).name == "sb3-reinforce":
        words = ["sb3-reinforce", *words[words.index("train") :]]
    seed = ["--seed", run.seed.removesuffix(" (drawn)")]
    return shlex.join(words if not run.model or seed in map(list, itertools.pairwise(words)) else words + seed)


def _find_videos(run: Run) -> None:
    # RL Zoo's training.mp4 contains the videos of the checkpoints
    paths = [path for path in find_files(run.folder, "*.mp4", "videos/*.mp4") if not path.name.startswith("checkpoint-")]
    run.videos = [path for path in paths if path.stat().st_size <= _MAX_BYTES]
    if not paths or len(run.videos) < len(paths):
        raise ValueError("too large for the report" if paths else "no *.mp4")
