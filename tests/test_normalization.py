"""Running statistics of observations against NumPy and ``VecNormalize``."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from sb3_reinforce import MlpPolicy, MultiInputPolicy
from sb3_reinforce.episodes import normalization
from sb3_reinforce.episodes.normalization import ObservationNormalizer

VECTOR = spaces.Box(-np.inf, np.inf, (3,))
IMAGE = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 2_000_000]))
def test_statistics_are_mean_and_population_variance_of_all_observations(sizes: list[int], seed: int, chunk: int):
    rng = np.random.default_rng(seed)
    normalizer = ObservationNormalizer(VECTOR)
    batches = [rng.normal(size=(size, 3)) * [1, 100, 1e-3] + [0, 1e3, 5] for size in sizes]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(normalization, "CHUNK", chunk)
        for batch in batches:
            normalizer.update(batch)
    together = np.concatenate(batches)
    mean = sum(together) / len(together)
    var = sum((together - mean) ** 2) / len(together)
    found_mean, found_var, count = normalizer.statistics()
    np.testing.assert_allclose(found_mean, mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found_var, var, rtol=1e-6, atol=1e-12)
    assert count == len(together)
    probe = rng.normal(size=(4, 3)) * [1, 100, 1e-3] + [0, 1e3, 5]
    expected = np.clip((probe - mean) / np.sqrt(var + 1e-8), -10, 10)
    np.testing.assert_allclose(normalizer(th.as_tensor(probe)).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "offset", "scale", "tolerance"),
    [
        (np.float64, 1.7e9, 5.0, 1e-6),
        (np.float32, 100.0, 3.0, 1e-5),
        (np.int64, 10**12, 40.0, 1e-5),
        (np.uint8, 100, 20.0, 1e-6),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_mean_is_subtracted_before_rounding_to_float32(dtype: type, offset: float, scale: float, tolerance: float):
    seen = (offset + scale * np.random.default_rng(0).normal(size=(500, 3))).astype(dtype)
    normalizer = ObservationNormalizer(VECTOR)
    for part in np.split(seen, [100, 101, 350]):
        normalizer.update(part)
    exact = seen.astype(np.float64) - float(seen[0, 0])
    expected = (exact - exact.mean(axis=0)) / np.sqrt(exact.var(axis=0) + 1e-8)
    normalized = normalizer(th.as_tensor(seen))
    assert normalized.dtype == th.float32
    np.testing.assert_allclose(normalized.numpy(), expected, rtol=tolerance, atol=tolerance)


def test_observations_do_not_change_before_the_first_update():
    observations = th.randn(5, 3)
    th.testing.assert_close(ObservationNormalizer(VECTOR)(observations), observations, rtol=1e-6, atol=0)


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


def test_observations_whose_variance_overflows_are_refused():
    space = spaces.Dict(a=VECTOR, b=VECTOR)
    with pytest.raises(ValueError, match="The variance of observations 'b' is not finite: scale them down"):
        with np.errstate(all="ignore"):
            ObservationNormalizer(space).update({"a": np.eye(3), "b": 1e200 * np.eye(3)})


@pytest.mark.parametrize("space", [IMAGE, spaces.Discrete(3), spaces.MultiBinary(2), spaces.Dict(d=spaces.Discrete(3))])
def test_policies_without_vector_observations_have_no_normalizer(space: spaces.Space):
    assert not ObservationNormalizer(space).state_dict()
    cls = MultiInputPolicy if isinstance(space, spaces.Dict) else MlpPolicy
    assert cls(space, spaces.Discrete(2), lambda _: 1e-3).observation_normalizer is None
