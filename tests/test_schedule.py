"""Numbered episodes: which ones a rollout has, and all seeds."""

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_reinforce.episodes.schedule import EpisodeSchedule, episode_rng, episode_seed, torch_seeded_from, update_rng


def test_seeds_of_episodes_have_31_bits_and_differ():
    seeds = [episode_seed(seed, number) for seed in range(20) for number in range(200)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    # Uniform: five standard errors
    assert abs(np.mean(seeds) / 2**31 - 0.5) < 5 / np.sqrt(12 * len(seeds))


def test_generators_of_episodes_and_updates_differ():
    pairs = [(seed, number) for seed in range(30) for number in range(100)]
    draws = [rng(*pair).random() for pair in pairs for rng in (update_rng, episode_rng)]
    assert len(set(draws)) == len(draws)
    for rng in (update_rng, episode_rng):
        assert rng(3, 5).random() == rng(3, 5).random()


def test_torch_is_seeded_temporarily():
    before, draws = th.get_rng_state(), []
    for seed in (0, 0, 1):
        with torch_seeded_from(np.random.default_rng(seed), th.device("cpu")):
            draws.append(th.randn(3))
    assert th.equal(draws[0], draws[1])
    assert not th.equal(draws[0], draws[2])
    assert th.equal(th.get_rng_state(), before)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 12), st.integers(0, 5))
def test_a_schedule_counts_episodes_and_transitions(ended: list[int], min_transitions: int, min_episodes: int):
    """Each step ends the episode of one sub-environment, active or idle."""
    schedule = EpisodeSchedule(4, min_transitions, min_episodes, next_number=5, seed=1)
    schedule.begin(np.array([True, True, False, True]))
    assert schedule.started == [0, 1, 3]
    n_started, n_transitions, active = 3, 0, {0, 1, 3}
    for env_idx in ended:
        before = schedule.active
        was_active = before.copy()
        schedule.begin_step()
        n_transitions += len(active)
        wants_more = n_transitions < min_transitions or n_started < min_episodes
        assert schedule.wants_more() == wants_more
        assert schedule.end_episode(env_idx) == wants_more
        # The seed of the next episode, whether it belongs to this rollout or to the next one
        assert schedule.seeds[env_idx] == episode_seed(1, 5 + n_started)
        assert schedule.started == ([env_idx] if wants_more else [])
        if wants_more:
            assert schedule.numbers[env_idx] == 5 + n_started
        n_started += wants_more
        active = active | {env_idx} if wants_more else active - {env_idx}
        assert set(schedule.active.nonzero()[0].tolist()) == active
        assert (schedule.n_active, schedule.n_started, schedule.n_transitions) == (len(active), n_started, n_transitions)
        assert schedule.next_number == 5 + n_started
        # Callbacks may keep the array of an earlier step
        np.testing.assert_array_equal(before, was_active)


def test_idle_resets_of_one_step_have_the_seeds_of_the_next_rollout():
    schedule = EpisodeSchedule(3, 0, 3, seed=7)
    schedule.begin(np.ones(3, dtype=bool))
    for _ in range(2):
        schedule.begin_step()
        assert not any(schedule.end_episode(env_idx) for env_idx in range(3))
        assert schedule.seeds == [episode_seed(7, number) for number in (3, 4, 5)]


@pytest.mark.parametrize("seed", [None, 3])
def test_places_are_described_with_episode_step_and_seed(seed: int | None):
    schedule = EpisodeSchedule(2, 3, 0, next_number=8, seed=seed)
    suffix = "" if seed is None else " (reset(seed={}))"
    schedule.begin(np.array([True, False]))
    first, second = (f"episode {n}{suffix.format(episode_seed(seed or 0, n))}" for n in (8, 9))
    assert schedule.where(0) == f"in reset() of {first}"
    assert schedule.where(1) == "in an episode outside the rollout"
    schedule.begin_step()
    schedule.begin_step()
    assert schedule.where(0) == f"at step 2 of {first}"
    schedule.end_episode(1)
    assert schedule.where(1) == f"in reset() of {second}"
    schedule.begin_step()
    assert (schedule.where(0), schedule.where(1)) == (f"at step 3 of {first}", f"at step 1 of {second}")
    assert schedule.seeds == ([None, None] if seed is None else [episode_seed(seed, 8), episode_seed(seed, 9)])
