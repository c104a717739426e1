"""``EnvPoolVecEnv``: Gymnasium's environments at another speed, for every algorithm of SB3."""

import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.schedule import EpisodeSchedule
from sb3_reinforce.episodes.source import EpisodeSource
from sb3_reinforce.tools.envpool import EnvPoolVecEnv

pytest.importorskip("envpool")

CART_POLE = "CartPole-v1"
LANDER = "LunarLanderContinuous-v3"
TASKS = [CART_POLE, "LunarLander-v3", LANDER, "Acrobot-v1", "MountainCarContinuous-v0", "Pendulum-v1"]
#: A policy that is made in no time
SMALL: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[]), baseline=None)


def has_fallen(observation: np.ndarray) -> bool:
    """Whether the pole has fallen, or the cart has left the track."""
    return bool(abs(observation[2]) > 0.20943951 or abs(observation[0]) > 2.4)


def follows(observation: np.ndarray, following: np.ndarray) -> bool:
    """Whether one observation of a cart and a pole is a step behind another."""
    moved = observation[[0, 2]] + 0.02 * observation[[1, 3]]
    return np.allclose(moved, following[[0, 2]], atol=1e-5)


# The environments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_id", TASKS)
def test_spaces_are_those_of_gymnasium(task_id: str):
    env, other = EnvPoolVecEnv(task_id, 3), gym.make(task_id)
    assert env.observation_space == other.observation_space
    assert env.action_space == other.action_space
    obs = env.reset()
    for _ in range(20):
        assert obs.shape == (3, *env.observation_space.shape) and obs.dtype == env.observation_space.dtype
        assert all(env.observation_space.contains(one) for one in obs)
        obs, rewards, dones, _ = env.step(np.array([env.action_space.sample() for _ in range(3)]))
        assert (rewards.shape, rewards.dtype, dones.shape, dones.dtype) == ((3,), np.float32, (3,), bool)
    env.close()


class LinearPolicy:
    """Acts by a random linear function of the observation."""

    def __init__(self, env: gym.Env, seed: int):
        self.is_discrete = isinstance(env.action_space, gym.spaces.Discrete)
        n_outputs = env.action_space.n if self.is_discrete else env.action_space.shape[0]  # type: ignore[union-attr, index]
        self.weights = np.random.default_rng(seed).normal(size=(*env.observation_space.shape, n_outputs))  # type: ignore[misc]

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        outputs = observations @ self.weights
        return outputs.argmax(axis=1) if self.is_discrete else np.tanh(outputs).astype(np.float32)


def play_gymnasium(env: gym.Env, policy: LinearPolicy, n_episodes: int) -> np.ndarray:
    """(n_episodes, 2) return and length of episodes."""
    results = np.zeros((n_episodes, 2))
    for number in range(n_episodes):
        obs, _ = env.reset(seed=number)
        over = False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(policy(obs[None])[0])
            results[number] += reward, 1
            over = terminated or truncated
    return results


def play_envpool(env: EnvPoolVecEnv, policy: LinearPolicy, n_episodes: int) -> np.ndarray:
    """(n_episodes, 2) return and length of episodes, none of which is left out for being long."""
    schedule = EpisodeSchedule(env.num_envs, 0, n_episodes)
    source = EpisodeSource(env, schedule)
    obs = source.begin(None, np.ones(env.num_envs, dtype=bool))
    results = []
    while schedule.n_active:
        obs, _, dones, infos = source.step(policy(obs))
        results += [(infos[index]["episode"]["r"], infos[index]["episode"]["l"]) for index in dones.nonzero()[0]]
    assert len(results) == n_episodes
    return np.array(results)


@pytest.mark.parametrize("task_id", [CART_POLE, LANDER])
def test_one_policy_gets_the_same_returns_as_on_gymnasium(task_id: str):
    """The mean return and length of 500 episodes are within the 99 % intervals of each other."""
    env = gym.make(task_id)
    policy = LinearPolicy(env, seed=2)
    results = [play_gymnasium(env, policy, 500), play_envpool(EnvPoolVecEnv(task_id, 10, seed=2), policy, 500)]
    difference = np.abs(results[0].mean(axis=0) - results[1].mean(axis=0))
    for result in results:
        assert (difference <= 2.576 * result.std(axis=0) / np.sqrt(len(result))).all()


def test_the_end_of_an_episode():
    """Terminal observations, time-outs and statistics are where SB3 has them; the next episode has begun."""
    env = EnvPoolVecEnv(CART_POLE, 8, seed=0, max_episode_steps=9)
    obs = env.reset()
    returns, lengths, n_ended = np.zeros(8), np.zeros(8, dtype=int), {True: 0, False: 0}
    last_time = 0.0
    for _ in range(100):
        new_obs, rewards, dones, infos = env.step(np.ones(8, dtype=int))
        returns += rewards
        lengths += 1
        for index, info in enumerate(infos):
            assert ("terminal_observation" in info) == ("episode" in info) == dones[index]
            terminal = info.get("terminal_observation", new_obs[index])
            assert follows(obs[index], terminal)
            assert dones[index] == (has_fallen(terminal) or lengths[index] == 9)
            # EnvPool does not say whether those that fall with their last step have also fallen
            assert info["TimeLimit.truncated"] is bool(lengths[index] == 9)
            if dones[index]:
                n_ended[info["TimeLimit.truncated"]] += 1
                assert (info["episode"]["r"], info["episode"]["l"]) == (returns[index], lengths[index])
                assert info["episode"]["t"] >= last_time
                last_time = info["episode"]["t"]
                assert np.abs(new_obs[index]).max() <= 0.05
                returns[index] = lengths[index] = 0
        obs = new_obs
    assert n_ended[True] > 5 and n_ended[False] > 5


@pytest.mark.parametrize("task_id, limit", [(CART_POLE, 500), ("MountainCarContinuous-v0", 999), ("Pendulum-v1", 200)])
def test_the_time_limit_is_that_of_gymnasium_unless_there_is_another(task_id: str, limit: int):
    assert gym.spec(task_id).max_episode_steps == limit
    assert EnvPoolVecEnv(task_id, 1).get_attr("spec")[0].config.max_episode_steps == limit
    env = EnvPoolVecEnv("Pendulum-v1", 2, max_episode_steps=7)
    env.reset()
    dones = [env.step(np.zeros((2, 1)))[2].tolist() for _ in range(14)]
    assert dones == [[step in (6, 13)] * 2 for step in range(14)]


# A VecEnv --------------------------------------------------------------------------------------------------------------------


def test_what_was_returned_stays_as_it_is():
    env = EnvPoolVecEnv(CART_POLE, 3, max_episode_steps=4)
    returned: list[Any] = [env.reset()]
    returned += [env.step(np.zeros(3, dtype=int)) for _ in range(9)]
    arrays: list[np.ndarray] = [returned[0]]
    for obs, rewards, dones, infos in returned[1:]:
        arrays += [obs, rewards, dones, *(info["terminal_observation"] for info in infos if "terminal_observation" in info)]
    copies = [array.copy() for array in arrays]
    for _ in range(9):
        env.step(np.ones(3, dtype=int))
    env.reset()
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert not any(np.shares_memory(one, other) for one in arrays for other in arrays if one is not other)


def test_reset_begins_all_episodes_anew():
    env = EnvPoolVecEnv(CART_POLE, 4, max_episode_steps=6)
    first = env.reset()
    for _ in range(3):
        env.step(np.ones(4, dtype=int))
    second = env.reset()
    assert np.abs(second).max() <= 0.05 and not np.array_equal(first, second)
    lengths = []
    for _ in range(12):
        lengths += [info["episode"]["l"] for info in env.step(np.ones(4, dtype=int))[3] if "episode" in info]
    assert set(lengths) == {6}


def rollout(env: EnvPoolVecEnv) -> np.ndarray:
    observations = [env.reset()]
    for step in range(60):
        observations.append(env.step(np.full(env.num_envs, step % 2))[0])
    return np.array(observations)


def test_the_seed_is_that_of_the_pool():
    one = rollout(EnvPoolVecEnv(CART_POLE, 3, seed=1))
    again = EnvPoolVecEnv(CART_POLE, 3, seed=1)
    assert again.seed(5) == [None] * 3
    np.testing.assert_array_equal(rollout(again), one)
    assert not np.array_equal(rollout(EnvPoolVecEnv(CART_POLE, 3, seed=4)), one)
    # Environments get different ones, and none is repeated after a reset
    assert len(np.unique(one[0], axis=0)) == 3
    assert not np.array_equal(rollout(again), one)


def test_pools_of_different_seeds_have_no_environment_in_common():
    """Otherwise runs of seeds 0, 1, 2, ... see the same episodes, and are no independent samples."""
    starts = np.concatenate([EnvPoolVecEnv(CART_POLE, 8, seed=seed).reset() for seed in range(5)])
    assert len(np.unique(starts, axis=0)) == 40


def test_the_first_environments_do_not_depend_on_how_many_there_are():
    starts = [EnvPoolVecEnv(CART_POLE, n_envs, seed=3).reset() for n_envs in (2, 5)]
    np.testing.assert_array_equal(starts[0], starts[1][:2])


def test_any_number_of_threads_gives_the_same():
    np.testing.assert_array_equal(
        rollout(EnvPoolVecEnv(CART_POLE, 5, seed=1)), rollout(EnvPoolVecEnv(CART_POLE, 5, seed=1, num_threads=3))
    )


def test_attributes_are_those_of_the_pool():
    env = EnvPoolVecEnv(CART_POLE, 3)
    assert env.get_attr("spec") == [env.pool.spec] * 3
    assert env.get_attr("spec", indices=[0, 2]) == [env.pool.spec] * 2
    assert env.get_attr("render_mode") == [None] * 3
    with pytest.raises(AttributeError):
        env.get_attr("gravity")
    with pytest.raises(NotImplementedError, match="attributes could be set"):
        env.set_attr("gravity", 1.0)
    with pytest.raises(NotImplementedError, match="methods could be called"):
        env.env_method("render")
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(Monitor, indices=1) == [True]
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * 3
    env.close()


@pytest.mark.parametrize(
    "kwargs",
    [
        *(dict(n_envs=value) for value in (0, -1, 1.5, True, None, "2")),
        *(dict(seed=value) for value in (-1, 2**31, 0.5, None, [1, 2])),
        *(dict(num_threads=value) for value in (-1, 1.5, None)),
    ],
    ids=str,
)
def test_arguments_out_of_their_range_are_refused(kwargs: dict[str, Any]):
    """EnvPool ends the process for some of them, and asserts others without a word."""
    name, value = next(iter(kwargs.items()))
    with pytest.raises(ValueError, match=rf"{name} must be an integer .*, got {name}={re.escape(repr(value))}"):
        EnvPoolVecEnv(CART_POLE, **(dict(n_envs=2) | kwargs))


def test_integers_may_be_those_of_numpy():
    env = EnvPoolVecEnv(CART_POLE, np.int64(3), seed=np.int32(1), num_threads=np.int64(0))  # type: ignore[arg-type]
    np.testing.assert_array_equal(env.reset(), EnvPoolVecEnv(CART_POLE, 3, seed=1).reset())


@pytest.mark.parametrize(
    "kwargs",
    [dict(batch_size=4), dict(env_type="dm"), dict(num_envs=3), dict(env_seed=[1, 2]), dict(max_num_players=0)],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_options_that_make_another_kind_of_pool_are_refused(kwargs: dict[str, Any]):
    """One that is not synchronous, for instance, ends the process when some of its environments are stepped."""
    with pytest.raises(ValueError, match=rf"^{next(iter(kwargs))} is not an option of EnvPoolVecEnv"):
        EnvPoolVecEnv(CART_POLE, 8, **kwargs)


def test_other_options_are_those_of_the_task():
    env = EnvPoolVecEnv("FrozenLake-v1", 2, size=8)
    assert env.get_attr("spec")[0].config.size == 8
    with pytest.raises(TypeError, match="unexpected keyword argument 'gravity'"):
        EnvPoolVecEnv(CART_POLE, 2, gravity=1.0)


@pytest.mark.parametrize(
    "task_id, message",
    [
        ("LaneKeeping-v0", r"observations that are a single array, but LaneKeeping-v0 has the observation space Dict\("),
        ("SparrowMahjong-v1", "one player, but SparrowMahjong-v1 has 3"),
    ],
)
def test_tasks_that_are_not_supported_are_refused(task_id: str, message: str):
    with pytest.raises(ValueError, match=f"EnvPoolVecEnv supports {message}"):
        EnvPoolVecEnv(task_id, 2)


def test_a_task_that_is_not_known():
    with pytest.raises(AssertionError, match=r"NoTask-v0 is not supported, `envpool.list_all_envs\(\)` may help"):
        EnvPoolVecEnv("NoTask-v0", 2)


def test_spaces_are_those_of_envpool_where_those_of_gymnasium_do_not_fit(monkeypatch: pytest.MonkeyPatch):
    # Gymnasium has a tuple of three numbers
    env = EnvPoolVecEnv("Blackjack-v1", 3)
    assert isinstance(env.observation_space, gym.spaces.Box) and env.observation_space.shape == (3,)
    model = REINFORCE("MlpPolicy", env, seed=0, n_episodes=5, **SMALL).learn(50)
    assert model._n_updates >= 3

    def make(env_id: str) -> gym.Env:
        raise gym.error.DependencyNotInstalled("There is no box2d")

    monkeypatch.setattr(gym, "make", make)
    assert EnvPoolVecEnv(CART_POLE, 2).observation_space.shape == (4,)


# REINFORCE -------------------------------------------------------------------------------------------------------------------


class Spy:
    """Stands for a pool and writes down what is asked of it: ("reset" or "step", indices of environments)."""

    def __init__(self, pool: Any):
        self.pool = pool
        self.calls: list[tuple[str, list[int]]] = []

    def reset(self, env_ids: np.ndarray) -> Any:
        self.calls.append(("reset", env_ids.tolist()))
        return self.pool.reset(env_ids)

    def step(self, actions: np.ndarray, env_ids: np.ndarray) -> Any:
        self.calls.append(("step", env_ids.tolist()))
        return self.pool.step(actions, env_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)


def spied(n_envs: int, **kwargs: Any) -> tuple[EnvPoolVecEnv, Spy]:
    env = EnvPoolVecEnv(CART_POLE, n_envs, **kwargs)
    spy = env.pool = Spy(env.pool)
    return env, spy


def check_no_double_reset(calls: list[tuple[str, list[int]]], n_envs: int) -> None:
    """Between two resets of an environment it is stepped."""
    at_start = set()
    for what, env_ids in calls:
        if what == "reset":
            assert not at_start & set(env_ids)
            at_start |= set(env_ids)
        else:
            at_start -= set(env_ids)


class Batches(BaseCallback):
    """Checks that batches consist of whole episodes, and keeps the lengths of these."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[list[int]] = []
        self.idle_fractions: list[float] = []
        self.told: list[int] = []

    def _on_step(self) -> bool:
        self.told += [info["episode"]["l"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        observations = buffer.observations
        starts = np.flatnonzero(buffer.episode_starts)
        assert np.abs(observations[starts, -4:]).max() <= 0.05
        for step in set(range(1, len(observations))) - set(starts.tolist()):
            assert follows(observations[step - 1, -4:], observations[step, -4:])
        self.lengths.append(np.diff([*starts, len(observations)]).tolist())
        self.idle_fractions.append(self.model.logger.name_to_value["rollout/idle_fraction"])


@pytest.mark.parametrize("target", [dict(n_episodes=11), dict(n_episodes=2), dict(n_steps=30)])
def test_batches_are_of_whole_episodes_and_idle_members_are_left_alone(target: dict[str, int]):
    env, spy = spied(4, seed=3)
    batches = Batches()
    model = REINFORCE("MlpPolicy", env, seed=0, **target, **SMALL).learn(2000, callback=batches)
    assert len(batches.lengths) == model._n_updates >= 4
    for lengths in batches.lengths:
        if "n_episodes" in target:
            # Each member begins with one
            assert len(lengths) == max(4, target["n_episodes"])
        else:
            assert sum(lengths) >= 4 * 30
    assert sorted(batches.told) == sorted(length for lengths in batches.lengths for length in lengths)
    assert set(batches.idle_fractions) == {0.0}
    n_stepped = [len(env_ids) for what, env_ids in spy.calls if what == "step"]
    assert sum(n_stepped) == model.num_timesteps == sum(sum(lengths) for lengths in batches.lengths)
    assert 1 in n_stepped and max(n_stepped) == 4
    check_no_double_reset(spy.calls, 4)
    n_resets = sum(len(env_ids) for what, env_ids in spy.calls if what == "reset")
    assert n_resets == sum(len(lengths) for lengths in batches.lengths)


def test_learning_goes_on_from_call_to_call_without_a_reset_too_many():
    env, spy = spied(3, seed=3)
    batches = Batches()
    model = REINFORCE("MlpPolicy", env, seed=0, n_episodes=5, **SMALL)
    for _ in range(6):
        model.learn(1, callback=batches, reset_num_timesteps=False)
    check_no_double_reset(spy.calls, 3)
    other = REINFORCE("MlpPolicy", EnvPoolVecEnv(CART_POLE, 3, seed=3), seed=0, n_episodes=5, **SMALL)
    other.learn(model.num_timesteps)
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, other.policy.state_dict()[name])


def test_an_evaluation_between_two_calls_leaves_no_part_of_an_episode():
    """On the environment of the training, whose members are then anywhere."""
    env = EnvPoolVecEnv(CART_POLE, 3, seed=3)
    batches = Batches()
    model = REINFORCE("MlpPolicy", env, seed=0, n_episodes=5, **SMALL)
    for _ in range(4):
        model.learn(1, callback=batches, reset_num_timesteps=False)
        evaluate_policy(model, env, n_eval_episodes=4)
        for _ in range(5):
            env.step(np.ones(3, dtype=int))
    assert [len(lengths) for lengths in batches.lengths] == [5] * 4


@pytest.mark.parametrize("what", ["reset", "step"])
def test_a_callback_that_steps_the_environment_is_an_error(what: str):
    env = EnvPoolVecEnv(CART_POLE, 3)
    model = REINFORCE("MlpPolicy", env, n_episodes=5, **SMALL)

    def callback(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        if what == "reset":
            env.reset()
        else:
            env.step(np.ones(3, dtype=int))
        return True

    with pytest.raises(RuntimeError, match="A callback has stepped or reset the training environment"):
        model.learn(100, callback=callback)


@pytest.mark.parametrize("task_id", [CART_POLE, LANDER])
def test_training_can_be_repeated_from_the_start(task_id: str):
    models = []
    for seeds in ((0, 5), (0, 5), (0, 50), (1, 5)):
        env = EnvPoolVecEnv(task_id, 4, seed=seeds[1])
        models.append(REINFORCE("MlpPolicy", env, seed=seeds[0], n_episodes=6).learn(1500))
    states = [th.nn.utils.parameters_to_vector(model.policy.parameters()) for model in models]
    assert th.equal(states[0], states[1])
    assert models[0].num_timesteps == models[1].num_timesteps
    assert [(info["r"], info["l"]) for info in models[0].ep_info_buffer or ()] == [
        (info["r"], info["l"]) for info in models[1].ep_info_buffer or ()
    ]
    assert not th.equal(states[0], states[2]) and not th.equal(states[0], states[3])


def test_it_is_said_that_resuming_is_not_exact(capsys: pytest.CaptureFixture):
    for verbose in (1, 0):
        model = REINFORCE("MlpPolicy", EnvPoolVecEnv(CART_POLE, 2), seed=0, verbose=verbose, n_episodes=2, **SMALL)
        model.learn(1, log_interval=10**9).learn(1, log_interval=10**9)
        printed = capsys.readouterr().out
        assert printed.count("resumed from a file, will not be the same to the last bit") == verbose
        assert printed.count("EnvPoolVecEnv does not seed each episode") == verbose


def test_a_model_is_saved_and_goes_on(tmp_path: Path):
    """Also with another number of members; nothing of the pool is in the file."""
    model = REINFORCE("MlpPolicy", EnvPoolVecEnv(CART_POLE, 4), seed=0, n_episodes=6).learn(500)
    model.save(tmp_path / "model")
    observations = np.random.default_rng(0).normal(size=(9, 4))
    for n_envs in (4, 7):
        batches = Batches()
        loaded = REINFORCE.load(tmp_path / "model", env=EnvPoolVecEnv(CART_POLE, n_envs, seed=9))
        assert loaded.n_envs == n_envs and loaded.num_timesteps == model.num_timesteps
        chosen = [one.predict(observations, deterministic=True)[0] for one in (model, loaded)]
        np.testing.assert_array_equal(*chosen)
        loaded.learn(500, reset_num_timesteps=False, callback=batches)
        assert loaded._n_updates > model._n_updates
        assert [len(lengths) for lengths in batches.lengths] == [max(6, n_envs)] * len(batches.lengths)
    # On Gymnasium's environment as well
    REINFORCE.load(tmp_path / "model", env=CART_POLE).learn(100, reset_num_timesteps=False)


def test_workers_are_refused():
    with pytest.raises(ValueError, match="workers=2 cannot have the environment that was given"):
        REINFORCE("MlpPolicy", EnvPoolVecEnv(CART_POLE, 2), workers=2)


# Other algorithms, evaluations and wrappers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm, kwargs, n_timesteps",
    [(A2C, dict(n_steps=16), 12_000), (PPO, dict(n_steps=64), 6_000), (REINFORCE, dict(n_episodes=8), 10_000)],
)
def test_algorithms_learn(algorithm: Any, kwargs: dict[str, Any], n_timesteps: int):
    """On Gymnasium's environment, the return is then several times that of acting at random, which is 22."""
    model = algorithm("MlpPolicy", EnvPoolVecEnv(CART_POLE, 8, seed=0), seed=0, device="cpu", **kwargs)
    model.learn(n_timesteps)
    env = Monitor(gym.make(CART_POLE))
    env.reset(seed=0)
    assert evaluate_policy(model, env, n_eval_episodes=20)[0] > 80
    assert np.mean([info["r"] for info in model.ep_info_buffer]) > 40


def test_an_evaluation_is_that_of_whole_episodes_without_a_warning():
    model = REINFORCE("MlpPolicy", CART_POLE, seed=0, **SMALL)
    env = EnvPoolVecEnv(CART_POLE, 3, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        returns, lengths = evaluate_policy(model, env, n_eval_episodes=10, return_episode_rewards=True)
    assert returns == lengths and len(lengths) == 10 and min(lengths) >= 8


def test_evaluations_in_a_callback(tmp_path: Path):
    callback = EvalCallback(EnvPoolVecEnv(CART_POLE, 2, seed=7), log_path=str(tmp_path), eval_freq=60, verbose=0)
    model = REINFORCE("MlpPolicy", EnvPoolVecEnv(CART_POLE, 4, seed=0), seed=0, n_episodes=6, **SMALL)
    model.learn(1000, callback=callback)
    evaluations = np.load(tmp_path / "evaluations.npz")
    assert len(evaluations["timesteps"]) >= 3 and evaluations["results"].shape[1] == 5


@pytest.mark.parametrize("algorithm", [REINFORCE, A2C])
@pytest.mark.parametrize("name", ["VecNormalize", "VecFrameStack", "VecMonitor"])
def test_wrappers_of_sb3(name: str, algorithm: Any, tmp_path: Path):
    wrap = {
        "VecNormalize": lambda env: VecNormalize(env, norm_obs=False),
        "VecFrameStack": lambda env: VecFrameStack(env, 3),
        "VecMonitor": lambda env: VecMonitor(env, str(tmp_path / "monitor")),
    }[name]
    with warnings.catch_warnings():
        # VecMonitor says that there are statistics already
        warnings.simplefilter("ignore", UserWarning)
        env = wrap(EnvPoolVecEnv(CART_POLE, 3, seed=0))
    callback = None
    if algorithm is REINFORCE:
        callback = Batches()
    model = algorithm("MlpPolicy", env, seed=0, **(dict(n_episodes=5, **SMALL) if callback else dict(n_steps=9)))
    model.learn(1000, callback=callback)
    assert model.ep_info_buffer
    if callback is not None:
        assert [len(lengths) for lengths in callback.lengths] == [5] * model._n_updates
        # They count the steps of all members: idle ones are stepped along
        assert max(callback.idle_fractions) > 0
    env.close()


def test_normalized_rewards_are_those_of_all_members():
    """``VecNormalize`` keeps the statistics of A2C and of rollouts of REINFORCE alike."""
    env = VecNormalize(EnvPoolVecEnv("Pendulum-v1", 3, seed=0))
    REINFORCE("MlpPolicy", env, seed=0, n_episodes=4, normalize_observations=False, **SMALL).learn(3000)
    assert env.ret_rms.count >= 3000
    assert np.abs(env.obs_rms.mean).max() < 5 and (env.obs_rms.var > 0).all()
