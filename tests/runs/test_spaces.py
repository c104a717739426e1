"""Learning and acting in every pair of spaces that A2C supports, and in actions without bounds."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage, is_vecenv_wrapped

from sb3_reinforce import REINFORCE
from tests.envs import RandomEnv
from tests.runs.common import CHOICE, GRAY_IMAGE, VECTOR, check_learns_and_predicts, random_env

RGB_IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)

#: (policy, observation space)
OBSERVATIONS: dict[str, tuple[str, spaces.Space]] = {
    "box": ("MlpPolicy", VECTOR),
    "box of rank 3": ("MlpPolicy", spaces.Box(-1, 1, (2, 3, 4))),
    "box without bounds": ("MlpPolicy", spaces.Box(-np.inf, np.inf, (1,))),
    "box float16": ("MlpPolicy", spaces.Box(-1, 1, (3,), np.float16)),
    "box float64": ("MlpPolicy", spaces.Box(-1, 1, (3,), np.float64)),
    "box int64": ("MlpPolicy", spaces.Box(-5, 5, (3,), np.int64)),
    "box uint8": ("MlpPolicy", spaces.Box(0, 255, (4,), np.uint8)),
    "box bool": ("MlpPolicy", spaces.Box(0, 1, (3,), np.bool_)),
    "flattened image": ("MlpPolicy", spaces.Box(0, 255, (6, 5, 1), np.uint8)),
    "discrete": ("MlpPolicy", spaces.Discrete(4)),
    "multi-discrete": ("MlpPolicy", spaces.MultiDiscrete([4, 2, 3])),
    "multi-binary matrix": ("MlpPolicy", spaces.MultiBinary((2, 3))),
    "channels last": ("CnnPolicy", GRAY_IMAGE),
    "channels first": ("CnnPolicy", RGB_IMAGE),
    "vectors": ("MultiInputPolicy", spaces.Dict(a=VECTOR, b=spaces.Box(-1, 1, (2, 2), np.float64))),
    "vector and choices": (
        "MultiInputPolicy",
        spaces.Dict(vec=VECTOR, one=spaces.Discrete(4), many=spaces.MultiDiscrete([2, 3]), bits=spaces.MultiBinary(3)),
    ),
    "vector and bools": ("MultiInputPolicy", spaces.Dict(vec=VECTOR, bits=spaces.Box(0, 1, (2,), np.bool_))),
    "vector and image": ("MultiInputPolicy", spaces.Dict(vec=VECTOR, img=GRAY_IMAGE, one=spaces.Discrete(4))),
}
ACTIONS: dict[str, spaces.Space] = {
    "box": spaces.Box(-1, 1, (2,)),
    "box scalar": spaces.Box(-1, 1, ()),
    "box matrix": spaces.Box(-1, 1, (2, 3)),
    "box float64": spaces.Box(-1, 1, (2,), np.float64),
    "box asymmetric": spaces.Box(np.array([-1, 0], np.float32), np.array([0.5, 10], np.float32)),
    "box partly bounded": spaces.Box(np.array([-np.inf, 0, -1], np.float32), np.array([np.inf, np.inf, 1], np.float32)),
    "discrete": CHOICE,
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-binary": spaces.MultiBinary(4),
}
SMALL_FEATURES: dict[str, dict[str, Any]] = {
    "MlpPolicy": {},
    "CnnPolicy": dict(features_extractor_kwargs=dict(features_dim=8)),
    "MultiInputPolicy": dict(features_extractor_kwargs=dict(cnn_output_dim=8)),
}


def make_model(policy: str, env: Any, **kwargs: Any) -> REINFORCE:
    """Make a model with small features that learns from a few episodes at a time."""
    return REINFORCE(policy, env, **(dict(n_steps=8, seed=0, policy_kwargs=SMALL_FEATURES[policy]) | kwargs))


#: Baseline and advantage function: each space meets one of them
CRITICS: list[dict[str, Any]] = [
    dict(advantage="monte_carlo"),
    dict(advantage="advantage"),
    dict(advantage="td", baseline="linear"),
    dict(baseline=None),
    dict(advantage="q", normalize_observations=False),
]


def check_learns_with(model: REINFORCE) -> None:
    # The first batch of a critic of actions changes nothing
    check_learns_and_predicts(model.learn(1))
    buffer = model.rollout_buffer
    assert len(buffer.advantages) == len(buffer.rewards) and np.isfinite(buffer.advantages).all()
    for values in [buffer.values] + ([buffer.action_values] if model.advantage in ("q", "advantage") else []):
        assert np.isfinite(values).all() and values.any() == (model.baseline is not None)


@pytest.mark.parametrize(
    ("name", "critic"),
    [
        *((name, CRITICS[index % 5]) for index, name in enumerate(OBSERVATIONS)),
        *(("vector and image", critic) for critic in CRITICS if critic is not CRITICS[(len(OBSERVATIONS) - 1) % 5]),
    ],
    ids=str,
)
def test_every_observation_space_is_learned_from(name: str, critic: dict[str, Any]):
    policy, space = OBSERVATIONS[name]
    action_space = [ACTIONS["box matrix"], CHOICE][len(name) % 2]
    check_learns_with(make_model(policy, random_env(2, space, action_space), n_steps=10, **critic))


# Gymnasium warns about scalar actions
@pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")
@pytest.mark.parametrize("critic", [CRITICS[0], CRITICS[4]], ids=str)
@pytest.mark.parametrize("name", ACTIONS)
def test_every_action_space_is_learned_in(name: str, critic: dict[str, Any]):
    check_learns_with(make_model("MlpPolicy", random_env(1, VECTOR, ACTIONS[name]), n_steps=15, **critic))


class PythonNumbers(gym.ObservationWrapper):
    """Returns Python's numbers, like Gymnasium's Taxi, FrozenLake and CliffWalking."""

    def observation(self, observation: Any) -> Any:
        if isinstance(observation, dict):
            return {key: np.asarray(value).tolist() for key, value in observation.items()}
        return np.asarray(observation).tolist()


@pytest.mark.parametrize("name", ["box", "discrete", "vector and choices"])
def test_observations_may_be_numbers_of_python(name: str):
    policy, space = OBSERVATIONS[name]
    check_learns_and_predicts(make_model(policy, PythonNumbers(RandomEnv(space, CHOICE, 7))))


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_are_transposed_if_their_channels_come_last(channels_last: bool):
    env = FakeImageEnv(screen_height=36, screen_width=36, channel_first=not channels_last)
    model = make_model("CnnPolicy", env)
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage) == channels_last
    assert model.observation_space.shape == (1, 36, 36)
    # predict() takes images as the environment returns them
    action, _ = model.predict(env.reset()[0], deterministic=True)
    assert model.action_space.contains(action[()])


def test_images_that_are_normalized_need_normalize_images_false():
    env, kwargs = VecNormalize(random_env(1, RGB_IMAGE, CHOICE)), SMALL_FEATURES["CnnPolicy"]
    with pytest.raises(AssertionError, match="NatureCNN only with images"):
        make_model("CnnPolicy", env, policy_kwargs=dict(normalize_images=True, **kwargs))
    check_learns_and_predicts(make_model("CnnPolicy", env, policy_kwargs=dict(normalize_images=False, **kwargs)))


def test_stacked_frames_of_dictionaries_are_learned_from():
    env = DummyVecEnv([lambda: SimpleMultiObsEnv(num_col=2, num_row=2, channel_last=True)])
    env = VecFrameStack(env, 3, channels_order={"vec": None, "img": "last"})  # type: ignore[assignment]
    model = make_model("MultiInputPolicy", env)
    check_learns_and_predicts(model)
    assert np.isfinite(evaluate_policy(model, env, n_eval_episodes=1, deterministic=False, warn=False)[0])
