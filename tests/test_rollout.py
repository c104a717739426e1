"""Collecting whole episodes: which ones, what callbacks may change, time limits, and values that are not finite."""

from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.acting import MlpActor
from sb3_reinforce.episodes.schedule import episode_rng, episode_seed
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from tests.envs import OwnVecEnv, RandomLengthEnv, ScriptedEnv, Simulators, scripted, subproc
from tests.executors import FakeExecutor
from tests.rollouts import (
    LONG,
    SMALL,
    USES,
    WRAPPERS,
    Do,
    Recorder,
    Reference,
    check_whole,
    collect,
    episode_vec_env,
    episodes_of,
    lengths,
    spoil_at,
    state_of,
    targets,
)

# Episodes of a batch ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(lengths, targets, st.sampled_from([None, 0, 7]), st.lists(st.booleans(), min_size=1, max_size=3), st.booleans())
def test_a_batch_has_all_episodes_that_were_started_and_each_is_reset_once_by_number(
    lengths_of_each: list[list[int]], target: dict[str, int], seed: int | None, resets_counts: list[bool], at_once: bool
):
    env = episode_vec_env(lengths_of_each)
    model, recorder = REINFORCE("MlpPolicy", env, seed=seed, **(SMALL | target)), Recorder()
    if at_once:
        recorder.n_rollouts = len(resets_counts)
        model.learn(LONG, callback=recorder)
    else:
        for reset_num_timesteps in resets_counts:
            model.learn(1, callback=recorder, reset_num_timesteps=reset_num_timesteps)
    reference, n_transitions, envs = Reference(lengths_of_each, steps_idle_envs=False), 0, list[Any](env.envs)
    assert len(recorder.rollouts) == len(resets_counts)
    for rollout in recorder.rollouts:
        episodes, activity, _ = reference.rollout([True] * env.num_envs, **target)
        found = [(int(e[0, 0]), int(e[0, 1]), len(e)) for e in episodes_of(rollout)]
        assert found == [(index, episode, reference.length(index, episode)) for index, episode, _ in episodes]
        seeds = [None if seed is None else episode_seed(seed, number) for *_, number in episodes]
        assert [envs[index].seeds[episode] for index, episode, _ in episodes] == seeds
        assert (rollout["episodes"], rollout["idle_fraction"]) == (len(found), 0)
        np.testing.assert_array_equal(rollout["rewards"], rollout["observations"] @ [0, 100, 1] + 1)
        n_transitions += np.sum(activity)
    check_whole(recorder.rollouts)
    # No other resets and no other steps
    assert sum(sum(env.lengths_run) for env in envs) == n_transitions == sum(len(r["rewards"]) for r in recorder.rollouts)
    assert sum(env.n_resets for env in envs) == reference.next_number


BETWEEN = "between calls of learn()"


def learn_and_use(env: VecEnv, when: str, use: str | None, seed: int | None) -> tuple[REINFORCE, Recorder]:
    """Learn in three calls, the second of which counts from 0, and use the training environment when no rollout runs."""
    model, recorder = REINFORCE("MlpPolicy", env, n_steps=7, seed=seed, **SMALL), Recorder()
    action = lambda model: use and USES[use](model, env)  # noqa: E731
    for call in range(3):
        model.learn(60, callback=[recorder, Do(when, action)], reset_num_timesteps=call == 1)
        if when == BETWEEN:
            action(model)
    assert len(recorder.rollouts) > 3
    return model, recorder


@pytest.mark.parametrize(
    ("when", "use"),
    [(BETWEEN, "step"), (BETWEEN, "evaluate_policy"), ("on_training_start", "reset"), ("on_rollout_end", "evaluate_policy")],
)
def test_using_the_training_environment_between_seeded_rollouts_changes_nothing(when: str, use: str):
    states = []
    for use_or_none in (None, use):
        env = DummyVecEnv([lambda: RandomLengthEnv(9)] * 2)
        states.append(state_of(learn_and_use(env, when, use_or_none, seed=0)[0]))
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize(
    # learn() cannot know that others have stepped processes during it
    ("when", "use", "kind"),
    [("on_rollout_start", "reset", "plain"), ("on_rollout_end", "step", "VecNormalize"), (BETWEEN, "step", "processes")],
)
def test_using_the_training_environment_between_unseeded_rollouts_leaves_whole_episodes(when: str, use: str, kind: str):
    fns = [lambda index=index: ScriptedEnv([[7], [13]][index], index) for index in range(2)]
    env = subproc(fns) if kind == "processes" else EpisodeVecEnv(fns)
    with closing(WRAPPERS[kind](env) if kind == "VecNormalize" else env) as env:
        check_whole(learn_and_use(env, when, use, seed=None)[1].rollouts)


# Actions ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sde_sample_freq", "n_changes"), [(-1, 0), (4, 2)])
def test_gsde_matrices_change_every_sde_sample_freq_steps_of_an_episode(sde_sample_freq: int, n_changes: int):
    kwargs: dict[str, Any] = dict(use_sde=True, sde_sample_freq=sde_sample_freq, normalize_observations=False)
    model = REINFORCE("MlpPolicy", ScriptedEnv([10]), n_steps=None, n_episodes=3, policy_kwargs=dict(net_arch=[3]), **kwargs)
    with th.no_grad():
        # With constant features, only the matrices change the actions
        model.policy.mlp_extractor.policy_net[0].weight.zero_()
        model.policy.mlp_extractor.policy_net[0].bias.fill_(1.0)
    actions = model.learn(1).rollout_buffer.actions.reshape(3, 10, 2)
    changes = np.any(np.diff(actions, axis=1) != 0, axis=2)
    np.testing.assert_array_equal(changes, [[step in (4, 8)[:n_changes] for step in range(1, 10)]] * 3)
    assert len(np.unique(actions[:, 0], axis=0)) == 3


MADE: list[ScriptedEnv] = []


def make_listed() -> ScriptedEnv:
    MADE.append(ScriptedEnv([2]))
    return MADE[-1]


@pytest.mark.parametrize("workers", [None, FakeExecutor(1)], ids=["here", "workers"])
def test_seed_episodes_false_seeds_the_first_reset_alone(workers: Any):
    """For environments that begin a list of tasks anew with each seed."""
    kwargs: dict[str, Any] = dict(workers=workers, seed_episodes=False, seed=0, n_steps=4, n_episodes=None)
    model = REINFORCE("MlpPolicy", make_listed, **kwargs)
    model.learn(10).learn(10, reset_num_timesteps=False)
    first, *others = MADE[-1].seeds
    assert first is not None and len(others) > 3 and set(others) == {None}


def test_stored_actions_are_not_clipped():
    kwargs = dict(net_arch=[], log_std_init=0.0)
    recorder, _ = collect(scripted([[50]]), n_steps=50, seed=0, policy_kwargs=kwargs)
    (rollout,) = recorder.rollouts
    assert np.abs(rollout["actions"]).max() > 1
    np.testing.assert_array_equal(rollout["actions"], [step["actions"][0] for step in recorder.steps])
    for step in recorder.steps:
        np.testing.assert_array_equal(step["clipped_actions"], np.clip(step["actions"], -1, 1))


# Callbacks -------------------------------------------------------------------------------------------------------------------


def change_weights(policy: Any) -> None:
    with th.no_grad():
        policy.log_std.fill_(1.0)
        policy.mlp_extractor.policy_net[0].bias += 0.5


def load_state_dict(policy: Any) -> None:
    policy.load_state_dict({name: value * 2 for name, value in policy.state_dict().items()})


CHANGES_IN_PLACE: dict[str, Callable[[Any], Any]] = {
    "weights": change_weights,
    "state_dict": load_state_dict,
    "statistics": lambda policy: policy.observation_normalizer.update(np.random.default_rng(0).normal(5, 3, (20, 3))),
    "variance": lambda policy: policy.observation_normalizer.var_0.fill_(9.0),
}
REPLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda policy: setattr(policy, "log_std", nn.Parameter(th.tensor([1.0, -1.0]))),
    "memory": lambda policy: policy.load_from_vector(policy.parameters_to_vector() + 0.3),
    "layer": lambda policy: setattr(policy, "action_net", nn.Linear(8, 2)),
    "mean": lambda policy: setattr(policy.observation_normalizer, "mean_0", th.full((3,), 2.0, dtype=th.float64)),
    "hook": lambda policy: policy.action_net.register_forward_hook(lambda module, inputs, output: output + 5),
}


class WideEnv(ScriptedEnv):
    action_space = spaces.Box(-1000, 1000, (2,))

    def _observation(self) -> np.ndarray:
        return self.np_random.normal(size=3).astype(np.float32)


def outputs(policy: Any, observations: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of the actions, computed by PyTorch."""
    with th.no_grad():
        distribution = policy.get_distribution(th.as_tensor(observations)).distribution
    return np.stack([distribution.mean.numpy(), distribution.stddev.numpy()])


def act(policy: Any, observations: np.ndarray) -> np.ndarray:
    """Actions of a policy in episode 0."""
    noise = episode_rng(0, 0).standard_normal((len(observations), 2), dtype=np.float32)
    mean, std = outputs(policy, observations)
    return mean + std * noise


@pytest.mark.parametrize(
    ("change", "activation_fn"),
    [*((name, fn) for name in CHANGES_IN_PLACE for fn in (nn.ReLU, nn.ELU)), *((name, nn.ReLU) for name in REPLACEMENTS)],
)
def test_in_place_changes_by_callbacks_act_at_the_next_step_and_replacements_from_the_next_rollout(
    change: str, activation_fn: type[nn.Module]
):
    """Two rollouts of episode 0, without an update. MLPs with ReLU act with NumPy, with ELU with PyTorch."""
    policy_kwargs = dict(net_arch=[8], activation_fn=activation_fn)
    model = REINFORCE(
        "MlpPolicy", WideEnv([30]), n_steps=None, n_episodes=1, seed=0, baseline=None, policy_kwargs=policy_kwargs
    )
    model.train = lambda: None  # type: ignore[method-assign]
    with th.no_grad():
        model.policy.action_net.weight.normal_(generator=th.Generator().manual_seed(0))
    model.policy.observation_normalizer.update(np.random.default_rng(1).normal(size=(9, 3)))
    assert MlpActor.can_act_for(model.policy) == (activation_fn is nn.ReLU)
    policies: list[Any] = []

    def apply(model: REINFORCE) -> None:
        policies.append(deepcopy(model.policy))
        (CHANGES_IN_PLACE | REPLACEMENTS)[change](model.policy)
        policies.append(deepcopy(model.policy))

    recorder = Recorder(2)
    model.learn(LONG, callback=[Do(11, apply), recorder])
    (old, new), (first, second) = policies, recorder.rollouts
    observations = first["observations"]
    by_old, by_new = act(old, observations), act(new, observations)
    assert np.abs(by_old - by_new).max() > 0.05
    changed = by_new[11:] if change in CHANGES_IN_PLACE else by_old[11:]
    np.testing.assert_allclose(first["actions"], [*by_old[:11], *changed], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(second["observations"], observations)
    np.testing.assert_allclose(second["actions"], by_new, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("when", "kind", "seed"),
    [
        ("on_rollout_start", "VecNormalize", None),
        (2, "EpisodeVecEnv", 0),
        (2, "Simulators", None),
        # The last step of the rollout
        (8, "VecNormalize", 0),
        ("on_rollout_end", "EpisodeVecEnv", None),
    ],
)
def test_an_environment_set_by_a_callback_runs_whole_episodes_from_the_next_rollout_on(
    when: str | int, kind: str, seed: int | None
):
    def make(lengths_of_each: list[list[int]]) -> VecEnv:
        if kind == "Simulators":
            return Simulators(lengths_of_each)
        env = episode_vec_env(lengths_of_each)
        return env if kind == "EpisodeVecEnv" else VecNormalize(env, norm_obs=False, norm_reward=False)

    old, new = make([[3], [4]]), make([[6], [5]])
    model, recorder = REINFORCE("MlpPolicy", old, n_steps=7, seed=seed, **SMALL), Recorder(3)
    model.learn(LONG, callback=[Do(when, lambda model: model.env is old and model.set_env(new)), recorder])
    model.learn(1, callback=recorder, reset_num_timesteps=False)
    check_whole(recorder.rollouts)
    assert model.env is new
    lengths = [{len(e) for e in episodes_of(rollout)} for rollout in recorder.rollouts]
    assert lengths == [{6, 5} if when == "on_rollout_start" else {3, 4}, *[{6, 5}] * 3]
    assert not isinstance(new, Simulators) or new.n_resets == 1


def test_an_environment_set_by_a_callback_that_stops_is_reset():
    new = VecNormalize(DummyVecEnv([lambda: Monitor(ScriptedEnv([4]))]))
    model = REINFORCE("MlpPolicy", Monitor(ScriptedEnv([5])), n_steps=8, n_episodes=None)
    model.learn(8, callback=lambda locals_, _: bool(locals_["model"].set_env(new)))
    model.learn(8, reset_num_timesteps=False)
    assert {info["l"] for info in model.ep_info_buffer} == {4}


@pytest.mark.parametrize("kind", ["EpisodeVecEnv", "Simulators"])
def test_a_rollout_stopped_by_a_callback_is_repeated(kind: str):
    recorder, states = Recorder(), []
    for n_stopped in (0, 4):
        env = Simulators([[5], [3]]) if kind == "Simulators" else DummyVecEnv([lambda: RandomLengthEnv(9)] * 3)
        model = REINFORCE("MlpPolicy", env, n_steps=6, seed=0, **SMALL)
        model.learn(n_stopped, callback=lambda locals_, _: locals_["n_steps"] < 4)
        assert model._n_updates == 0
        states.append(state_of(model.learn(1, callback=recorder, reset_num_timesteps=False)))
    if kind == "Simulators":
        check_whole(recorder.rollouts)
    else:
        np.testing.assert_array_equal(*states)


@pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("kind", ["EpisodeVecEnv", "VecNormalize", "OwnVecEnv"])
def test_after_an_exception_learn_begins_with_a_reset(kind: str, error: BaseException):
    envs = [ScriptedEnv([5], 0), ScriptedEnv([3], 1)]
    fns: list[Any] = [lambda: envs[0], lambda: envs[1]]
    env = OwnVecEnv(fns) if kind == "OwnVecEnv" else EpisodeVecEnv(fns)
    env = VecNormalize(env, norm_obs=False) if kind == "VecNormalize" else env
    model, recorder = REINFORCE("MlpPolicy", env, n_steps=6, seed=0, **SMALL), Recorder()

    def fail(model: REINFORCE) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        model.learn(100, callback=Do(4, fail))
    assert raised.value is error and not hasattr(error, "__notes__")
    assert model._last_obs is None
    assert [env.n_resets for env in envs] == [1, 2]
    model.learn(1, callback=recorder, reset_num_timesteps=False)
    check_whole(recorder.rollouts)
    # The episodes of the interrupted rollout are repeated
    assert [episode[0, 1] for episode in episodes_of(recorder.rollouts[0])] == [1, 2, 2, 3]
    expected = [None, None] if kind == "OwnVecEnv" else [episode_seed(0, number) for number in (0, 1)]
    assert [envs[0].seeds[1], envs[1].seeds[2]] == expected


# Time limits and statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_bootstrapping_adds_the_discounted_value_of_the_terminal_observation_at_time_limits(truncated: bool, bootstrap: bool):
    env = scripted([[4], [2]], truncated=truncated)
    kwargs = dict(baseline="linear", baseline_kwargs=dict(time=True), normalize_observations=False, policy_kwargs={})
    recorder, model = collect(env, n_steps=2, gamma=0.9, bootstrap_timeouts=bootstrap, **kwargs)
    with th.no_grad():
        # The value is the sum of the observation and of the time in units of 10 steps, plus 0.5
        model.policy.value_net.weight.fill_(1.0)
        model.policy.value_net.bias.fill_(0.5)
    model.learn(1, callback=recorder, reset_num_timesteps=False)
    rollout = recorder.rollouts[-1]
    env_index, episode, step = rollout["observations"].T
    expected = 100 * episode + step + 1
    if truncated and bootstrap:
        last = step + 1 == np.where(env_index == 0, 4, 2)
        expected = expected + last * 0.9 * (env_index + episode + 1.1 * (step + 1) + 0.5)
    np.testing.assert_allclose(rollout["rewards"], expected, rtol=1e-6)


# Values that are not finite --------------------------------------------------------------------------------------------------


class DictEnv(ScriptedEnv):
    observation_space = spaces.Dict(a=spaces.Box(-np.inf, np.inf, (3,)), b=spaces.Box(-np.inf, np.inf, (2,)))

    def _observation(self) -> Any:
        return {"a": super()._observation(), "b": np.zeros(2, dtype=np.float32)}


@pytest.mark.parametrize(
    ("cls", "what", "episode", "step", "value"),
    [
        (ScriptedEnv, "reward", 0, 2, np.nan),
        (ScriptedEnv, "reward", 3, 4, -np.inf),
        (ScriptedEnv, "observation", 2, 2, np.inf),
        (ScriptedEnv, "observation", 0, 0, np.nan),
        (ScriptedEnv, "observation", 3, 0, np.nan),
        (DictEnv, "observation", 1, 3, np.nan),
    ],
)
def test_a_value_that_is_not_finite_is_refused_with_its_place(
    cls: type[ScriptedEnv], what: str, episode: int, step: int, value: float
):
    """Later values in other episodes do not change the message."""
    bad, other = cls([4], 1, spoil=spoil_at(what, episode, step, value)), cls([3], 0, spoil=spoil_at("reward", 5, 3, np.nan))
    env = DummyVecEnv([lambda: other, lambda: bad, lambda: cls([5], 2)])
    policy = "MlpPolicy" if cls is ScriptedEnv else "MultiInputPolicy"
    model = REINFORCE(policy, env, n_steps=7, n_episodes=None, seed=0, policy_kwargs=dict(net_arch=[]))
    before = []
    with pytest.raises(ValueError) as raised:
        while True:
            before = state_of(model)
            model.learn(1, reset_num_timesteps=False)
    seed = bad.seeds[episode]
    number = next(number for number in range(100) if episode_seed(0, number) == seed)
    place = f"at step {step} of" if step else "in reset() of"
    entry = " 'b'" if cls is DictEnv else ""
    shown = [value] * (2 if cls is DictEnv else 3) if what == "observation" else value
    start = (
        f"Environment 1 returned the {what}{entry} {shown} {place} episode {number} (reset(seed={seed})): NaN, infinite, or"
    )
    assert str(raised.value).startswith(start)
    np.testing.assert_array_equal(state_of(model), before)
    bad.spoil = other.spoil = lambda what, episode, step, value: value
    model.learn(1, reset_num_timesteps=False)
    assert not np.array_equal(state_of(model), before)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("cls", [DummyVecEnv, OwnVecEnv])
def test_rewards_must_fit_into_float32(cls: type[DummyVecEnv]):
    largest = float(np.finfo(np.float32).max)
    env = cls([lambda: ScriptedEnv([4]), lambda: ScriptedEnv([4], spoil=spoil_at("reward", 0, 3, largest))])
    assert collect(env, n_steps=4)[0].rollouts[0]["rewards"][6] == largest
    env = cls([lambda: ScriptedEnv([4]), lambda: ScriptedEnv([4], spoil=spoil_at("reward", 0, 3, 2 * largest))])
    with pytest.raises(ValueError, match=r"Environment 1 .* reward inf at step 3 of episode 1: .*too large for float32"):
        collect(env, n_steps=4)


@pytest.mark.parametrize(
    ("space", "activation_fn", "message"),
    [
        (spaces.Box(-1, 1, (2,)), nn.ReLU, r"The policy returned the action \[nan, .*\] at step 1 of episode 0"),
        (spaces.Box(-1, 1, (2,)), nn.ELU, "nan"),
        (spaces.Discrete(3), nn.ReLU, "nan"),
        (spaces.MultiDiscrete([2, 3]), nn.ReLU, "nan"),
    ],
)
def test_a_policy_that_returns_nan_learns_nothing(space: spaces.Space, activation_fn: type[nn.Module], message: str):
    env = ScriptedEnv([4])
    env.action_space = space
    model = REINFORCE(
        "MlpPolicy", env, n_steps=8, n_episodes=None, policy_kwargs=dict(net_arch=[4], activation_fn=activation_fn)
    )
    model.policy.action_net.bias.data[0] = np.nan
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        model.learn(16)
    np.testing.assert_array_equal(state_of(model), before)
