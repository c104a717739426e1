"""Training on workers equals training in this process to the bit. Errors and signals end it cleanly."""

import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium import spaces

from sb3_reinforce import REINFORCE, MlpPolicy, newest_checkpoint
from sb3_reinforce.episodes.schedule import episode_seed
from sb3_reinforce.tools.ray import RayExecutor
from tests.envs import RandomEnv, RandomLengthEnv
from tests.runs.common import CHOICE, GRAY_IMAGE, PAIR, VECTOR, assert_same, assert_same_parameters

loky = pytest.importorskip("loky")
psutil = pytest.importorskip("psutil")

ROOT = Path(__file__).parent.parent.parent
SEED = 3
MAKE = partial(RandomLengthEnv, 9)


class OwnForward(MlpPolicy):
    """Samples actions with PyTorch's generator."""

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


class Delayed(RandomLengthEnv):
    """Steps take random times, which are not seeded."""

    def step(self, action: Any) -> Any:
        time.sleep(random.SystemRandom().expovariate(2000))
        return super().step(action)


#: Arguments of REINFORCE that differ from the usual ones
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "n_steps": dict(n_steps=12, n_episodes=None, max_episode_steps=7, bootstrap_timeouts=True),
    "own_forward": dict(n_episodes=3, policy=OwnForward, env=partial(Delayed, 9)),
    "gsde": dict(n_episodes=3, use_sde=True, sde_sample_freq=3),
    "discrete": dict(n_episodes=3, env=partial(RandomLengthEnv, 9, CHOICE), advantage="q"),
    "dictionary": dict(
        n_episodes=3, policy="MultiInputPolicy", env=partial(RandomEnv, spaces.Dict(a=VECTOR, b=CHOICE), PAIR, 9)
    ),
    "images": dict(
        n_episodes=9,
        policy="CnnPolicy",
        env=partial(RandomEnv, GRAY_IMAGE, CHOICE, 4),
        policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=8)),
    ),
}


def make_model(workers: Any, policy: Any = "MlpPolicy", env: Any = MAKE, **kwargs: Any) -> REINFORCE:
    return REINFORCE(policy, env, **(dict(n_steps=None, seed=SEED, workers=workers) | kwargs))


def summary(model: REINFORCE) -> dict[str, Any]:
    """Parameters, counters and episodes of a model."""
    return dict(
        parameters=[dict(model.get_parameters()), model.damping_scores.tolist()],
        counters=[model.num_timesteps, model._n_updates, model._next_episode, model._n_iterations, model._episode_num],
        episodes=[(info["r"], info["l"]) for info in model.ep_info_buffer or ()],
    )


def train(workers: Any, n_timesteps: int = 200, callback: Any = None, **kwargs: Any) -> dict[str, Any]:
    return summary(make_model(workers, **kwargs).learn(n_timesteps, callback=callback))


@cache
def reference(name: str) -> dict[str, Any]:
    """The run of a configuration in this process."""
    return train(None, **CONFIGURATIONS[name])


@contextmanager
def make_executor(kind: str) -> Iterator[Executor]:
    if kind == "threads":
        with ThreadPoolExecutor(3) as executor:
            yield executor
    elif kind == "pool":
        with loky.ProcessPoolExecutor(max_workers=2) as executor:
            yield executor
    elif kind == "spawned":
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
            yield executor
    elif kind == "dask":
        distributed = pytest.importorskip("distributed")
        options = dict(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL)
        with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
            yield client.get_executor(pure=False)
    else:
        ray = pytest.importorskip("ray")
        # Its workers import the tests like this process
        environment = dict(env_vars=dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path))))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
        with RayExecutor(2) as executor:
            yield executor
        ray.shutdown()


@pytest.fixture(scope="module")
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with make_executor(request.param) as executor:
        yield executor


def on(*kinds: str, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run a test with the fixture ``executor`` of each kind."""
    params = [*kinds, *(pytest.param(kind, marks=pytest.mark.slow) for kind in slow)]
    return pytest.mark.parametrize("executor", params, indirect=True)


def processes() -> set[int]:
    """Running descendants of this process, except resource trackers."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@contextmanager
def no_process_left() -> Iterator[None]:
    """Check that processes started in this context end within ten seconds."""
    before = processes()
    yield
    deadline = time.monotonic() + 10
    while processes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes() - before


# The same bits


@pytest.mark.parametrize("workers", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_processes_train_like_this_one(workers: int):
    with no_process_left():
        assert_same(train(workers, **CONFIGURATIONS["n_steps"]), reference("n_steps"))


class Closing(RandomLengthEnv):
    """Writes a file when it is closed."""

    folder: Path | None = None

    def close(self) -> None:
        assert self.folder is not None
        (self.folder / str(os.getpid())).touch()


def make_closing(folder: Path) -> gym.Env:
    env = Closing(9)
    env.folder = folder
    (folder / f"made by {os.getpid()}").touch()
    return env


def test_environments_of_processes_are_closed_when_learn_ends(tmp_path: Path):
    make_model(2, env=partial(make_closing, tmp_path), n_episodes=20).learn(1)
    made = {path.name.removeprefix("made by ") for path in tmp_path.glob("made by *")} - {str(os.getpid())}
    assert made == {path.name for path in tmp_path.iterdir()} - {path.name for path in tmp_path.glob("made by *")} != set()


@on("threads", slow=("pool", "spawned", "dask", "actors"))
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_any_executor_trains_like_this_process(executor: Executor, name: str):
    assert_same(train(executor, **CONFIGURATIONS[name]), reference(name))


@on("threads")
def test_a_run_resumes_on_any_workers(tmp_path: Path, executor: Executor):
    """From the end of a call, and from within a batch that a callback stopped."""
    half = make_model(executor, **CONFIGURATIONS["n_steps"])
    half.learn(100).save(tmp_path / "half")
    half.learn(60, callback=lambda *_: half.num_timesteps < 130, reset_num_timesteps=False)
    assert half.num_timesteps == 130
    half.save(tmp_path / "stopped")
    for path in ("half", "stopped"):
        for workers in (None, executor):
            resumed = REINFORCE.load(tmp_path / path, MAKE, workers=workers)
            resumed.learn(200 - resumed.num_timesteps, reset_num_timesteps=False)
            assert_same(summary(resumed), reference("n_steps"))


# Errors


class Faulty(RandomLengthEnv):
    """Fails at the last step of the episode with a seed, outside of the process ``home``."""

    def __init__(self, kind: str, seed: int, home: int | None = None):
        super().__init__(9)
        self.kind = kind
        self.bad_seed = seed
        self.home = home

    def step(self, action: Any) -> Any:
        step = super().step(action)
        if step[2] and self.seeds[-1] == self.bad_seed and os.getpid() != self.home:
            if self.kind == "raise":
                raise ZeroDivisionError("The ball is not round")
            if self.kind == "sys_exit":
                sys.exit("The ball is gone")
            os._exit(7)
        return step


@on("pool", slow=("dask", "actors"))
def test_errors_of_the_environment_are_those_of_a_run_without_workers(executor: Executor):
    """The same type, note and model, and the traceback of the worker. SystemExit becomes a RuntimeError."""
    models, errors = [], []
    for workers in (executor, None):
        models.append(make_model(workers, env=partial(Faulty, "raise", episode_seed(SEED, 10)), n_episodes=4))
        with pytest.raises(ZeroDivisionError, match="The ball is not round") as info:
            models[-1].learn(400)
        errors.append(info.value)
    note, traceback = errors[0].__notes__
    assert [note] == errors[1].__notes__ and f"of episode 10 (reset(seed={episode_seed(SEED, 10)}))" in note
    assert re.search(r'File ".*test_runs_on_workers.py", line \d+, in step', traceback)
    assert models[0]._n_updates == 2
    assert_same_parameters(*models)
    # The episodes before it are not lost
    assert len(models[0].ep_info_buffer or ()) == 10
    model = make_model(executor, env=partial(Faulty, "sys_exit", episode_seed(SEED, 10)), n_episodes=4)
    with pytest.raises(RuntimeError, match=r"^SystemExit: The ball is gone\n(.|\n)*episode 10:\nTraceback"):
        model.learn(400)
    # The workers remain usable
    assert_same(train(executor, **CONFIGURATIONS["n_steps"]), reference("n_steps"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loky", "given"])
def test_an_environment_that_ends_its_process_is_an_error_that_names_the_episodes(kind: str):
    with no_process_left(), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as given:
        model = make_model(
            1 if kind == "loky" else given, env=partial(Faulty, "exit", episode_seed(SEED, 5), os.getpid()), n_episodes=8
        )
        with pytest.raises(RuntimeError, match=r"The episodes (\d+) to (\d+) could not run") as info:
            model.learn(400)
        first, last = map(int, re.findall(r"\d+", str(info.value))[:2])
        assert first <= 5 and model._n_updates == 0


@pytest.mark.slow
def test_a_worker_ignores_ctrl_c_and_may_be_killed():
    """Ctrl-C reaches all processes of a terminal. A kill is an error, after which learning continues."""
    others, model = processes(), make_model(2, env=partial(Delayed, 9), n_episodes=40)
    number = signal.SIGINT

    def send(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        if model._n_updates and locals_["n_steps"] == 3:
            os.kill(min(processes() - others), number)
        return True

    model.learn(1500, callback=send)
    assert model._n_updates >= 5
    number = signal.SIGKILL
    with no_process_left(), pytest.raises(RuntimeError, match=r"The episodes \d+ to \d+ could not run"):
        model.learn(10_000, callback=send, reset_num_timesteps=False)
    model.learn(1, reset_num_timesteps=False)
    other = make_model(None, env=MAKE, n_episodes=40)
    while other._n_updates < model._n_updates:
        other.learn(1, reset_num_timesteps=False)
    assert_same_parameters(model, other)


# Programs

SCRIPT = """
import sys
from functools import partial
from stable_baselines3.common.callbacks import ConvertCallback
from sb3_reinforce import REINFORCE, AtomicCheckpointCallback
from tests.runs.test_runs_on_workers import Delayed

if __name__ == "__main__":
    model = REINFORCE("MlpPolicy", partial(Delayed, 30), seed=3, workers=2, n_steps=None, n_episodes=40)

    def tell(locals_, globals_):
        if model._n_updates == 2:
            print("started", flush=True)
        return True

    checkpoints = [AtomicCheckpointCallback(sys.argv[1])] if len(sys.argv) > 1 else []
    model.learn(10**9, callback=[ConvertCallback(tell), *checkpoints])
"""


@contextmanager
def program(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, list[Any]]]:
    """A program that learns on workers in its own process group, and its processes."""
    (folder / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Processes that are left would keep a pipe open
    with open(folder / "printed", "w") as file:
        process = subprocess.Popen(
            [sys.executable, str(folder / "script.py"), *arguments],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=os.environ | dict(PYTHONPATH=path),
        )
        children = []
        try:
            deadline = time.monotonic() + 120
            while "started" not in (printed := (folder / "printed").read_text()):
                assert process.poll() is None and time.monotonic() < deadline, printed
                time.sleep(0.1)
            children = psutil.Process(process.pid).children(recursive=True)
            yield process, children
        finally:
            for one in (process, *children):
                try:
                    one.kill()
                except psutil.Error:
                    continue
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, number",
    [("ctrl_c", signal.SIGINT), ("only_main", signal.SIGTERM), ("plain", signal.SIGINT), ("only_main", signal.SIGKILL)],
)
def test_a_program_that_is_stopped_leaves_no_process(tmp_path: Path, how: str, number: int):
    """A terminal sends Ctrl-C to the whole group. With a checkpoint callback, the program saves; "plain" has none."""
    with program(tmp_path, *([] if how == "plain" else [str(tmp_path / "checkpoints")])) as (process, children):
        (process.send_signal if how == "only_main" else partial(os.killpg, process.pid))(number)
        assert process.wait(60) != 0 and len(children) >= 2
        assert not psutil.wait_procs(children, timeout=20)[1]
    printed, checkpoint = (tmp_path / "printed").read_text(), newest_checkpoint(tmp_path / "checkpoints")
    assert (
        (checkpoint is not None) == ("To resume: REINFORCE.load(" in printed) == (how != "plain" and number != signal.SIGKILL)
    )
    if how == "plain":
        assert printed.rstrip().endswith("KeyboardInterrupt") and printed.count("Traceback") == 1
    if checkpoint is not None:
        assert REINFORCE.load(checkpoint)._n_updates >= 2
