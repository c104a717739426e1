"""Reading of runs written by ``examples/lunar_lander.py`` or ``sb3-reinforce train``."""

import base64
import glob
import itertools
import json
import pickletools
import re
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gymnasium import registry
from stable_baselines3.common.monitor import LoadMonitorResultsError, get_monitor_files, load_results

from sb3_reinforce.episodes.checks import read_model_file
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.tools.report.estimates import interval

#: Arguments of REINFORCE that do not affect training, or are shown elsewhere in the report
_NO_SETTINGS = ("policy", "seed", "tensorboard_log", "verbose", "device")
_EVENTS = "events.out.tfevents.*"
_MAX_VIDEO_BYTES = 30_000_000


@dataclass
class Run:
    """Content of the folder of a run. Missing parts are None or empty, and listed in ``missing``."""

    folder: Path
    name: str
    env_id: str
    seed: str = "unknown"
    steps: int | None = None
    updates: int | None = None
    #: Time at which the first environment was created
    start: float = 0.0
    episodes: Any = None
    evaluations: dict[str, np.ndarray] | None = None
    #: Returns of the evaluation after training, or of the last evaluation during training
    final_returns: np.ndarray | None = None
    mean_length: float | None = None
    scalars: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    #: Mean return at which the environment is considered solved
    threshold: float | None = None
    videos: list[Path] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


class _ZooLoader(yaml.SafeLoader):
    """Load RL Zoo's files without creating Python objects other than dictionaries."""


_ZooLoader.add_constructor(
    "tag:yaml.org,2002:python/object/apply:collections.OrderedDict",
    lambda loader, node: dict(loader.construct_sequence(node, deep=True)[0]),
)
_ZooLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def read_run(folder: str | Path) -> Run:
    """
    Read the folder of a run.

    :param folder: folder written by ``examples/lunar_lander.py`` or ``sb3-reinforce train``
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
        "Hyperparameters": _read_model,
        "Evaluation after training": _read_result,
        "Diagnostics": _read_scalars,
        "Command": _read_command,
        "Video": _find_videos,
    }
    for what, read in readers.items():
        # Damaged files raise exceptions of many types
        try:
            read(run)
        except FileNotFoundError as error:
            run.missing[what] = f"no {Path(error.filename).name}"
        except Exception as error:
            run.missing[what] = str(error) if isinstance(error, (ValueError, LoadMonitorResultsError)) else repr(error)
    run.threshold = getattr(registry.get(run.env_id), "reward_threshold", None)
    if run.episodes is None and run.final_returns is None and not (run.model or run.scalars):
        inside = sorted(path.parent for name in ("*/*monitor.csv", "*/evaluations.npz") for path in folder.glob(name))
        hint = f" (try {inside[0]})" if inside else ""
        raise ValueError(f"{folder} is not a run: it has no monitor files, evaluations, model or TensorBoard log{hint}")
    return run


def _read_episodes(run: Run) -> None:
    folder = glob.escape(str(run.folder))
    headers = [json.loads(Path(path).read_text().split("\n")[0][1:]) for path in sorted(get_monitor_files(folder))]
    episodes = load_results(folder)[["r", "l", "t"]].astype(float).dropna()
    run.env_id = headers[0].get("env_id") or run.env_id
    run.start = min(header["t_start"] for header in headers)
    if episodes.empty:
        raise ValueError("no finished episode")
    run.episodes = episodes.assign(steps=episodes["l"].cumsum())


def _read_evaluations(run: Run) -> None:
    with open(run.folder / "evaluations.npz", "rb") as file, np.load(file) as saved:
        steps, results = saved["timesteps"], saved["results"].astype(float)
    low, high = interval(results, np.mean)
    run.final_returns = results[-1]
    run.evaluations = dict(steps=steps, results=results, mean=results.mean(axis=-1), low=low, high=high)


def _read_model(run: Run) -> None:
    """Read the latest model and RL Zoo's hyperparameters, without unpickling."""
    for path in run.folder.glob("*/config.yml"):
        zoo = yaml.load(path.read_text(encoding="utf-8"), _ZooLoader)
        run.settings = {name: repr(value) for name, value in zoo.items() if name not in ("policy", "n_timesteps")}
    models, problem = [], ValueError("no model file")
    for path in sorted(path for name in ("*.zip", "checkpoints/*.zip") for path in run.folder.glob(name)):
        try:
            models.append(read_model_file(path, {}))
        except ValueError as error:
            problem = error
    if not models:
        raise problem
    content, run.model = max(models, key=lambda model: model[1]["num_timesteps"])
    seed = run.model["seed"]
    run.seed = str(seed) if seed is not None else f"{run.model['run_seed']} (drawn)"
    run.steps, run.updates = run.model["num_timesteps"], run.model["_n_updates"]
    info = zipfile.ZipFile(content).read("system_info.txt").decode()
    run.versions = dict(re.findall(r"^- ([^:]+): (.*)$", info, re.MULTILINE))
    names = [name for name in signature(REINFORCE).parameters if name in run.model and name not in _NO_SETTINGS]
    own = {name: setting_text(run.model[name]) for name in ("policy_class", "n_envs", *names)}
    run.settings = own | {name: text for name, text in run.settings.items() if name not in own}


def setting_text(value: Any) -> str:
    """
    Format a value of a model file.

    :param value: value from the JSON of the model file
    :return: ``repr`` of the value. For pickled values, the name of the class, or the type and its readable attributes
    """
    if not (isinstance(value, dict) and ":type:" in value):
        return repr(value)
    texts = [text for _, text, _ in pickletools.genops(base64.b64decode(value[":serialized:"])) if isinstance(text, str)]
    if "__module__" in value and len(texts) == 2:
        return texts[1]
    inner = {name: item for name, item in value.items() if not name.startswith((":", "_"))}
    kind = re.findall(r"\w+", value[":type:"])[-1]
    return repr(inner) if kind == "dict" else f"{kind}({', '.join(f'{name}={item}' for name, item in inner.items())})"


def _read_result(run: Run) -> None:
    result = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    returns, length = np.array(result["returns"], dtype=float), float(np.mean(result["lengths"]))
    run.versions, run.steps, run.command = dict(result["versions"]), int(result["steps"]), str(result["command"])
    run.final_returns, run.mean_length = returns, length


def _read_scalars(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def load(folder: Path, *patterns: str) -> list[Any]:
        folders = sorted({path.parent for pattern in patterns for path in folder.glob(pattern)})
        logs = [EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload() for path in folders]
        return [log for log in logs if log.Tags()["scalars"]]

    logs = load(run.folder, _EVENTS, f"*/{_EVENTS}", f"*/*/{_EVENTS}")
    if not logs and run.model.get("tensorboard_log") and run.episodes is not None:
        # RL Zoo stores the logs of all runs in one folder: find the log that starts during the training episodes
        logs = load(Path(run.model["tensorboard_log"]), f"*/{_EVENTS}")
        logs = [log for log in logs if 0 <= log.FirstEventTimestamp() - run.start <= run.episodes["t"].max()]
        if len(logs) > 1:
            raise ValueError(f"{len(logs)} logs in {run.model['tensorboard_log']} may belong to this run")
    if not logs:
        raise ValueError("no TensorBoard log")
    log = max(logs, key=lambda log: log.FirstEventTimestamp())
    for tag in log.Tags()["scalars"]:
        points = np.array([(event.step, event.value) for event in log.Scalars(tag) if np.isfinite(event.value)])
        if len(points):
            run.scalars[tag] = points[:, 0], points[:, 1]


def _read_command(run: Run) -> None:
    arguments, commands = run.folder / "arguments.json", sorted(run.folder.glob("*/command.txt"))
    if arguments.exists():
        given = json.loads(arguments.read_text(encoding="utf-8"))
        options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
        run.command = shlex.join(["python", "examples/lunar_lander.py", *itertools.chain(*options)])
    elif commands:
        run.command = _zoo_command(commands[0].read_text(encoding="utf-8"), run)
    elif run.command is None:
        raise ValueError("no arguments.json, command.txt or result.json")


def _zoo_command(text: str, run: Run) -> str:
    """Complete RL Zoo's command with quotes and the random seed, and remove the checkpoint of a resumed run."""
    words: list[str] = []
    for word in text.split():
        # A space inside brackets is part of an argument
        if words and sum(map(words[-1].count, "([{")) > sum(map(words[-1].count, ")]}")):
            words[-1] += f" {word}"
        else:
            words.append(word)
    if words[1:3] == ["-m", "sb3_reinforce"] or Path(words[1]).name == "sb3-reinforce":
        words = ["sb3-reinforce", *words[words.index("train") :]]
    arguments = yaml.load(next(run.folder.glob("*/args.yml")).read_text(encoding="utf-8"), _ZooLoader)
    for option in {"-i", "--trained-agent"}.intersection(words):
        if Path(arguments["trained_agent"]).parent.name == run.name:
            del words[words.index(option) : words.index(option) + 2]
    seed = ["--seed", str(arguments["seed"])]
    return shlex.join(words if seed in map(list, itertools.pairwise(words)) else words + seed)


def _find_videos(run: Run) -> None:
    # RL Zoo's training.mp4 contains the videos of the checkpoints
    paths = sorted(path for name in ("*.mp4", "videos/*.mp4") for path in run.folder.glob(name))
    paths = [path for path in paths if not path.name.startswith("checkpoint-")]
    run.videos = [path for path in paths if path.stat().st_size <= _MAX_VIDEO_BYTES]
    if not paths or len(run.videos) < len(paths):
        raise ValueError("too large for the report" if paths else "no *.mp4")
