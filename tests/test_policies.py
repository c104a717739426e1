"""Policies: observation normalization, initialization, and the baseline in the place of the critic."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import A2C
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_reinforce import REINFORCE, CnnPolicy, MlpPolicy, MultiInputPolicy, policies
from sb3_reinforce.baselines import (
    MAX_FEATURES,
    ActionValues,
    LinearBaseline,
    NoBaseline,
    QuadraticFeatures,
    RandomFeatures,
)
from sb3_reinforce.episodes.acting import baseline_features, evaluate
from sb3_reinforce.episodes.normalization import ObservationNormalizer, normalizer_of
from sb3_reinforce.policies import action_values_of, chunk_size
from tests.envs import RandomEnv

VECTOR = spaces.Box(-np.inf, np.inf, (3,))
IMAGE = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)
CONTINUOUS = spaces.Box(-1, 1, (2,))
BASELINES: list[Any] = ["linear", "quadratic", "random_features", None]


def schedule(_: float) -> float:
    return 1e-3


# Normalization ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 2_000_000]))
def test_statistics_are_mean_and_population_variance_of_all_observations_seen(sizes: list[int], seed: int, chunk: int):
    rng = np.random.default_rng(seed)
    normalizer = ObservationNormalizer(VECTOR)
    batches = [rng.normal(size=(size, 3)) * [1, 100, 1e-3] + [0, 1e3, 5] for size in sizes]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(policies, "_CHUNK", chunk)
        for batch in batches:
            normalizer.update(batch)
    together = np.concatenate(batches)
    mean = sum(together) / len(together)
    var = sum((together - mean) ** 2) / len(together)
    np.testing.assert_allclose(normalizer.mean_0, mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(normalizer.var_0, var, rtol=1e-6, atol=1e-12)
    assert normalizer.count_0 == len(together)
    probe = rng.normal(size=(4, 3)) * [1, 100, 1e-3] + [0, 1e3, 5]
    expected = np.clip((probe - mean) / np.sqrt(var + 1e-8), -10, 10)
    np.testing.assert_allclose(normalizer(th.as_tensor(probe)).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "offset", "scale", "tolerance"),
    [
        (np.float64, 1.7e9, 5.0, 1e-6),
        (np.float64, -1e12, 0.1, 5e-3),
        (np.float32, 100.0, 3.0, 1e-5),
        (np.float16, 10.0, 3.0, 1e-6),
        (np.int64, 10**12, 40.0, 1e-5),
        (np.int16, -300, 40.0, 1e-6),
        (np.uint8, 100, 20.0, 1e-6),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_large_offset_is_subtracted_before_anything_is_rounded(dtype: type, offset: float, scale: float, tolerance: float):
    """Of 1.7e9 + x, a float32 keeps nothing of x."""
    seen = (offset + scale * np.random.default_rng(0).normal(size=(500, 3))).astype(dtype)
    normalizer = ObservationNormalizer(spaces.Box(-np.inf, np.inf, (3,)))
    for part in np.split(seen, [100, 101, 350]):
        normalizer.update(part)
    # Exact: differences of observations are small numbers
    exact = (seen.astype(np.float64) - seen[0].astype(np.float64)) if dtype != np.uint8 else seen.astype(np.float64)
    expected = (exact - exact.mean(axis=0)) / np.sqrt(exact.var(axis=0) + 1e-8)
    normalized = normalizer(th.as_tensor(seen))
    assert normalized.dtype == th.float32
    np.testing.assert_allclose(normalized.numpy(), expected, rtol=tolerance, atol=tolerance)


def test_normalizes_and_clips_as_vec_normalize_does():
    env = VecNormalize(DummyVecEnv([lambda: RandomEnv(VECTOR, CONTINUOUS, 5)]))
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(50, 3)) * [1, 10, 0.1] + 5
    normalizer = ObservationNormalizer(VECTOR)
    normalizer.update(batch)
    env.obs_rms.mean, env.obs_rms.var = batch.mean(axis=0), batch.var(axis=0)
    probe = np.concatenate([batch, 1e6 * batch])
    np.testing.assert_allclose(normalizer(th.as_tensor(probe)).numpy(), env.normalize_obs(probe), rtol=1e-6)


def test_an_observation_that_never_changes_becomes_zero():
    normalizer = ObservationNormalizer(VECTOR)
    for _ in range(3):
        normalizer.update(np.full((10, 3), 0.1))
    np.testing.assert_allclose(normalizer(th.full((2, 3), 0.1, dtype=th.float64)), 0, atol=1e-6)


def test_only_vectors_of_a_dictionary_are_normalized():
    space = spaces.Dict({"a.b": VECTOR, "image": IMAGE, "discrete": spaces.Discrete(4), "other": spaces.Box(-1, 1, (2, 2))})
    normalizer = ObservationNormalizer(space)
    batch = {key: np.stack([space[key].sample() for _ in range(20)]) for key in space}
    normalizer.update(batch)
    tensors = {key: th.as_tensor(value) for key, value in batch.items()}
    normalized = normalizer(tensors)
    for key in ("a.b", "other"):
        np.testing.assert_allclose(normalized[key].mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(normalized[key].std(0, unbiased=False), 1, atol=1e-5)
    for key in ("image", "discrete"):
        assert normalized[key] is tensors[key]


@pytest.mark.parametrize("space", [IMAGE, spaces.Discrete(3), spaces.MultiBinary(2), spaces.Dict(d=spaces.Discrete(3))])
def test_policies_without_vectors_have_nothing_to_normalize(space: spaces.Space):
    assert not ObservationNormalizer(space).state_dict()
    cls = MultiInputPolicy if isinstance(space, spaces.Dict) else MlpPolicy
    assert normalizer_of(cls(space, CONTINUOUS, schedule)) is None


def test_normalization_changes_nothing_before_the_first_update():
    observations = th.randn(5, 3)
    th.testing.assert_close(ObservationNormalizer(VECTOR)(observations), observations, rtol=1e-6, atol=0)


@pytest.mark.parametrize("share_features_extractor", [True, False])
def test_acting_the_update_and_the_baseline_see_the_same_normalized_observations(share_features_extractor: bool):
    policy, plain = (
        MlpPolicy(
            VECTOR,
            CONTINUOUS,
            schedule,
            normalize_observations=normalize,
            share_features_extractor=share_features_extractor,
        )
        for normalize in (True, False)
    )
    policy.observation_normalizer.update(np.random.default_rng(0).normal(size=(50, 3)) * 3 + 2)
    plain.load_state_dict(policy.state_dict(), strict=False)
    for one in (policy, plain):
        one.value_net.weight.fill_(1.0)
    raw = th.randn(6, 3) * 3 + 2
    normalized = policy.observation_normalizer(raw)
    assert not th.allclose(raw, normalized)
    actions = th.randn(6, 2)
    pairs = [
        (policy.evaluate_actions(raw, actions), plain.evaluate_actions(normalized, actions)),
        (policy.predict_values(raw), plain.predict_values(normalized)),
        (policy(raw, deterministic=True), plain(normalized, deterministic=True)),
        (policy.get_distribution(raw).distribution.mean, plain.get_distribution(normalized).distribution.mean),
        (evaluate(policy, raw)[0].distribution.mean, plain.get_distribution(normalized).distribution.mean),
        (evaluate(policy, raw)[1], normalized),
        (baseline_features(policy, raw), baseline_features(plain, normalized)),
        (baseline_features(policy, raw)[:, :3], normalized),
    ]
    for found, expected in pairs:
        th.testing.assert_close(found, expected)
    predicted = [one.predict(x.numpy(), deterministic=True)[0] for one, x in ((policy, raw), (plain, normalized))]
    np.testing.assert_allclose(*predicted, rtol=1e-5, atol=1e-6)


# Features extractors ---------------------------------------------------------------------------------------------------------


class TwoLayers(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space, 5)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.tanh(self.second(th.tanh(self.first(observations))))


@pytest.mark.parametrize("normalize", [False, True])
def test_the_features_extractor_is_the_users(normalize: bool):
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, features_extractor_class=TwoLayers, normalize_observations=normalize)
    assert type(policy.features_extractor) is TwoLayers
    assert policy.pi_features_extractor is policy.vf_features_extractor is policy.features_extractor
    assert type(CnnPolicy(spaces.Box(0, 255, (3, 36, 36), np.uint8), CONTINUOUS, schedule).features_extractor) is NatureCNN
    assert type(MlpPolicy(VECTOR, CONTINUOUS, schedule).features_extractor) is FlattenExtractor


# Initialization --------------------------------------------------------------------------------------------------------------


def test_policy_defaults():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule)
    layers = [*policy.mlp_extractor.policy_net, policy.action_net]
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert [layer.out_features for layer in layers[::2]] == [64, 64, 2]
    assert (policy.ortho_init, policy.normalize_observations) == (True, True)
    assert (policy.baseline, policy.value_net.memory) == ("random_features", policy.baseline_memory)
    assert th.equal(policy.log_std, th.full((2,), 0.5))
    settings = policy.optimizer.param_groups[0]
    assert (type(policy.optimizer), settings["betas"], settings["eps"]) == (th.optim.Adam, (0.9, 0.999), 1e-8)
    assert not policy.value_net.weight.any()


def test_the_optimizer_holds_the_actor_and_nothing_else():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule)
    held = {id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]}
    actor = [policy.log_std, *policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    assert held == {id(parameter) for parameter in actor}


@pytest.mark.parametrize("net_arch", [[dict(pi=[4], vf=[8])], dict(pi=[4], vf=[8]), dict(pi=[4]), [4]], ids=str)
def test_net_arch_of_a2c_is_accepted_with_the_warnings_that_it_deserves(net_arch: Any):
    env = RandomEnv(spaces.Box(-1, 1, (3,)), CONTINUOUS, 5)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = REINFORCE("MlpPolicy", env, n_steps=10, baseline="linear", policy_kwargs=dict(net_arch=net_arch))
    texts = [str(warning.message) for warning in warned]
    assert any("'vf' is ignored" in text for text in texts) == ("vf" in str(net_arch))
    is_old = isinstance(net_arch[0], dict) if isinstance(net_arch, list) else False
    assert any("shared layers in the mlp_extractor are removed" in text for text in texts) == is_old
    assert model.policy.mlp_extractor.latent_dim_pi == 4
    assert model.policy.mlp_extractor.latent_dim_vf == 3
    assert model.learn(20)._n_updates >= 1


# The baseline ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "feature_map", "n_features"),
    [
        ("linear", nn.Sequential, 3),
        ("quadratic", QuadraticFeatures, 6),
        ("random_features", RandomFeatures, 131),
    ],
)
def test_the_critic_branch_is_a_fixed_feature_map(baseline: Any, feature_map: type, n_features: int):
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, baseline=baseline)
    assert type(policy.mlp_extractor.value_net) is feature_map
    assert type(policy.value_net) is LinearBaseline
    observations = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    features = baseline_features(policy, th.as_tensor(observations))
    assert features.shape == (50, n_features)
    np.testing.assert_array_equal(features[:, :3], observations)


def test_no_baseline_has_neither_features_nor_values():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, baseline=None)
    assert type(policy.value_net) is NoBaseline
    assert baseline_features(policy, th.randn(5, 3)).shape == (5, 0)
    assert th.equal(policy.predict_values(th.randn(5, 3)), th.zeros(5, 1, dtype=th.float64))


def test_baseline_kwargs_set_ridge_and_units():
    kwargs = dict(ridge=0.5, n_units=7)
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, baseline_kwargs=kwargs)
    assert policy.mlp_extractor.latent_dim_vf == 10
    assert policy.value_net.ridge == 0.5
    stream = io.BytesIO()
    policy.save(stream)
    stream.seek(0)
    loaded = MlpPolicy.load(stream)
    assert loaded.baseline_kwargs == kwargs
    model = REINFORCE("MlpPolicy", RandomEnv(VECTOR, CONTINUOUS, 5), baseline="quadratic", baseline_kwargs=dict(ridge=3.0))
    assert model.policy.value_net.ridge == 3.0


def test_values_are_the_fitted_baseline():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, baseline="linear")
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(50, 3)).astype(np.float32)
    returns = observations @ [1, 2, 3] + 4
    policy.value_net.fit(baseline_features(policy, th.as_tensor(observations)).numpy(), returns)
    values = policy.predict_values(th.as_tensor(observations)).numpy().flatten()
    np.testing.assert_allclose(values, returns, rtol=1e-6)


@pytest.mark.parametrize(
    ("policy_class", "space", "n_features"), [(CnnPolicy, "image", MAX_FEATURES), (MultiInputPolicy, "dict", 259)]
)
def test_the_baseline_of_images_and_dictionaries_acts_on_extracted_features(policy_class: Any, space: str, n_features: int):
    """The 512 features of NatureCNN are projected; of 256 and a vector, nothing is lost."""
    image = spaces.Box(0, 255, (3, 36, 36), dtype=np.uint8)
    observation_space = image if space == "image" else spaces.Dict({"image": image, "vector": VECTOR})
    policy = policy_class(observation_space, CONTINUOUS, schedule, baseline="linear")
    observations: Any = (
        {key: np.stack([sub.sample() for _ in range(4)]) for key, sub in observation_space.items()}
        if isinstance(observation_space, spaces.Dict)
        else np.stack([observation_space.sample() for _ in range(4)])
    )
    tensor = policy.obs_to_tensor(observations)[0]
    features = baseline_features(policy, tensor)
    assert features.shape == (4, n_features)
    th.testing.assert_close(baseline_features(policy, tensor, evaluate(policy, tensor)[1]), features)


def test_chunks_of_images_are_small_and_batch_normalization_sees_everything():
    assert chunk_size(MlpPolicy(VECTOR, CONTINUOUS, schedule)) > 1e4
    assert 50 < chunk_size(CnnPolicy(spaces.Box(0, 255, (4, 84, 84), dtype=np.uint8), CONTINUOUS, schedule)) < 100
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule)
    policy.mlp_extractor.policy_net.append(nn.BatchNorm1d(policy.mlp_extractor.latent_dim_pi))
    assert chunk_size(policy) > 1e18


# The critic of action values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
@pytest.mark.parametrize("advantage", ["monte_carlo", "q", "advantage", "td"])
def test_there_is_a_critic_of_action_values_only_where_it_is_used(policy: Any, advantage: Any):
    policy = REINFORCE(policy, RandomEnv(VECTOR, CONTINUOUS, 5), advantage=advantage).policy
    is_used = advantage in ("q", "advantage")
    assert (type(action_values_of(policy)) is ActionValues) == is_used
    assert any("action_value_net" in name for name in policy.state_dict()) == is_used
    assert type(policy.value_net) is LinearBaseline


def test_a_policy_alone_has_a_critic_of_action_values_if_it_is_asked_for():
    assert action_values_of(MlpPolicy(VECTOR, CONTINUOUS, schedule)) is None
    assert action_values_of(MlpPolicy(VECTOR, CONTINUOUS, schedule, action_values=True)) is not None
    assert action_values_of(MlpPolicy(VECTOR, CONTINUOUS, schedule, action_values=True, baseline=None)) is None


def test_a_module_of_the_users_is_not_taken_for_a_critic_of_action_values():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule)
    policy.action_value_net = nn.Linear(3, 1)
    assert action_values_of(policy) is None


@pytest.mark.parametrize("width", [3, 500])
@pytest.mark.parametrize("baseline", ["linear", "quadratic", "random_features"])
@pytest.mark.parametrize("extractor", [FlattenExtractor, "learned"], ids=["flat", "learned"])
def test_the_critic_of_action_values_is_fitted_as_the_baseline_is(extractor: Any, baseline: Any, width: int):
    """In the same features, or the same projections of them, with the same ridge, memory and truncation."""

    class Learned(BaseFeaturesExtractor):
        def __init__(self, observation_space: spaces.Space):
            super().__init__(observation_space, width)
            self.layer = nn.Linear(width, width)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.layer(observations)

    extractor = Learned if extractor == "learned" else extractor
    kwargs: dict[str, Any] = dict(baseline=baseline, baseline_memory=0.3, features_extractor_class=extractor)
    space = spaces.Box(-1, 1, (width,))
    policy = MlpPolicy(space, spaces.Discrete(3), schedule, action_values=True, **kwargs)
    critic = action_values_of(policy)
    assert critic is not None
    features = baseline_features(policy, th.rand(5, width))
    assert critic.features.out_features == (features.shape[1] + 1) * 4 - 1
    assert critic.predict(features, th.zeros(5, 1)).shape == (5, 1)
    for name in ("ridge", "memory", "truncate"):
        assert getattr(critic.linear, name) == getattr(policy.value_net, name), name
    assert (critic.linear.memory, critic.linear.truncate) == (0.3, extractor is Learned)
    with_ridge = MlpPolicy(space, CONTINUOUS, schedule, action_values=True, baseline_kwargs=dict(ridge=7.0), **kwargs)
    assert with_ridge.action_value_net.linear.ridge == with_ridge.value_net.ridge == 7.0


@pytest.mark.parametrize("squash_output", [False, True])
def test_the_critic_of_action_values_knows_whether_the_policy_squashes(squash_output: bool):
    """Samples are then within [-1, 1], whatever the bounds are."""
    space = spaces.Box(-20, 60, (2,))
    kwargs: dict[str, Any] = dict(use_sde=True, squash_output=squash_output, action_values=True)
    features = MlpPolicy(VECTOR, space, schedule, **kwargs).action_value_net.features
    assert features.low.tolist() == [-1 if squash_output else -20] * 2
    assert features.high.tolist() == [1 if squash_output else 60] * 2


def test_the_optimizer_does_not_hold_the_critic_of_action_values():
    plain, with_critic = (MlpPolicy(VECTOR, CONTINUOUS, schedule, action_values=given) for given in (False, True))
    assert dict(plain.named_parameters()).keys() == dict(with_critic.named_parameters()).keys()
    held = [sum(len(group["params"]) for group in p.optimizer.param_groups) for p in (plain, with_critic)]
    assert held[0] == held[1] == len(list(plain.parameters()))


@pytest.mark.parametrize("action_space", [CONTINUOUS, spaces.Discrete(3), spaces.MultiDiscrete([2, 3])], ids=str)
@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy", "MultiInputPolicy"])
def test_a_policy_that_is_saved_keeps_its_critic_of_action_values(policy: str, action_space: spaces.Space):
    space = {"CnnPolicy": spaces.Box(0, 255, (1, 36, 36), np.uint8), "MultiInputPolicy": spaces.Dict(v=VECTOR)}.get(policy)
    env = RandomEnv(space or spaces.Box(-1, 1, (3,)), action_space, 5)
    trained = REINFORCE(policy, env, n_steps=20, advantage="q", seed=0).learn(40).policy
    stream = io.BytesIO()
    trained.save(stream)
    stream.seek(0)
    loaded = type(trained).load(stream)
    assert loaded.action_values is trained.action_values is True
    assert loaded.state_dict().keys() == trained.state_dict().keys()
    found, expected = loaded.action_value_net.state_dict(), trained.action_value_net.state_dict()
    assert expected["linear.weight"].any()
    assert all(th.equal(found[name], value) for name, value in expected.items())


# Wide observations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_policy_for_wide_observations_is_hardly_larger_than_one_of_a2c(baseline: Any):
    """54,006 numbers were 23 GB (Tianshou issue 184), when every feature was paired with every other."""
    space = spaces.Box(-1, 1, (50_000,))
    policy = MlpPolicy(space, CONTINUOUS, schedule, baseline=baseline)
    numbers = sum(value.numel() for value in policy.state_dict().values())
    of_a2c = sum(value.numel() for value in A2C.policy_aliases["MlpPolicy"](space, CONTINUOUS, schedule).state_dict().values())  # type: ignore[arg-type]
    assert numbers < 1.6 * of_a2c


@pytest.mark.parametrize("width", [3, 5000])
def test_no_baseline_takes_no_memory(width: int):
    policy = MlpPolicy(spaces.Box(-1, 1, (width,)), CONTINUOUS, schedule, baseline=None, normalize_observations=False)
    assert policy.state_dict().keys() == dict(policy.named_parameters()).keys()
    assert not [name for name in policy.state_dict() if "value" in name]


class WideEnv(RandomEnv):
    """All of a wide observation is equal: drawing random ones would take most of the time."""

    def reset(self, **kwargs: Any) -> Any:
        self.remaining = self.max_length
        return np.ones(self.observation_space.shape, dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        self.remaining -= 1
        observation = np.full(self.observation_space.shape, self.remaining / self.max_length, dtype=np.float32)
        return observation, 1.0, self.remaining == 0, False, {}


@pytest.mark.parametrize("width", [8, 64, 192, 200, 257, 348, 1000, 30_000])
def test_model_files_are_at_most_three_times_as_large_as_those_of_a2c(width: int):
    space, sizes = spaces.Box(-1, 1, (width,)), {}
    kwargs: dict[str, Any] = dict(n_steps=5)
    models = {"A2C": A2C("MlpPolicy", WideEnv(space, CONTINUOUS, 5), **kwargs)}
    models |= {b: REINFORCE("MlpPolicy", WideEnv(space, CONTINUOUS, 5), baseline=b, **kwargs) for b in BASELINES}
    for name, model in models.items():
        stream = io.BytesIO()
        model.learn(5).save(stream)
        sizes[name] = stream.getbuffer().nbytes
    assert max(sizes[baseline] for baseline in BASELINES) <= 3 * sizes["A2C"], sizes


@settings(max_examples=8)
@given(st.integers(1, 900), st.sampled_from(BASELINES))
def test_wide_observations_are_learned_from(width: int, baseline: Any):
    env = WideEnv(spaces.Box(-1, 1, (width,)), CONTINUOUS, 5)
    model = REINFORCE("MlpPolicy", env, n_steps=20, baseline=baseline, seed=0).learn(20)
    values = model.policy.predict_values(th.as_tensor(model.rollout_buffer.observations))
    assert th.isfinite(values).all()
    if baseline is not None:
        # Returns fall with the observation, which all features show alike
        assert (values.flatten()[:5].diff() < 0).all()
