"""REINFORCE learns and acts in every pair of spaces that A2C does (and in actions without bounds), and refuses the others."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage, is_vecenv_wrapped

from sb3_reinforce import REINFORCE
from tests.envs import RandomEnv
from tests.integration.common import CHOICE, GRAY_IMAGE, VECTOR, assert_stepped_as_asked, random_env, weights

RGB_IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)

#: (policy, observation space)
OBSERVATIONS = {
    "box": ("MlpPolicy", VECTOR),
    "box_of_one": ("MlpPolicy", spaces.Box(-1, 1, (1,))),
    "box_matrix": ("MlpPolicy", spaces.Box(-1, 1, (2, 3))),
    "box_of_rank_3": ("MlpPolicy", spaces.Box(-1, 1, (2, 3, 4))),
    "box_unbounded": ("MlpPolicy", spaces.Box(-np.inf, np.inf, (2,))),
    "box_float16": ("MlpPolicy", spaces.Box(-1, 1, (3,), np.float16)),
    "box_float64": ("MlpPolicy", spaces.Box(-1, 1, (3,), np.float64)),
    "box_int64": ("MlpPolicy", spaces.Box(-5, 5, (3,), np.int64)),
    "box_uint8": ("MlpPolicy", spaces.Box(0, 255, (4,), np.uint8)),
    "box_bool": ("MlpPolicy", spaces.Box(0, 1, (3,), np.bool_)),
    "flattened_image_channels_last": ("MlpPolicy", spaces.Box(0, 255, (6, 5, 1), np.uint8)),
    "flattened_image_channels_first": ("MlpPolicy", spaces.Box(0, 255, (3, 6, 5), np.uint8)),
    "discrete": ("MlpPolicy", spaces.Discrete(4)),
    "multi_discrete": ("MlpPolicy", spaces.MultiDiscrete([4, 2, 3])),
    "multi_binary": ("MlpPolicy", spaces.MultiBinary(5)),
    "multi_binary_matrix": ("MlpPolicy", spaces.MultiBinary((2, 3))),
    "image_channels_last": ("CnnPolicy", GRAY_IMAGE),
    "image_channels_first": ("CnnPolicy", RGB_IMAGE),
    "dict_of_vectors": ("MultiInputPolicy", spaces.Dict(a=VECTOR, b=spaces.Box(-1, 1, (2, 2), np.float64))),
    "dict_with_choices": (
        "MultiInputPolicy",
        spaces.Dict(vec=VECTOR, one=spaces.Discrete(4), many=spaces.MultiDiscrete([2, 3]), bits=spaces.MultiBinary(3)),
    ),
    "dict_with_bits": ("MultiInputPolicy", spaces.Dict(vec=VECTOR, bits=spaces.Box(0, 1, (2,), np.bool_))),
    "dict_with_gray_image": ("MultiInputPolicy", spaces.Dict(vec=VECTOR, img=GRAY_IMAGE, one=spaces.Discrete(4))),
    "dict_with_rgb_image": ("MultiInputPolicy", spaces.Dict(vec=VECTOR, img=RGB_IMAGE, one=spaces.Discrete(4))),
}
ACTIONS = {
    "box": spaces.Box(-1, 1, (2,)),
    "box_of_one": spaces.Box(-2, 2, (1,)),
    "box_scalar": spaces.Box(-1, 1, ()),
    "box_matrix": spaces.Box(-1, 1, (2, 3)),
    "box_float64": spaces.Box(-1, 1, (2,), np.float64),
    "box_asymmetric": spaces.Box(np.array([-1, 0], np.float32), np.array([0.5, 10], np.float32)),
    "box_one_sided": spaces.Box(0, np.inf, (2,)),
    "box_partly_bounded": spaces.Box(np.array([-np.inf, -1], np.float32), np.array([np.inf, 1], np.float32)),
    "box_unbounded": spaces.Box(-np.inf, np.inf, (2,)),
    "discrete": CHOICE,
    "multi_discrete": spaces.MultiDiscrete([3, 2]),
    "multi_binary": spaces.MultiBinary(4),
}
SMALL_FEATURES: dict[str, dict[str, Any]] = {
    "MlpPolicy": {},
    "CnnPolicy": dict(features_extractor_kwargs=dict(features_dim=8)),
    "MultiInputPolicy": dict(features_extractor_kwargs=dict(cnn_output_dim=8)),
}


def observations(*names):
    return [pytest.param(*OBSERVATIONS[name], id=name) for name in names or OBSERVATIONS]


def actions(*names):
    return [pytest.param(ACTIONS[name], id=name) for name in names or ACTIONS]


def make_model(policy, env, **kwargs):
    """A model with small features, and with batches of a few episodes."""
    kwargs = dict(n_steps=8, seed=0, policy_kwargs=SMALL_FEATURES[policy]) | kwargs
    return REINFORCE(policy, env, **kwargs)


def check_learns_and_predicts(model):
    """Three steps of the length asked for change the actor, all stays finite, and actions are what environments take."""
    n_updates = model._n_updates
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    for _ in range(3):
        model.learn(1, reset_num_timesteps=False)
        assert_stepped_as_asked(model)
    assert model._n_updates == n_updates + 3
    for name, value in model.policy.state_dict().items():
        # Bounds of actions may be infinite
        assert th.isfinite(value).all() or name.endswith(("features.low", "features.high")), name
        if name.startswith(("action_net", "mlp_extractor.policy_net", "log_std")):
            assert not th.equal(value, before[name]), name
    for deterministic in (True, False):
        check_predicts(model, deterministic)


def check_predicts(model, deterministic):
    env = model.get_env()
    several = env.reset()
    chosen, _ = model.predict(several, deterministic=deterministic)
    assert len(chosen) == env.num_envs
    assert all(model.action_space.contains(np.asarray(action)) for action in chosen)
    single = {key: obs[0] for key, obs in several.items()} if isinstance(several, dict) else several[0]
    action, _ = model.predict(single, deterministic=deterministic)
    assert model.action_space.contains(action[()])
    if deterministic:
        np.testing.assert_allclose(action, chosen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("action_space", actions("box_matrix", "discrete"))
@pytest.mark.parametrize("policy, observation_space", observations())
def test_every_observation_space_can_be_learned_from_and_acted_in(policy, observation_space, action_space, n_envs):
    """Some episodes end by a time limit: what is expected of their last observation is part of it."""
    check_learns_and_predicts(make_model(policy, random_env(n_envs, observation_space, action_space)))


# Of scalar actions, when a space is asked about them
@pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("action_space", actions())
@pytest.mark.parametrize("policy, observation_space", observations("box", "dict_of_vectors"))
def test_every_action_space_can_be_learned_in(policy, observation_space, action_space, n_envs):
    check_learns_and_predicts(make_model(policy, random_env(n_envs, observation_space, action_space)))


@pytest.mark.parametrize("normalize_observations", [False, True])
@pytest.mark.parametrize("baseline", ["linear", "quadratic", "random_features", None])
@pytest.mark.parametrize(
    "policy, observation_space",
    observations(
        "box", "box_bool", "box_of_rank_3", "multi_discrete", "image_channels_last", "dict_with_gray_image", "dict_with_bits"
    ),
)
def test_every_baseline_works_with_and_without_normalization(policy, observation_space, baseline, normalize_observations):
    env = random_env(2, observation_space, CHOICE)
    model = make_model(policy, env, baseline=baseline, normalize_observations=normalize_observations, n_steps=20)
    check_learns_and_predicts(model)
    with th.no_grad():
        values = model.policy.predict_values(model.policy.obs_to_tensor(env.reset())[0])
    assert values.shape == (2, 1)
    assert th.isfinite(values).all()
    assert th.any(values != 0) == (baseline is not None)


def check_learns_with(model, advantage):
    """The advantages that are learned from are finite, and there are critics of what they need."""
    check_learns_and_predicts(model)
    buffer = model.rollout_buffer
    assert len(buffer.advantages) == len(buffer.rewards) and np.isfinite(buffer.advantages).all()
    critics = [buffer.values] if advantage == "td" else [buffer.values, buffer.action_values]
    assert all(np.isfinite(values).all() and values.any() for values in critics)


# The first batch of a critic of actions moves nothing
@pytest.mark.parametrize("advantage", ["q", "advantage", "td"])
@pytest.mark.parametrize("action_space", actions("box", "discrete", "multi_discrete", "multi_binary"))
@pytest.mark.parametrize("policy, observation_space", observations("box", "image_channels_last", "dict_with_gray_image"))
def test_every_advantage_function_works_in_all_kinds_of_spaces(policy, observation_space, action_space, advantage):
    model = make_model(policy, random_env(2, observation_space, action_space), advantage=advantage, n_steps=20)
    check_learns_with(model.learn(1), advantage)


@pytest.mark.filterwarnings("ignore:.*Casting input x to numpy array")
@pytest.mark.parametrize("action_space", actions())
def test_actions_of_every_space_can_be_valued(action_space):
    model = make_model("MlpPolicy", random_env(1, VECTOR, action_space), advantage="q", n_steps=20)
    check_learns_with(model.learn(1), "q")


@pytest.mark.parametrize("policy, observation_space", observations(*OBSERVATIONS))
def test_actions_can_be_valued_in_observations_of_every_space(policy, observation_space):
    model = make_model(policy, random_env(1, observation_space, CHOICE), advantage="advantage", n_steps=20)
    check_learns_with(model.learn(1), "advantage")


class WideEnv(gym.Env):
    """
    3,000 observation values, of which one is the action that is rewarded, and another the rewards to come.

    Some values never change, some are copies of others, and their scales are far apart.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3000,))
    action_space = spaces.Discrete(2)
    n_steps = 10

    def _observe(self):
        observation = self.np_random.normal(size=3000).astype(np.float32)
        observation[:1000] *= np.logspace(-3, 3, 1000)
        observation[1000:1100] = 7.0
        observation[1100:1200] = observation[:100]
        self.target = self.np_random.integers(2)
        observation[-1] = self.target
        observation[-2] = self.remaining
        return observation

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.remaining = self.n_steps
        return self._observe(), {}

    def step(self, action):
        reward = float(action == self.target)
        self.remaining -= 1
        return self._observe(), reward, self.remaining == 0, False, {}


@pytest.mark.parametrize("normalize_observations", [False, True])
@pytest.mark.parametrize("baseline", ["linear", "quadratic", "random_features", None])
def test_every_baseline_works_on_3000_observation_values(baseline, normalize_observations):
    kwargs = dict(baseline=baseline, normalize_observations=normalize_observations, policy_kwargs=dict(net_arch=[16]))
    model = REINFORCE("MlpPolicy", WideEnv(), n_steps=200, seed=0, **kwargs)
    before = weights(model)
    model.learn(1000)
    assert model._n_updates == 5
    assert not th.equal(before, weights(model))
    for name, value in model.policy.state_dict().items():
        assert th.isfinite(value).all(), name
    buffer = model.rollout_buffer
    with th.no_grad():
        values = model.policy.predict_values(th.as_tensor(buffer.observations)).numpy().ravel()
    assert np.isfinite(values).all()
    if baseline is None:
        assert not values.any()
    else:
        # Fitted to this batch: at least as good as its mean
        assert np.mean((buffer.returns - values) ** 2) <= np.var(buffer.returns)


class PythonNumbers(gym.ObservationWrapper):
    """Observations of Python's own numbers, such as Gymnasium's Taxi, FrozenLake and CliffWalking return."""

    def observation(self, observation):
        if isinstance(observation, dict):
            return {key: np.asarray(value).tolist() for key, value in observation.items()}
        return np.asarray(observation).tolist()


@pytest.mark.parametrize("bootstrap_timeouts", [False, True])
@pytest.mark.parametrize("policy, observation_space", observations("box", "discrete", "multi_discrete", "dict_with_choices"))
def test_observations_may_be_numbers_of_python(policy, observation_space, bootstrap_timeouts):
    env = PythonNumbers(RandomEnv(observation_space, CHOICE, 7))
    check_learns_and_predicts(make_model(policy, env, bootstrap_timeouts=bootstrap_timeouts))


def test_frozen_lake_can_be_learned():
    # On a lake this small, random walks find the goal, without which there is nothing to learn from
    env = gym.make("FrozenLake-v1", desc=["SF", "FG"], is_slippery=False)
    check_learns_and_predicts(make_model("MlpPolicy", env, n_steps=100))


def test_a_dictionary_of_one_vector_learns_as_the_vector_itself():
    class InDictionary(gym.ObservationWrapper):
        observation_space = spaces.Dict(vec=spaces.Box(-np.inf, np.inf, (4,)))

        def observation(self, observation):
            return {"vec": observation}

    vector = make_model("MlpPolicy", gym.make("CartPole-v1"), n_steps=64).learn(200)
    in_dict = make_model("MultiInputPolicy", InDictionary(gym.make("CartPole-v1")), n_steps=64).learn(200)
    assert vector._n_updates == in_dict._n_updates > 1
    obs = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    logits = [
        model.policy.get_distribution(model.policy.obs_to_tensor(inputs)[0]).distribution.logits.detach()
        for model, inputs in ((vector, obs), (in_dict, {"vec": obs}))
    ]
    th.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_predict_leaves_actions_without_bounds_as_they_are():
    model = make_model("MlpPolicy", random_env(action_space=ACTIONS["box_unbounded"]))
    with th.no_grad():
        model.policy.action_net.bias.copy_(th.tensor([1e3, -1e3]))
    action, _ = model.predict(np.zeros(3, np.float32), deterministic=True)
    np.testing.assert_allclose(action, [1e3, -1e3], rtol=1e-3)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_are_transposed_if_their_channels_come_last(channels_last):
    env = FakeImageEnv(screen_height=36, screen_width=36, channel_first=not channels_last)
    model = make_model("CnnPolicy", env)
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage) == channels_last
    assert model.observation_space.shape == (1, 36, 36)
    # As the environment itself returns it
    action, _ = model.predict(env.reset()[0], deterministic=True)
    assert model.action_space.contains(action[()])


@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_the_actor_trains_its_cnn_and_the_baseline_none(share_features_extractor):
    kwargs = dict(share_features_extractor=share_features_extractor, **SMALL_FEATURES["CnnPolicy"])
    model = make_model("CnnPolicy", random_env(1, GRAY_IMAGE, CHOICE), policy_kwargs=kwargs)
    extractors = (model.policy.pi_features_extractor, model.policy.vf_features_extractor)
    before = [weights(extractor) for extractor in extractors]
    model.learn(1)
    is_trained = [not th.equal(old, weights(extractor)) for old, extractor in zip(before, extractors, strict=True)]
    assert is_trained == [True, share_features_extractor]


@pytest.mark.parametrize("normalize_images", [True, False])
def test_images_that_are_normalized_already_need_normalize_images_false(normalize_images):
    env = VecNormalize(random_env(1, RGB_IMAGE, CHOICE))
    kwargs = dict(normalize_images=normalize_images, features_extractor_kwargs=dict(features_dim=8))
    if normalize_images:
        with pytest.raises(AssertionError, match="NatureCNN only with images"):
            make_model("CnnPolicy", env, policy_kwargs=kwargs)
    else:
        check_learns_and_predicts(make_model("CnnPolicy", env, policy_kwargs=kwargs))


@pytest.mark.parametrize("continuous", [False, True])
def test_goal_environments_can_be_learned_from(continuous):
    env = DummyVecEnv([lambda: BitFlippingEnv(n_bits=4, continuous=continuous)] * 2)
    check_learns_and_predicts(make_model("MultiInputPolicy", env))


@pytest.mark.parametrize("channels_last", [True, False])
def test_stacked_frames_of_dictionaries_can_be_learned_from(channels_last):
    env = DummyVecEnv([lambda: SimpleMultiObsEnv(num_col=2, num_row=2, channel_last=channels_last)])
    env = VecFrameStack(env, 3, channels_order={"vec": None, "img": "last" if channels_last else "first"})
    model = make_model("MultiInputPolicy", env)
    check_learns_and_predicts(model)
    mean_return, _ = evaluate_policy(model, env, n_eval_episodes=1, deterministic=False, warn=False)
    assert np.isfinite(mean_return)


# Refused by an error at construction that names the space or the argument


def construct(policy="MlpPolicy", observation_space=VECTOR, action_space=CHOICE, **kwargs):
    REINFORCE(policy, RandomEnv(observation_space, action_space, 7), **kwargs)


@pytest.mark.parametrize("space", [spaces.Tuple([CHOICE, CHOICE]), spaces.Dict(a=CHOICE), spaces.Text(3)])
def test_other_kinds_of_actions_are_refused(space):
    with pytest.raises(ValueError, match="supports the action spaces Box, Discrete, MultiDiscrete, MultiBinary"):
        construct(action_space=space)


@pytest.mark.parametrize(
    "space",
    [
        pytest.param(spaces.MultiBinary((2, 3)), id="multi_binary_matrix"),
        pytest.param(spaces.MultiDiscrete([[2, 3], [2, 3]]), id="multi_discrete_matrix"),
        pytest.param(spaces.Discrete(3, start=1), id="discrete_from_1"),
        pytest.param(spaces.MultiDiscrete([2, 3], start=[0, 1]), id="multi_discrete_from_1"),
    ],
)
def test_actions_that_no_distribution_produces_are_refused(space):
    with pytest.raises(ValueError, match="action space"):
        construct(action_space=space)


@pytest.mark.parametrize(
    "space",
    [
        pytest.param(spaces.MultiDiscrete([[2, 3], [2, 3]]), id="multi_discrete_matrix"),
        pytest.param(spaces.Discrete(3, start=1), id="discrete_from_1"),
        pytest.param(spaces.Box(-1, 1, ()), id="scalar_box"),
    ],
)
def test_observations_that_no_features_extractor_takes_are_refused(space):
    with pytest.raises(ValueError, match="observation space"):
        construct(observation_space=space)


def test_tuples_of_observations_are_refused():
    # By SB3's DummyVecEnv
    with pytest.raises(NotImplementedError, match="observation space"):
        construct(observation_space=spaces.Tuple([VECTOR, CHOICE]))


def test_nested_dictionaries_are_refused():
    with pytest.raises(NotImplementedError, match="Nested observation spaces"):
        construct("MultiInputPolicy", spaces.Dict(outer=spaces.Dict(inner=VECTOR)))


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_dictionaries_without_the_multi_input_policy_are_refused(policy):
    with pytest.raises(ValueError, match="You must use `MultiInputPolicy`"):
        construct(policy, spaces.Dict(vec=VECTOR))


def test_the_multi_input_policy_without_a_dictionary_is_refused():
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        construct("MultiInputPolicy", VECTOR)


def test_the_cnn_policy_without_images_is_refused():
    with pytest.raises((ValueError, AssertionError), match="CnnPolicy"):
        construct("CnnPolicy", VECTOR)


def test_bounds_that_are_nan_are_refused():
    space = spaces.Box(-1, 1, (2,))
    space.low[0] = np.nan
    with pytest.raises(ValueError, match="NaN bounds"):
        construct(action_space=space)


def test_squashing_to_infinite_bounds_is_refused():
    with pytest.raises(ValueError, match="squash_output=True needs finite action bounds"):
        construct(action_space=ACTIONS["box_one_sided"], use_sde=True, policy_kwargs=dict(squash_output=True))


def test_state_dependent_exploration_of_discrete_actions_is_refused():
    with pytest.raises(ValueError, match="use_sde=True"):
        construct(use_sde=True)
