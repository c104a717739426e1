"""Tasks of workers: what is sent, kept environments, the same episodes for any ranges, and errors."""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_reinforce import REINFORCE, EnvFactory, MlpPolicy
from sb3_reinforce.episodes import tasks
from sb3_reinforce.episodes.schedule import episode_seed
from sb3_reinforce.episodes.tasks import pack_config, run_episodes, start_process
from tests.envs import RandomEnv, RandomLengthEnv, ScriptedEnv
from tests.rollouts import assert_same

VECTOR = spaces.Box(-1, 1, (3,))
PAIR = spaces.Box(-1, 1, (2,))
SEED = 3
#: A policy that takes little time to make
SMALL: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[]), baseline=None)


@pytest.fixture(autouse=True)
def new_worker() -> Iterator[None]:
    """Start without a kept environment, as in a new worker."""
    vars(tasks._LATEST).clear()
    yield
    vars(tasks._LATEST).clear()


def make_model(make: Any, policy: Any = "MlpPolicy", **kwargs: Any) -> REINFORCE:
    return REINFORCE(policy, make, **(dict(seed=SEED) | kwargs))


def pack(make: Any) -> bytes:
    return pack_config(make_model(make, **SMALL))


def run(content: bytes, numbers: range, name: str = "config") -> list[Any]:
    """Run episodes without an error."""
    episodes, error = run_episodes(name, content, numbers)
    assert error is None
    return episodes


# Configurations


@pytest.mark.parametrize("what", ["environment", "policy"])
def test_what_cannot_be_pickled_is_refused(what: str):
    lock = threading.Lock()
    model = make_model((lambda: [lock] and RandomLengthEnv(5)) if what == "environment" else partial(RandomLengthEnv, 5))
    if what == "policy":
        model.policy.lock = lock  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"cannot be sent to workers: .*lock.* as an id, or as a function that makes it"):
        pack_config(model)


def test_policies_are_sent_without_their_optimizer():
    model = make_model(partial(RandomLengthEnv, 5)).learn(30)
    sent = cloudpickle.loads(pack_config(model)).policy
    assert not hasattr(sent, "optimizer") and model.policy.optimizer.param_groups
    own, others = ([value.numpy() for value in policy.state_dict().values()] for policy in (model.policy, sent))
    assert_same(own, others)


class GpuPolicy:
    """A policy that pretends to be on a GPU."""

    device = SimpleNamespace(type="cuda")

    def to(self, device: str) -> "GpuPolicy":
        self.device = SimpleNamespace(type=device)
        return self


def test_policies_are_sent_uncompiled_and_on_the_cpu():
    model: Any = make_model(partial(RandomLengthEnv, 5), **SMALL)
    model.policy = SimpleNamespace(_orig_mod=model.policy, lock=threading.Lock())
    assert type(cloudpickle.loads(pack_config(model)).policy) is MlpPolicy
    model.policy = GpuPolicy()
    assert cloudpickle.loads(pack_config(model)).policy.device.type == "cpu"
    assert model.policy.device.type == "cuda"


# Environments of workers

#: Environments made by :func:`make_counted` and others
MADE: list[Any] = []


class Closing(RandomLengthEnv):
    closed = False

    def close(self) -> None:
        self.closed = True


def make_counted() -> gym.Env:
    MADE.append(Closing(5))
    return MADE[-1]


@pytest.fixture
def made() -> Iterator[list[Any]]:
    MADE.clear()
    yield MADE
    MADE.clear()


def test_an_environment_is_kept_until_its_name_changes(made: list[Closing]):
    """The name of a configuration changes with each batch, that of an environment with set_env()."""
    model = make_model(make_counted, **SMALL)
    content, other = pack_config(model), pack(make_counted)
    made.clear()
    episodes = run(content, range(2), "one")
    assert_same(run(b"is read once", range(2), "one"), episodes)
    with th.no_grad():
        model.policy.log_std += 1
    assert not np.array_equal(run(pack_config(model), range(1), "two")[0].actions, episodes[0].actions)
    assert [env.closed for env in made] == [False]
    run(other, range(1), "three")
    assert [env.closed for env in made] == [True, False]


def test_each_thread_has_its_own_environment(made: list[Closing]):
    content = pack(make_counted)
    made.clear()
    thread = threading.Thread(target=run, args=(content, range(1)))
    thread.start()
    thread.join()
    run(content, range(1))
    assert len(made) == 2 and not any(env.closed for env in made)


def make_other_space(kind: str) -> gym.Env:
    """Make an environment with other spaces after the first call."""
    MADE.append(None)
    spaces_ = dict(observation=VECTOR, action=PAIR)
    if len(MADE) > 1:
        spaces_[kind] = spaces.Box(-1, 1, (4,))
    return RandomEnv(spaces_["observation"], spaces_["action"], 5)


@pytest.mark.parametrize("kind", ["observation", "action"])
def test_other_spaces_in_a_worker_are_an_error(made: list[Any], kind: str):
    good, bad = pack(partial(RandomLengthEnv, 5)), pack(partial(make_other_space, kind))
    expected = run(good, range(2))
    episodes, error = run_episodes("bad", bad, range(1))
    assert episodes == [] and isinstance(error, ValueError)
    assert "must always make the same environment: Box(-1.0, 1.0, (4,), float32) is not Box(" in str(error)
    # The worker remains usable
    assert_same(run(good, range(2), "good again"), expected)


# Episodes


def make_dict_env() -> gym.Env:
    return RandomEnv(spaces.Dict(v=VECTOR, d=spaces.Discrete(3)), PAIR, 7)


CONFIGS: dict[str, dict[str, Any]] = {
    "continuous": dict(make=partial(RandomLengthEnv, 9)),
    "gsde": dict(make=partial(RandomLengthEnv, 9), use_sde=True, sde_sample_freq=2),
    "dictionary": dict(make=make_dict_env, policy="MultiInputPolicy"),
    "discrete_with_time_limit": dict(make="CartPole-v1", max_episode_steps=7),
    "without_seed": dict(make=partial(ScriptedEnv, [3]), seed=None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_episodes_equal_those_of_this_process(name: str):
    model = make_model(**CONFIGS[name], n_steps=None, n_episodes=8)
    episodes = run(pack_config(model), range(8))
    steps: list[list[Any]] = []

    def keep(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        names = ("obs", "actions", "clipped_actions", "rewards", "infos", "dones")
        steps.append([locals_[name] for name in names])
        return True

    model.learn(1, callback=keep)
    ends = np.cumsum([len(episode.rewards) for episode in episodes])
    assert [bool(step[5][0]) for step in steps] == [t + 1 in ends for t in range(model.num_timesteps)]
    for episode, end in zip(episodes, ends, strict=True):
        for t, step in enumerate(steps[end - len(episode.rewards) : end]):
            row, obs = slice(t, t + 1), episode.observations
            own = {key: entry[row] for key, entry in obs.items()} if isinstance(obs, dict) else obs[row]
            columns = (episode.actions, episode.clipped_actions, episode.rewards, episode.infos)
            expected = [dict(step[0]) if isinstance(own, dict) else step[0], *step[1:5]]
            assert_same([own, *(column[row] for column in columns)], expected)


@pytest.fixture(scope="module")
def packed() -> list[bytes]:
    return [pack_config(make_model(**CONFIGS[name])) for name in ("continuous", "gsde", "dictionary")]


@settings(max_examples=25)
@given(
    kind=st.integers(0, 2),
    first=st.one_of(st.integers(0, 20), st.integers(0, 10**9)),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    rng=st.randoms(use_true_random=False),
)
def test_any_ranges_in_any_order_give_the_same_episodes(
    packed: list[bytes], kind: int, first: int, sizes: list[int], rng: Any
):
    whole = run(packed[kind], range(first, first + sum(sizes)), f"whole {kind}")
    # One range is run twice
    order, starts = [*range(len(sizes)), rng.randrange(len(sizes))], first + np.cumsum([0, *sizes])
    rng.shuffle(order)
    parts = {index: run(packed[kind], range(*starts[index : index + 2].tolist()), f"parts {kind}") for index in order}
    assert_same([episode for index in range(len(sizes)) for episode in parts[index]], whole)


class Settings(RandomLengthEnv):
    def step(self, action: Any) -> Any:
        *step, info = super().step(action)
        return *step, {"settings": tasks._torch_settings()}


def test_workers_use_the_settings_of_pytorch_of_the_main_process():
    def set_all(n_threads: int, precision: str, mkldnn: bool) -> None:
        th.set_num_threads(n_threads)
        th.set_float32_matmul_precision(precision)
        th.backends.mkldnn.enabled = mkldnn  # type: ignore[assignment]

    before, model = tasks._torch_settings(), make_model(partial(Settings, 5), **SMALL)
    for wanted in ((2, "medium", False), (1, "highest", True)):
        set_all(*wanted)
        content = pack_config(model)
        set_all(*before)
        (episode,) = run(content, range(1), str(wanted))
        assert {info["settings"] for info in episode.infos} == {wanted}
    set_all(*before)


def test_an_id_that_only_this_process_knows_is_made_by_workers(monkeypatch: pytest.MonkeyPatch):
    gym.register("OnlyHere-v0", partial(RandomLengthEnv, 5))
    contents = [pack("OnlyHere-v0"), pack(EnvFactory("OnlyHere-v0"))]
    del gym.registry["OnlyHere-v0"]
    assert all(len(run(content, range(2), str(index))) == 2 for index, content in enumerate(contents))


# Errors


class TwoArguments(Exception):
    """An exception that pickles, but does not unpickle."""

    def __init__(self, one: str, other: str):
        super().__init__(f"{one} {other}")


class Failing(RandomLengthEnv):
    """Fails in the reset or in the last step of episode 5."""

    def __init__(self, how: str):
        super().__init__(9)
        self.how = how
        self.bad_seed = episode_seed(SEED, 5)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        if self.how == "reset" and seed == self.bad_seed:
            raise OSError("The simulator is gone")
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        step = super().step(action)
        if step[2] and self.seeds[-1] == self.bad_seed:
            if self.how == "step":
                raise OSError("The simulator is gone")
            if self.how == "not unpicklable":
                raise TwoArguments("The simulator", "is gone")
            if self.how == "ends a generator":
                raise StopIteration("The simulator is gone")
            if self.how == "not picklable":
                raise OSError("The simulator is gone", threading.Lock())
            sys.exit("The simulator is gone")
        return step


@pytest.mark.parametrize("how", ["step", "reset"])
def test_errors_of_the_environment_keep_their_type_and_have_notes(how: str):
    """The notes name the environment, the episode and its seed, and have the worker's traceback."""
    content = pack(partial(Failing, how))
    episodes, error = run_episodes("a", content, range(2, 8))
    # Episodes before the error are not lost
    assert_same(episodes, run(content, range(2, 5)))
    assert type(error) is OSError and error.args == ("The simulator is gone",)
    # Notes survive the way back
    note, traceback = cloudpickle.loads(cloudpickle.dumps(error)).__notes__
    where = r"at step \d+" if how == "step" else r"in reset\(\)"
    assert re.fullmatch(rf"Environment 0 raised this {where} of episode 5 \(reset\(seed={episode_seed(SEED, 5)}\)\)", note)
    assert traceback.startswith("A worker raised this before the end of episode 5:\nTraceback")
    assert f"in {how}\n" in traceback and 'raise OSError("The simulator is gone")' in traceback
    # Other episodes are not affected
    assert len(run(content, range(6, 8))) == 2


@pytest.mark.parametrize(
    "how, name",
    [
        ("not unpicklable", "TwoArguments"),
        ("not picklable", "OSError"),
        ("ends a generator", "StopIteration"),
        ("exits", "SystemExit"),
    ],
)
def test_errors_that_cannot_be_sent_become_runtime_errors(how: str, name: str):
    episodes, error = run_episodes("a", pack(partial(Failing, how)), range(4, 6))
    assert len(episodes) == 1 and type(error) is RuntimeError
    assert str(cloudpickle.loads(cloudpickle.dumps(error))) == str(error)
    assert re.match(rf"{name}: .*The simulator(.|\n)* before the end of episode 5:\nTraceback", str(error))
    # Only exceptions have a note of the environment
    assert (f"reset(seed={episode_seed(SEED, 5)})" in str(error)) == (how != "exits")


def make_or_raise() -> gym.Env:
    """Raise after the first call."""
    MADE.append(RandomLengthEnv(5))
    if len(MADE) > 1:
        raise FileNotFoundError("There is no track.xml")
    return MADE[0]


def test_an_environment_that_cannot_be_made_is_an_error(made: list[Any]):
    episodes, error = run_episodes("a", pack(make_or_raise), range(7, 8))
    assert episodes == [] and type(error) is FileNotFoundError
    assert "before the end of episode 7" in error.__notes__[0] and "make_or_raise" in error.__notes__[0]


def test_a_process_ignores_ctrl_c_and_ends_with_the_main_process(monkeypatch: pytest.MonkeyPatch, made: list[Closing]):
    """SIGTERM ends the current episode, and the environment is closed at exit."""
    parents, ended = iter([1, 1, 0]), threading.Event()
    monkeypatch.setattr(tasks, "os", SimpleNamespace(getppid=lambda: next(parents), _exit=lambda code: ended.set()))
    monkeypatch.setattr(tasks, "time", SimpleNamespace(sleep=lambda seconds: None))
    exits: list[Any] = []
    monkeypatch.setattr(tasks, "atexit", SimpleNamespace(register=exits.append))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        start_process(1)
        for number in before:
            os.kill(os.getpid(), number)
        assert ended.wait(10)
        episodes, error = run_episodes("a", pack(make_counted), range(1))
        assert episodes == [] and type(error) is InterruptedError
        exits[0]()
        assert made[-1].closed
    finally:
        tasks._STOP.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
