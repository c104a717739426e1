"""What the tests of whole runs share."""

import signal
import time
from collections.abc import Callable
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from sb3_reinforce import REINFORCE
from sb3_reinforce.natural_gradient import divergence_of_signal
from tests.envs import RandomEnv

VECTOR = spaces.Box(-1, 1, (3,))
PAIR = spaces.Box(-1, 1, (2,))
CHOICE = spaces.Discrete(3)
GRAY_IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
#: Of the space VECTOR
OBSERVATIONS = np.random.default_rng(0).uniform(-1, 1, (10, 3)).astype(np.float32)


def random_env(n_envs: int = 1, observation_space: spaces.Space = VECTOR, action_space: spaces.Space = PAIR) -> DummyVecEnv:
    """Monitored environments of random observations and rewards, with episodes of up to 7 steps."""
    return DummyVecEnv([lambda: Monitor(RandomEnv(observation_space, action_space, 7))] * n_envs)


def weights(module: Any) -> th.Tensor:
    """A copy of the parameters of a module, or of the policy of a model."""
    module = module.policy if isinstance(module, BaseAlgorithm) else module
    return th.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def assert_same(one: Any, other: Any) -> None:
    """Two nestings of dictionaries, lists and tensors are the same, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, th.Tensor):
        assert th.equal(one, other)
    else:
        assert one == other


def assert_same_parameters(model: BaseAlgorithm, other: BaseAlgorithm) -> None:
    """Policy, baseline, statistics and optimizer of two models are the same, bit for bit."""
    assert_same(dict(model.get_parameters()), dict(other.get_parameters()))


def state(model: REINFORCE) -> Any:
    """Copy everything that an update changes."""
    return deepcopy((dict(model.get_parameters()), model.damping_scores.tolist(), model._n_updates, model._next_episode))


def logged(model: BaseAlgorithm, name: str) -> float:
    """What was logged last under a name."""
    return float(model.logger.name_to_value[name])


def divergence_of_scores(model: REINFORCE) -> float:
    """The divergence that ``target_kl="auto"`` chose for the latest step."""
    judged, promised = model.damping_scores
    return divergence_of_signal(judged.max() / promised[judged.argmax()], model._n_iterations - 1)


def assert_stepped_as_asked(model: REINFORCE) -> None:
    """The divergence of the latest step is the ``target_kl`` of the model."""
    target_kl = divergence_of_scores(model) if model.target_kl == "auto" else model.target_kl
    assert isinstance(target_kl, float)
    # What new statistics of observations move is logged, too
    is_normalized = model.policy.observation_normalizer is not None
    assert logged(model, "train/kl_divergence_loss") == pytest.approx(target_kl, rel=0.9 if is_normalized else 1e-3)


def start_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """
    Start a function in a process that shares nothing with this one.

    :return: a ``multiprocessing.Process``; it has imported what takes seconds
    """
    context = get_context("forkserver")
    loader = "tensorboard.backend.event_processing.event_file_loader"
    context.set_forkserver_preload(["sb3_reinforce", loader, "matplotlib.figure", "gymnasium.envs.box2d.lunar_lander"])
    process = context.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return process


def stop_at_update(monkeypatch: pytest.MonkeyPatch, n_updates: int, number: int) -> None:
    """Send a signal to this process during an update."""
    compute_gradient = REINFORCE._compute_gradient

    def interrupt(self: REINFORCE) -> Any:
        if self._n_updates == n_updates:
            signal.raise_signal(number)
        return compute_gradient(self)

    monkeypatch.setattr(REINFORCE, "_compute_gradient", interrupt)


def check_learns_and_predicts(model: REINFORCE) -> None:
    """Check two updates: length of the steps, finite results, a changed actor and valid actions."""
    n_updates = model._n_updates
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    for _ in range(2):
        model.learn(1, reset_num_timesteps=False)
        if model.target_kl is not None:
            assert_stepped_as_asked(model)
    assert model._n_updates == n_updates + 2
    for name, value in model.policy.state_dict().items():
        # Bounds of actions may be infinite
        assert th.isfinite(value).all() or name.endswith((".low", ".high")), name
        if name.startswith(("action_net", "mlp_extractor.policy_net", "log_std")):
            assert not th.equal(value, before[name]), name
    env = model.get_env()
    assert env is not None
    for deterministic in (True, False):
        several: Any = env.reset()
        chosen, _ = model.predict(several, deterministic=deterministic)
        assert len(chosen) == env.num_envs
        assert all(model.action_space.contains(np.asarray(action)) for action in chosen)
        single = {key: obs[0] for key, obs in several.items()} if isinstance(several, dict) else several[0]
        action, _ = model.predict(single, deterministic=deterministic)
        assert model.action_space.contains(action[()])
        if deterministic:
            np.testing.assert_allclose(action, chosen[0], rtol=1e-4, atol=1e-5)


class CustomNetwork(nn.Module):
    """From SB3's documentation, "Custom Policy Network", with small layers."""

    def __init__(self, feature_dim: int):
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = 16, 12
        self.policy_net = nn.Sequential(nn.Linear(feature_dim, 16), nn.ReLU())
        self.value_net = nn.Sequential(nn.Linear(feature_dim, 12), nn.ReLU())

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.policy_net(features)

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return self.value_net(features)


class CustomActorCriticPolicy(ActorCriticPolicy):
    """From SB3's documentation, "Custom Policy Network"."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | dict(ortho_init=False))

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = CustomNetwork(self.features_dim)  # type: ignore[assignment]


class Batches(BaseCallback):
    """Keeps copies of the batches that are learned from."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        names = ("observations", "actions", "rewards", "returns", "values", "advantages")
        # The buffer uses its memory again
        batch = {name: deepcopy(getattr(buffer, name)) for name in names}
        batch["starts"] = np.flatnonzero(buffer.episode_starts)
        batch["logged"] = dict(self.logger.name_to_value)
        self.batches.append(batch)

    def episodes(self, observations: Callable[[Any], np.ndarray] = np.asarray) -> list[np.ndarray]:
        """
        :param observations: makes one array of the observations of a batch
        :return: the observations of each episode, batch by batch
        """
        return [
            episode for batch in self.batches for episode in np.split(observations(batch["observations"]), batch["starts"][1:])
        ]


class PlaceEnv(gym.Env):
    """
    Episodes of 1 to ``max_length`` steps. Each observation says where it is from: [environment, episode, step, length].

    :param index: of the environment among its siblings
    :param kind: "vector" for these numbers alone, "dict" for them under "place" beside noise, "image" for them as pixels
    :param max_length: an episode has any number of steps up to this, drawn from the environment's generator
    """

    action_space = CHOICE

    def __init__(self, index: int = 0, kind: str = "vector", max_length: int = 9):
        vector = spaces.Box(0, np.inf, (4,))
        self.observation_space: spaces.Space = {
            "vector": vector,
            "dict": spaces.Dict(place=vector, noise=spaces.Box(-np.inf, np.inf, (2,))),
            "image": spaces.Box(0, 255, (3, 4, 1), np.uint8),
        }[kind]
        self.index = index
        self.kind = kind
        self.max_length = max_length
        self.episode = -1

    def _observe(self) -> Any:
        place = np.array([self.index, self.episode, self.n_steps, self.length], np.float32)
        if self.kind == "dict":
            return {"place": place, "noise": self.np_random.normal(5, 3, 2).astype(np.float32)}
        return np.resize(place, (3, 4, 1)).astype(np.uint8) if self.kind == "image" else place

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.episode += 1
        self.n_steps = 0
        self.length = int(self.np_random.integers(1, self.max_length, endpoint=True))
        return self._observe(), {"seed": seed}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        self.n_steps += 1
        reward = float(100 * self.index + self.n_steps + action)
        return self._observe(), reward, self.n_steps == self.length, False, {}


def place(observations: Any) -> np.ndarray:
    """
    :param observations: of a :class:`PlaceEnv`, as they are in a batch; stacked frames are fine
    :return: (n_transitions, 4) environment, episode, step and length
    """
    if isinstance(observations, dict):
        observations = observations["place"]
    if observations.dtype == np.uint8:
        # Channels first; the latest frame is the last
        return observations[:, -1].reshape(len(observations), -1)[:, :4].astype(float)
    return observations[:, -4:]


def assert_whole(episodes: list[np.ndarray]) -> None:
    """Episodes of a :class:`PlaceEnv`, as :func:`place` gives them, are whole, and none is there twice."""
    for episode in episodes:
        index, number, _, length = episode[0]
        expected = [[index, number, step, length] for step in range(int(length))]
        np.testing.assert_array_equal(episode, expected)
    assert len({tuple(episode[0, :2]) for episode in episodes}) == len(episodes)


def monitor_rows(folder: Path) -> dict[str, list[str]]:
    """Return and length of each episode in each ``Monitor`` file, whose times increase."""
    found = {}
    for path in sorted(folder.glob("*.monitor.csv")):
        header, names, *lines = path.read_text().splitlines()
        assert header.startswith("#{") and names == "r,l,t"
        found[path.name], times = [line.rsplit(",", 1)[0] for line in lines], [float(line.split(",")[2]) for line in lines]
        assert times == sorted(times)
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of a TensorBoard log as TensorBoard shows them, without times."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith("time/")]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def wait_for_the_next_second() -> None:
    """TensorBoard sorts event files by name, which contains the second, and then a counter as text."""
    time.sleep(1.01 - time.time() % 1)
