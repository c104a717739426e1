"""
Compare the speed of `learn()` with other libraries and with the environment alone, and time the code between rollouts.

    make peers                                     # once, to include the peer libraries
    python -m benchmarks.throughput

All measurements are repeated in turn, in one process with one thread (peer libraries use their own process). All algorithms
sample the same actions, from a standard Gaussian or uniformly, because the last layers are zero and updates are negligible,
except on the tasks in ``DEFAULTS``, which they learn.
Print the table, write ``results/throughput.json`` (with all measurements) and ``docs/images/throughput.png``, and update
docs/benchmarks.md.
"""

import argparse
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from benchmarks import common
from benchmarks.common import IMAGES, PAGE, PEERS, RESULTS, fill, provenance, write_json
from sb3_reinforce import REINFORCE
from sb3_reinforce.baselines import LinearBaseline
from sb3_reinforce.returns import batch_normalize, discounted_returns

LANDER = "LunarLanderContinuous-v3"
IMAGE_ENV = "images of 84 x 84 x 4"
BANDIT = "bandit"
BLACKJACK = "Blackjack-v1"
#: Tasks that both algorithms learn with the defaults of their constructors
DEFAULTS = ("FrozenLake-v1", "Taxi-v4", BLACKJACK)
#: Transitions per batch
BATCHES = (2_000, 20_000, 200_000)
STRING = ", from a string"
GRADIENT = ", target_kl=None"
#: What remains if updates take no time, the limit of any update
ROLLOUTS = ", rollouts only"
OURS, ALONE, TIANSHOU = "REINFORCE", "environment alone", "Tianshou Reinforce"

#: Takes at least the given number of steps and returns the steps per second
Contestant = Callable[[int], float]


class RandomImages(gym.Env):
    """Random images, almost all different, and episodes of 100 steps, at a negligible cost compared to the network."""

    observation_space = spaces.Box(0, 255, (84, 84, 4), dtype=np.uint8)
    action_space = spaces.Discrete(6)
    images = np.random.default_rng(0).integers(256, size=(1000, 84, 84, 4), dtype=np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.n_steps, self.first = 0, int(self.np_random.integers(1000))
        return self.images[self.first], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        return self.images[(self.first + self.n_steps) % 1000], 1.0, False, self.n_steps == 100, {}


class Bandit(gym.Env):
    """Episodes of one step, to measure the cost per episode."""

    observation_space = spaces.Box(-1, 1, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, dtype=np.float32), float(action), True, False, {}


class BetweenRollouts(BaseCallback):
    """Measure the time from the last step of each rollout to the start of the next one, or the end of training."""

    def __init__(self) -> None:
        super().__init__()
        self.last_step = self.between = 0.0

    def _on_step(self) -> bool:
        self.last_step = time.perf_counter()
        return True

    def _on_rollout_start(self) -> None:
        if self.last_step:
            self.between += time.perf_counter() - self.last_step

    def _on_training_end(self) -> None:
        self._on_rollout_start()


def environment_alone(env_id: str) -> Contestant:
    """Step the environment without an algorithm: the upper limit of the speed."""
    env = gym.make(env_id)

    def run(n_steps: int) -> float:
        rng = np.random.default_rng(0)
        space = env.action_space
        if isinstance(space, spaces.Box):
            noise = rng.standard_normal((n_steps, *space.shape), dtype=np.float32)
            actions: Any = np.clip(noise, space.low, space.high)
        else:
            assert isinstance(space, spaces.Discrete)
            actions = rng.integers(space.n, size=n_steps)
        env.reset(seed=0)
        started = time.perf_counter()
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return n_steps / (time.perf_counter() - started)

    return run


def make_model(cls: type[OnPolicyAlgorithm], env: Any, n_steps: int, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    """Create a model with random actions, negligible updates and no log."""
    is_natural = issubclass(cls, REINFORCE) and "target_kl" not in kwargs
    step: dict[str, Any] = dict(target_kl=1e-4) if is_natural else dict(learning_rate=0.0)
    model: Any = cls(policy, env, n_steps=n_steps, seed=0, device="cpu", **step, **kwargs)
    with th.no_grad():
        for name, parameter in model.policy.named_parameters():
            if name.startswith(("action_net.", "log_std")):
                parameter.zero_()
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model


def learning(model: OnPolicyAlgorithm, updates: bool = True) -> Contestant:
    """Measure ``learn()``, after one iteration of warm-up."""
    model.learn(1)
    if not updates:
        model.train = lambda: None  # type: ignore[method-assign]

    def run(n_steps: int) -> float:
        before, started = model.num_timesteps, time.perf_counter()
        model.learn(n_steps, reset_num_timesteps=False)
        return (model.num_timesteps - before) / (time.perf_counter() - started)

    return run


def tianshou(n_envs: int) -> Contestant:
    """Measure Tianshou in the virtual environment of the peers."""

    def run(n_steps: int) -> float:
        return float(common.tianshou("speed", LANDER, n_envs, n_steps))

    return run


def vec_env(env_id: str, n_envs: int) -> VecEnv:
    if env_id == IMAGE_ENV:
        return make_vec_env(RandomImages, n_envs)
    # SB3 has no tuples of observations
    wrapper = gym.wrappers.FlattenObservation if env_id == BLACKJACK else None
    return make_vec_env(env_id, n_envs, env_kwargs=dict(render_mode=None), wrapper_class=wrapper)


def make_contestants() -> dict[tuple[str, int], dict[str, Contestant]]:
    """Create the contestants, by environment and number of environments (in a ``DummyVecEnv`` unless named otherwise)."""
    contestants: dict[tuple[str, int], dict[str, Contestant]] = {
        (LANDER, 1): {
            ALONE: environment_alone(LANDER),
            OURS: learning(make_model(REINFORCE, vec_env(LANDER, 1), 3000)),
            OURS + ROLLOUTS: learning(make_model(REINFORCE, vec_env(LANDER, 1), 3000), updates=False),
            OURS + STRING: learning(make_model(REINFORCE, LANDER, 3000)),
            "A2C": learning(make_model(A2C, vec_env(LANDER, 1), 3000)),
            "A2C" + STRING: learning(make_model(A2C, LANDER, 3000)),
        },
        (LANDER, 8): {
            ALONE: environment_alone(LANDER),
            OURS: learning(make_model(REINFORCE, vec_env(LANDER, 8), 2048)),
            OURS + ROLLOUTS: learning(make_model(REINFORCE, vec_env(LANDER, 8), 2048), updates=False),
            "A2C": learning(make_model(A2C, vec_env(LANDER, 8), 2048)),
        },
        (IMAGE_ENV, 8): {
            OURS: learning(make_model(REINFORCE, vec_env(IMAGE_ENV, 8), 100, "CnnPolicy")),
            OURS + ROLLOUTS: learning(make_model(REINFORCE, vec_env(IMAGE_ENV, 8), 100, "CnnPolicy"), updates=False),
            OURS + GRADIENT: learning(make_model(REINFORCE, vec_env(IMAGE_ENV, 8), 100, "CnnPolicy", target_kl=None)),
            "A2C": learning(make_model(A2C, vec_env(IMAGE_ENV, 8), 100, "CnnPolicy")),
        },
    }
    envs: dict[str, Callable[[], Any]] = {env_id: partial(vec_env, env_id, 1) for env_id in ("CartPole-v1", "Pendulum-v1")}
    for env_id, make_env in {**envs, BANDIT: Bandit}.items():
        contestants[env_id, 1] = {
            OURS: learning(make_model(REINFORCE, make_env(), 3000)),
            OURS + ROLLOUTS: learning(make_model(REINFORCE, make_env(), 3000), updates=False),
            "A2C": learning(make_model(A2C, make_env(), 3000)),
        }
    for env_id in DEFAULTS:
        n_peers = 8 if env_id == BLACKJACK else 1
        contestants[env_id, 1] = {
            OURS: learning(REINFORCE("MlpPolicy", vec_env(env_id, 1), seed=0, device="cpu")),
            OURS + ROLLOUTS: learning(REINFORCE("MlpPolicy", vec_env(env_id, 1), seed=0, device="cpu"), updates=False),
            "A2C": learning(A2C("MlpPolicy", vec_env(env_id, n_peers), seed=0, device="cpu")),
        }
    if PEERS.exists():
        for n_envs in (1, 8):
            contestants[LANDER, n_envs][TIANSHOU] = tianshou(n_envs)
    else:
        print(f"Skipping Tianshou: {PEERS} does not exist (run: make peers)")
    return contestants


def measure_update(repeats: int) -> list[float]:
    """Measure the share of an iteration that is not spent in its rollout."""
    model = make_model(REINFORCE, gym.make(LANDER), 3000)
    shares = []
    for _ in range(repeats):
        between = BetweenRollouts()
        started = time.perf_counter()
        model.learn(12_000, callback=between, reset_num_timesteps=False)
        shares.append(between.between / (time.perf_counter() - started))
    return shares


def measure_passes(repeats: int) -> list[float]:
    """Measure an update with the defaults, relative to a forward and a backward pass of the actor on the same batch."""
    model = REINFORCE("MlpPolicy", LANDER, n_steps=3000, seed=0, device="cpu")
    model.set_logger(Logger(folder=None, output_formats=[]))
    _, callback = model._setup_learn(10**9)
    ratios = []
    for _ in range(repeats):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 3000)  # type: ignore[arg-type]
        (batch,) = model.rollout_buffer.get()
        started = time.perf_counter()
        model.train()
        between = time.perf_counter()
        log_prob = model.policy.get_distribution(batch.observations).log_prob(batch.actions)
        (log_prob * batch.advantages).mean().backward()
        ratios.append((between - started) / (time.perf_counter() - between))
    return ratios


def peak_memory() -> int:
    """Read the peak resident memory of this process in bytes. ``getrusage()`` knows that of its parent, too."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def measure_batch(n_steps: int) -> tuple[float, float]:
    """Measure the processor seconds and the peak memory in bytes, per transition, of batches of CartPole-v1."""
    th.set_num_threads(1)
    model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=n_steps, seed=0, device="cpu", target_kl=1e-4)
    model.set_logger(Logger(folder=None, output_formats=[]))
    _, callback = model._setup_learn(10**9)
    before, started, n_transitions = peak_memory(), time.process_time(), 0
    while n_transitions < 40_000:
        model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)  # type: ignore[arg-type]
        n_transitions += model.rollout_buffer.size()
        model.train()
    seconds = (time.process_time() - started) / n_transitions
    return seconds, (peak_memory() - before) / model.rollout_buffer.size()


def measure_batches(repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Measure batches of three sizes in turn, in a new process each: the peak memory of a process never falls."""
    context, found = get_context("spawn"), defaultdict(list)
    for _ in range(repeats):
        for n_steps in BATCHES:
            with context.Pool(1) as pool:
                found[str(n_steps)].append(pool.apply(measure_batch, (n_steps,)))
    return found


def measure_returns(repeats: int) -> tuple[list[float], float]:
    """Measure the seconds and the relative peak memory of the returns and advantages of a million transitions."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 1_000_000))
    starts = np.zeros(len(rewards), dtype=bool)
    starts[0] = True
    starts[rng.choice(np.arange(1, len(rewards)), 4999, replace=False)] = True

    def run() -> tuple[np.ndarray, np.ndarray]:
        returns = discounted_returns(rewards, starts, 0.99)
        return returns, batch_normalize(returns - values)

    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        results = run()
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    arrays = sum(array.nbytes for array in (rewards, values, starts, *results))
    return seconds, (peak + rewards.nbytes + values.nbytes + starts.nbytes) / arrays


def measure_baseline(repeats: int) -> tuple[list[float], list[float]]:
    """Measure the seconds of fitting the baseline to 100,000 x 348 features, and of NumPy's least squares."""
    rng = np.random.default_rng(0)
    features, returns = rng.normal(size=(100_000, 348)), rng.normal(size=100_000)
    baseline = LinearBaseline(348)
    ours, numpys = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        baseline.fit(features, returns)
        ours.append(time.perf_counter() - started)
        started = time.perf_counter()
        design = np.column_stack([features, np.ones(len(features))])
        np.linalg.lstsq(design.T @ design, design.T @ returns, rcond=None)
        numpys.append(time.perf_counter() - started)
    return ours, numpys


def medians(rates: dict[str, list[float]]) -> dict[str, float]:
    return {name: float(np.median(values)) for name, values in rates.items()}


def table(result: dict[str, Any]) -> str:
    """Create a Markdown table of targets and measurements."""
    speed = {tuple(key.rsplit(" x", 1)): medians(rates) for key, rates in result["steps_per_second"].items()}

    def ratio(env: str, n_envs: int, ours: str, theirs: str) -> float:
        return speed[env, str(n_envs)][ours] / speed[env, str(n_envs)][theirs]

    fit = np.median(result["baseline_seconds"]) / np.median(result["lstsq_seconds"])
    bandit = speed[BANDIT, "1"]
    alone, images = "share of the environment alone", f"CnnPolicy, 8 environments of {IMAGE_ENV}"
    # Label, target, environment, number of environments, and the other side
    compared = [
        (f"1 lander in a `DummyVecEnv`, {alone}", "at least 0.55", LANDER, 1, ALONE),
        ("the same, times A2C", "at least 5.5", LANDER, 1, "A2C"),
        (f"8 landers in a `DummyVecEnv`, {alone}", "at least 0.75", LANDER, 8, ALONE),
        ("the same, times A2C", "at least 2", LANDER, 8, "A2C"),
        ("CartPole-v1, times A2C", "at least 8.1", "CartPole-v1", 1, "A2C"),
        ("Pendulum-v1, times A2C", "at least 6", "Pendulum-v1", 1, "A2C"),
        (f"bandit, episodes of one step: {bandit[OURS]:,.0f} steps/s, times A2C", "", BANDIT, 1, "A2C"),
        *((f"{env_id}, times A2C, both with defaults", "at least 8", env_id, 1, "A2C") for env_id in DEFAULTS[:2]),
        (f"{BLACKJACK}, times A2C with 8 environments", "at least 2", BLACKJACK, 1, "A2C"),
        (f"{images}, times A2C", "at least 1", IMAGE_ENV, 8, "A2C"),
    ]
    rows: list[tuple[str, str, float, float]] = [
        (label, target, ratio(env, n, OURS, other), ratio(env, n, OURS + ROLLOUTS, other))
        for label, target, env, n, other in compared
    ]
    rows[2:2] = [
        (f"1 lander from a string, {alone}", "at least 0.6", ratio(LANDER, 1, OURS + STRING, ALONE), np.nan),
        ("the same, times A2C from a string", "", ratio(LANDER, 1, OURS + STRING, "A2C" + STRING), np.nan),
    ]
    rows.append(("the same, without the natural gradient", "", ratio(IMAGE_ENV, 8, OURS + GRADIENT, "A2C"), np.nan))
    if TIANSHOU in speed[LANDER, "1"]:
        rows.append(("1 lander, times Tianshou's Reinforce", "", ratio(LANDER, 1, OURS, TIANSHOU), np.nan))
    others = [
        ("time between rollouts, share of the iteration", "at most 0.15", np.median(result["update_share"])),
        ("update on 3,000 transitions, in passes of PyTorch", "at most 12", np.median(result["update_passes"])),
        ("returns and advantages of 1 million transitions, seconds", "at most 0.2", np.median(result["returns_seconds"])),
        ("peak memory of these, relative to the arrays", "at most 3", result["returns_memory"]),
        ("baseline fit, 100,000 x 348, relative to `numpy.linalg.lstsq` on the normal equations", "at most 1.5", fit),
    ]
    for what, unit, position, factor in (("processor time", "µs", 0, 1e6), ("peak memory", "kB", 1, 1e-3)):
        for n_steps, measured in result["batches"].items():
            size = f"batches of {int(n_steps):,} transitions on CartPole-v1"
            value = factor * np.median(np.array(measured)[:, position])
            others.append((f"{size}: {what} per transition, {unit}", "", value))
    rows += [(*row, np.nan) for row in others]
    lines = [
        f"| {metric} | {target} | {value:.3g} | {'' if np.isnan(limit) else f'{limit:.3g}'} |"
        for metric, target, value, limit in rows
    ]
    return "\n".join(["| metric | target | measured | if updates took no time |", "| --- | --- | --- | --- |", *lines])


def plot(result: dict[str, Any]) -> None:
    """Plot the speed relative to the environment alone, for one and eight landers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True, sharex=True)
    for axes, n_envs in zip(both, (1, 8), strict=True):
        rates = result["steps_per_second"][f"{LANDER} x{n_envs}"]
        alone = np.median(rates[ALONE])
        names = sorted((name for name in rates if name != ALONE), key=lambda name: np.median(rates[name]))
        shares = [np.median(rates[name]) / alone for name in names]
        colors = ["tab:blue" if name.startswith(OURS) else "tab:gray" for name in names]
        axes.bar_label(axes.barh(names, shares, color=colors), fmt="%.2f", padding=3)
        axes.set(
            title=f"{n_envs} environment{'s' * (n_envs > 1)}", xlabel="speed relative to the environment alone", xlim=(0, 1)
        )
    figure.savefig(IMAGES / "throughput.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6000, help="minimum number of steps per measurement")
    arguments = parser.parse_args()
    th.set_num_threads(1)

    contestants = make_contestants()
    rates: dict[str, dict[str, list[float]]] = {}
    for repeat in range(arguments.repeats):
        for (env, n_envs), group in contestants.items():
            for name, run in group.items():
                rate = run(800 if env == IMAGE_ENV else arguments.steps)
                rates.setdefault(f"{env} x{n_envs}", {}).setdefault(name, []).append(rate)
        print(f"Repeat {repeat + 1} of {arguments.repeats} done", flush=True)
    returns_seconds, returns_memory = measure_returns(arguments.repeats)
    baseline_seconds, lstsq_seconds = measure_baseline(arguments.repeats)
    result = dict(
        provenance(),
        steps_per_second=rates,
        update_share=measure_update(arguments.repeats),
        update_passes=measure_passes(arguments.repeats),
        batches=measure_batches(arguments.repeats),
        returns_seconds=returns_seconds,
        returns_memory=returns_memory,
        baseline_seconds=baseline_seconds,
        lstsq_seconds=lstsq_seconds,
    )
    write_json(RESULTS / "throughput.json", result)
    plot(result)
    fill(PAGE, "throughput", table(result))
    for case, group_rates in rates.items():
        for name, rate in medians(group_rates).items():
            print(f"{case:35} {name:30} {rate:10,.0f} steps/s")
    print(table(result))


if __name__ == "__main__":
    main()
