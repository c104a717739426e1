"""Policies: observation normalisation, initialisation, and the baseline in the place of the critic."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_reinforce import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_reinforce.baselines import LinearBaseline, QuadraticFeatures, RandomFeatures
from sb3_reinforce.policies import ObservationNormalizer, baseline_features, baseline_inputs, chunk_size
from tests.envs import RandomEnv

VECTOR = spaces.Box(-np.inf, np.inf, (3,))
IMAGE = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)
CONTINUOUS = spaces.Box(-1, 1, (2,))


def schedule(_: float) -> float:
    return 1e-3


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_statistics_are_those_of_all_observations_together(sizes: list[int], seed: int):
    rng = np.random.default_rng(seed)
    normalizer = ObservationNormalizer(VECTOR)
    batches = [rng.normal(size=(size, 3)) * [1, 100, 1e-3] + [0, 1e3, 5] for size in sizes]
    for batch in batches:
        normalizer.update(batch)
    together = np.concatenate(batches)
    probe = th.as_tensor(rng.normal(size=(4, 3)) * [1, 100, 1e-3] + [0, 1e3, 5])
    # SB3 starts from mean 0 and variance 1 with the weight of 1e-4 observations
    weights = np.append(np.ones(len(together)), 1e-4)
    mean = (weights[:-1] @ together) / weights.sum()
    var = (weights[:-1] @ (together - mean) ** 2 + 1e-4 * (1 + mean**2)) / weights.sum()
    expected = np.clip((probe.numpy() - mean) / np.sqrt(var + 1e-8), -10, 10)
    np.testing.assert_allclose(normalizer(probe).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_normalises_and_clips_as_vec_normalize_does():
    env = VecNormalize(DummyVecEnv([lambda: RandomEnv(VECTOR, CONTINUOUS, 5)]))
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(50, 3)) * [1, 10, 0.1] + 5
    env.obs_rms.update(batch)
    normalizer = ObservationNormalizer(VECTOR)
    normalizer.update(batch)
    probe = np.concatenate([batch, 1e6 * batch])
    np.testing.assert_allclose(normalizer(th.as_tensor(probe)).numpy(), env.normalize_obs(probe), rtol=1e-6)


def test_only_vectors_of_a_dictionary_are_normalised():
    space = spaces.Dict({"a.b": VECTOR, "image": IMAGE, "discrete": spaces.Discrete(4), "other": spaces.Box(-1, 1, (2, 2))})
    normalizer = ObservationNormalizer(space)
    assert normalizer.keys == ["a.b", "other"]
    batch = {key: np.stack([space[key].sample() for _ in range(20)]) for key in space}
    normalizer.update(batch)
    tensors = {key: th.as_tensor(value).float() for key, value in batch.items()}
    normalized = normalizer(tensors)
    for key in ("a.b", "other"):
        np.testing.assert_allclose(normalized[key].mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(normalized[key].std(0, unbiased=False), 1, atol=1e-3)
    for key in ("image", "discrete"):
        assert th.equal(normalized[key], tensors[key])


def test_normalisation_changes_nothing_before_the_first_update():
    observations = th.randn(5, 3)
    th.testing.assert_close(ObservationNormalizer(VECTOR)(observations), observations, rtol=1e-6, atol=0)


def test_acting_the_update_and_the_baseline_see_the_same_normalised_observations():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, normalize_observations=True)
    plain = MlpPolicy(VECTOR, CONTINUOUS, schedule, normalize_observations=False)
    policy.observation_normalizer.update(np.random.default_rng(0).normal(size=(50, 3)) * 3 + 2)
    plain.load_state_dict(policy.state_dict(), strict=False)
    policy.value_net.weight[:], plain.value_net.weight[:] = 1.0, 1.0
    raw = th.randn(6, 3) * 3 + 2
    normalized = policy.observation_normalizer(raw)
    actions = th.randn(6, 2)
    for output, expected in zip(
        policy.evaluate_actions(raw, actions), plain.evaluate_actions(normalized, actions), strict=True
    ):
        th.testing.assert_close(output, expected)
    np.testing.assert_allclose(
        policy.predict(raw.numpy(), deterministic=True)[0], plain.predict(normalized.numpy(), deterministic=True)[0], rtol=1e-6
    )
    features = baseline_features(policy, [raw])
    np.testing.assert_allclose(features[:, :3], normalized.numpy(), rtol=1e-6)
    np.testing.assert_allclose(features, baseline_features(plain, [normalized]), rtol=1e-6)


def test_separate_extractors_share_one_normaliser():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, normalize_observations=True, share_features_extractor=False)
    assert policy.pi_features_extractor is not policy.vf_features_extractor
    assert policy.pi_features_extractor.normalizer is policy.vf_features_extractor.normalizer


def test_defaults():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule)
    layers = [*policy.mlp_extractor.policy_net, policy.action_net]
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [layer.out_features for layer in layers[::2]] == [64, 64, 2]
    assert (policy.ortho_init, policy.normalize_observations) == (True, True)
    assert (policy.baseline, policy.baseline_memory, policy.value_net.memory) == ("random", 0.85, 0.85)
    assert th.equal(policy.log_std, th.full((2,), -0.75))
    settings = policy.optimizer.param_groups[0]
    assert (type(policy.optimizer), settings["betas"], settings["eps"]) == (th.optim.Adam, (0.9, 0.999), 1e-8)
    assert not policy.value_net.weight.any()


def test_glorot_initialisation():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, net_arch=[32, 32], ortho_init=False)
    for layer in [*policy.mlp_extractor.policy_net[::2], policy.action_net]:
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.7 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.25)
        assert not layer.bias.any()


def test_orthogonal_initialisation_is_sb3s():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, net_arch=[32, 32], ortho_init=True)
    weight = policy.mlp_extractor.policy_net[2].weight
    th.testing.assert_close(weight @ weight.T, 2 * th.eye(32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("baseline", "feature_map", "n_features"),
    [
        ("linear", nn.Sequential, 3),
        ("quadratic", QuadraticFeatures, 6),
        ("random", RandomFeatures, 131),
        (None, nn.Sequential, 3),
    ],
)
def test_the_critic_branch_is_a_fixed_feature_map(baseline: str | None, feature_map: type, n_features: int):
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, baseline=baseline)
    assert type(policy.mlp_extractor.value_net) is feature_map
    assert isinstance(policy.value_net, LinearBaseline)
    assert policy.value_net.in_features == n_features
    observations = np.random.default_rng(0).normal(size=(2500, 3)).astype(np.float32)
    features = baseline_features(policy, map(th.as_tensor, np.split(observations, [1000, 2000])))
    assert features.shape == (2500, n_features)
    np.testing.assert_array_equal(features[:, :3], observations)


def test_the_optimiser_holds_the_actor_and_nothing_else():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, baseline="random", baseline_memory=0.5, normalize_observations=True)
    held = {id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]}
    actor = [policy.log_std, *policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    assert held == {id(parameter) for parameter in actor}


def test_values_are_the_fitted_baseline():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, baseline="linear")
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(50, 3)).astype(np.float32)
    policy.value_net.fit(baseline_features(policy, [th.as_tensor(observations)]), observations @ [1, 2, 3] + 4)
    values = policy.predict_values(th.as_tensor(observations)).numpy().flatten()
    np.testing.assert_allclose(values, observations @ [1, 2, 3] + 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("policy_class", "space", "n_features"), [(CnnPolicy, "image", 512), (MultiInputPolicy, "dict", 256 + 3)]
)
def test_the_baseline_of_images_and_dictionaries_acts_on_extracted_features(policy_class: type, space: str, n_features: int):
    image = spaces.Box(0, 255, (3, 36, 36), dtype=np.uint8)
    observation_space = image if space == "image" else spaces.Dict({"image": image, "vector": VECTOR})
    policy = policy_class(observation_space, CONTINUOUS, schedule, baseline="linear")
    observations = (
        {key: np.stack([sub.sample() for _ in range(4)]) for key, sub in observation_space.items()}
        if space == "dict"
        else np.stack([observation_space.sample() for _ in range(4)])
    )
    assert baseline_features(policy, [policy.obs_to_tensor(observations)[0]]).shape == (4, n_features)


def test_a_vf_architecture_is_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="'vf' is ignored"):
        policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, baseline="linear", net_arch=dict(pi=[7], vf=[5]))
    assert policy.mlp_extractor.latent_dim_pi == 7
    assert policy.mlp_extractor.latent_dim_vf == 3


def test_chunks_of_images_are_small_and_batch_normalisation_sees_everything():
    assert chunk_size(MlpPolicy(VECTOR, CONTINUOUS, schedule)) > 1e4
    assert 50 < chunk_size(CnnPolicy(spaces.Box(0, 255, (4, 84, 84), dtype=np.uint8), CONTINUOUS, schedule)) < 100
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule)
    policy.mlp_extractor.policy_net.append(nn.BatchNorm1d(policy.mlp_extractor.latent_dim_pi))
    assert chunk_size(policy) > 1e18


def test_what_the_baseline_is_asked_about_is_kept_for_a_while():
    policy = MlpPolicy(VECTOR, CONTINUOUS, schedule, baseline="linear")
    observations = th.randn(7, 3)
    with baseline_inputs(policy) as kept:
        policy.predict_values(observations)
        policy.evaluate_actions(observations[:2], th.zeros(2, 2))
    policy.predict_values(observations)
    assert [array.shape for array in kept] == [(7, 3), (2, 3)]
    np.testing.assert_array_equal(kept[0], observations.numpy())
