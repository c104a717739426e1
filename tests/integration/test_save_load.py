"""Models, policies and parameters survive a round trip through a file, and what is no model of REINFORCE is refused."""

import io
import zipfile
from contextlib import closing
from copy import deepcopy
from inspect import signature

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_reinforce import REINFORCE, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from sb3_reinforce.policies import action_values_of
from tests.envs import RandomEnv, subproc
from tests.integration.common import (
    GRAY_IMAGE,
    OBSERVATIONS,
    PAIR,
    VECTOR,
    Batches,
    PlaceEnv,
    assert_same,
    assert_same_parameters,
    assert_stepped_as_asked,
    assert_whole,
    logged,
    place,
    random_env,
)

MIXED = spaces.Dict(vec=VECTOR, choice=spaces.Discrete(3))


class OwnBuffer(EpisodeRolloutBuffer):
    """A rollout buffer of the user's."""


class OwnPolicy(MlpPolicy):
    """A subclass of the policies here."""


CONFIGURATIONS = {
    "default": {},
    "quadratic_with_memory": dict(baseline="quadratic", baseline_memory=0.5),
    "linear": dict(baseline="linear", baseline_memory=0.0, normalize_observations=False),
    "few_units": dict(baseline="random_features", baseline_kwargs=dict(n_units=8, ridge=0.1)),
    "no_baseline": dict(baseline=None, bootstrap_timeouts=False),
    "gsde": dict(use_sde=True, policy_kwargs=dict(full_std=False, squash_output=True)),
    "n_episodes": dict(n_steps=None, n_episodes=5),
    "conjugate_gradients": dict(target_kl=0.05, cg_max_steps=2, cg_damping=3.0),
    "optimizer": dict(target_kl=None, learning_rate=1e-2),
    "separate_features": dict(normalize_observations=True, policy_kwargs=dict(share_features_extractor=False)),
    "own_buffer": dict(rollout_buffer_class=OwnBuffer),
    "own_policy": dict(policy=OwnPolicy),
    "policy_of_sb3": dict(policy=ActorCriticPolicy),
    "policy_of_sb3_with_action_values": dict(policy=ActorCriticPolicy, advantage="q"),
    "q": dict(advantage="q", baseline="quadratic"),
    "advantage": dict(advantage="advantage", action_space=spaces.Discrete(3)),
    "td": dict(advantage="td"),
    "few_projections": dict(advantage="q", baseline_kwargs=dict(n_units=200)),
    "gsde_with_action_values": dict(advantage="q", use_sde=True, policy_kwargs=dict(squash_output=True)),
    "discrete": dict(action_space=spaces.Discrete(3)),
    "rmsprop": dict(target_kl=None, policy_kwargs=dict(optimizer_class=th.optim.RMSprop, optimizer_kwargs=dict(alpha=0.9))),
}
every_configuration = pytest.mark.parametrize(
    "kwargs", [pytest.param(kwargs, id=name) for name, kwargs in CONFIGURATIONS.items()]
)


def make_model(n_envs=1, policy="MlpPolicy", action_space=PAIR, **kwargs):
    env = random_env(n_envs, action_space=action_space)
    return REINFORCE(policy, env, **(dict(n_steps=16, seed=3) | kwargs))


#: Statistics, a memory and the state of an optimizer: much to lose
MUCH = dict(normalize_observations=True, baseline_memory=0.5, target_kl=None, learning_rate=1e-2)


@pytest.fixture
def trained():
    return make_model(**MUCH).learn(50)


# Models


@pytest.mark.parametrize("kind", ["str", "str_with_suffix", "path", "bytes_io", "file"])
def test_a_model_is_saved_to_and_loaded_from_every_kind_of_place(trained, tmp_path, kind):
    place = {
        "str": str(tmp_path / "model"),
        "str_with_suffix": str(tmp_path / "model.zip"),
        "path": tmp_path / "model",
        "bytes_io": io.BytesIO(),
    }
    if kind == "file":
        with open(tmp_path / "model", "wb") as file:
            trained.save(file)
        with open(tmp_path / "model", "rb") as file:
            loaded = REINFORCE.load(file)
    else:
        trained.save(place[kind])
        loaded = REINFORCE.load(place[kind])
    assert_same_parameters(trained, loaded)


def assert_predicts_the_same(model, other, observations=OBSERVATIONS):
    for deterministic in (True, False):
        chosen = []
        for one in (model, other):
            th.manual_seed(0)
            if getattr(one, "use_sde", False):
                one.policy.reset_noise()
            chosen.append(one.predict(observations, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*chosen)
    policies = [getattr(one, "policy", one) for one in (model, other)]
    with th.no_grad():
        values = [policy.predict_values(policy.obs_to_tensor(observations)[0]) for policy in policies]
    assert th.equal(*values)


@every_configuration
def test_a_loaded_model_is_the_one_that_was_saved(tmp_path, kwargs):
    model = make_model(**kwargs).learn(50)
    # Otherwise there is little to lose
    assert model._n_updates >= 2
    assert bool(model.policy.optimizer.state_dict()["state"]) == (model.target_kl is None)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model")
    assert_same_parameters(model, loaded)
    assert_predicts_the_same(model, loaded)


@pytest.mark.parametrize(
    "policy, observation_space",
    [pytest.param("CnnPolicy", GRAY_IMAGE, id="image"), pytest.param("MultiInputPolicy", MIXED, id="dict")],
)
@pytest.mark.parametrize("share_features_extractor, advantage", [(True, "monte_carlo"), (False, "monte_carlo"), (True, "q")])
def test_a_loaded_model_of_images_or_dictionaries_is_the_one_that_was_saved(
    tmp_path, policy, observation_space, share_features_extractor, advantage
):
    def make_env():
        return random_env(observation_space=observation_space)

    kwargs = dict(share_features_extractor=share_features_extractor)
    model = REINFORCE(policy, make_env(), n_steps=8, seed=0, policy_kwargs=kwargs, advantage=advantage).learn(20)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=make_env())
    assert_same_parameters(model, loaded)
    assert_predicts_the_same(model, loaded, make_env().reset())
    for one in (model, loaded):
        one.learn(20, reset_num_timesteps=False)
    assert_same_parameters(model, loaded)


def test_a_model_file_has_the_observation_statistics_and_the_memory_of_the_baseline(trained, tmp_path):
    trained.save(tmp_path / "model")
    policy = REINFORCE.load(tmp_path / "model").policy
    assert policy.observation_normalizer.count_0 == trained.policy.observation_normalizer.count_0 > 50
    assert th.equal(policy.observation_normalizer.mean_0, trained.policy.observation_normalizer.mean_0)
    assert policy.value_net.count == trained.policy.value_net.count > 16
    assert th.equal(policy.value_net.scatter, trained.policy.value_net.scatter)


@pytest.mark.parametrize("given", [None, False], ids=str)
@pytest.mark.parametrize("policy", ["MlpPolicy", OwnPolicy, ActorCriticPolicy])
def test_a_model_file_says_whether_observations_are_normalized(tmp_path, policy, given):
    """None, the default, is decided once: the model says True or False from then on."""
    kwargs = dict(n_steps=16, normalize_observations=given)
    model = REINFORCE(policy, random_env(), **kwargs).learn(50)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=random_env())
    expected = given is None and policy is not ActorCriticPolicy
    for one in (model, loaded, loaded.learn(50)):
        assert one.normalize_observations is expected
        assert hasattr(one.policy, "observation_normalizer") == expected
    assert REINFORCE(policy, None, _init_setup_model=False, **kwargs).normalize_observations is expected


def test_a_model_file_has_all_arguments_and_counters(tmp_path):
    given = dict(
        n_steps=None,
        n_episodes=4,
        gamma=0.9,
        learning_rate=0.005,
        ent_coef=0.01,
        target_kl=0.02,
        cg_max_steps=3,
        cg_damping=0.7,
        use_sde=True,
        sde_sample_freq=3,
        rollout_buffer_class=OwnBuffer,
        normalize_advantage=False,
        max_episode_steps=100,
        advantage="advantage",
        baseline="quadratic",
        baseline_memory=0.25,
        baseline_kwargs=dict(ridge=0.5),
        bootstrap_timeouts=False,
        normalize_observations=False,
        tensorboard_log=str(tmp_path / "tensorboard"),
        policy_kwargs=dict(net_arch=[5]),
        verbose=1,
        seed=11,
        episode_timeout=60.0,
    )
    parameters = signature(REINFORCE).parameters
    # Where a run goes on, there may be other workers
    others = {"policy", "env", "workers", "rollout_buffer_kwargs", "stats_window_size", "device", "_init_setup_model"}
    assert given.keys() == parameters.keys() - others
    assert [name for name, value in given.items() if value == parameters[name].default] == ["n_steps"]
    model = REINFORCE("MlpPolicy", RandomEnv(VECTOR, PAIR, 7), stats_window_size=7, **given).learn(50)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model")
    for name, value in given.items():
        assert getattr(loaded, name) == getattr(model, name) == value, name
    for name in ("num_timesteps", "_n_updates", "_next_episode"):
        assert getattr(loaded, name) == getattr(model, name) > 0, name
    assert loaded._stats_window_size == 7
    assert loaded.rollout_buffer.gamma == 0.9
    assert loaded.lr_schedule(0.5) == 5e-3


@pytest.mark.parametrize("advantage", ["monte_carlo", "q", "advantage", "td"])
def test_a_model_file_has_the_advantage_function_and_its_critics(tmp_path, advantage):
    """Only those that it uses, as they were fitted."""
    make_model(advantage=advantage, baseline_memory=0.5).learn(50).save(tmp_path / "model")
    model = REINFORCE.load(tmp_path / "model")
    assert model.advantage == advantage
    assert model.policy.value_net.count > 16
    critic = action_values_of(model.policy)
    assert (critic is not None) == (advantage in ("q", "advantage"))
    if critic is not None:
        assert critic.linear.count == model.policy.value_net.count
        assert critic.linear.weight.any()


SCHEDULES = [
    pytest.param(dict(target_kl=LinearSchedule(0.05, 0.001, 0.9)), id="target_kl_linear"),
    pytest.param(dict(target_kl=lambda progress: 0.05 * progress), id="target_kl_lambda"),
    pytest.param(dict(target_kl=None, learning_rate=LinearSchedule(0.05, 0.001, 0.9)), id="learning_rate_linear"),
    pytest.param(dict(target_kl=None, learning_rate=lambda progress: 0.05 * progress), id="learning_rate_lambda"),
]


@pytest.mark.parametrize("kwargs", SCHEDULES)
def test_a_model_file_has_schedules(tmp_path, kwargs):
    make_model(**kwargs).learn(50).save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model")
    name, schedule = list(kwargs.items())[-1]
    for progress in (1.0, 0.5, 0.0):
        assert getattr(loaded, name)(progress) == schedule(progress)


@pytest.mark.parametrize("kwargs", SCHEDULES)
def test_a_loaded_model_goes_on_where_its_schedule_was(tmp_path, kwargs):
    """Saved before its fourth batch, it goes on for as many steps as were left."""

    class Save(BaseCallback):
        def _on_rollout_start(self):
            if self.model._n_updates == 3:
                self.model.save(tmp_path / "model")

        def _on_step(self):
            return True

    whole = make_model(**kwargs).learn(200, callback=Save())
    resumed = REINFORCE.load(tmp_path / "model", env=random_env())
    assert resumed._n_updates == 3 < whole._n_updates - 3
    resumed.learn(200 - resumed.num_timesteps, reset_num_timesteps=False)
    assert_same_parameters(resumed, whole)
    name = "train/kl_divergence_loss"
    assert logged(resumed, name) == logged(whole, name) > 0


def test_a_loaded_model_may_go_on_with_the_other_kind_of_step(tmp_path):
    make_model().learn(50).save(tmp_path / "model")
    model = REINFORCE.load(tmp_path / "model", env=random_env(), target_kl=None, learning_rate=1e-2)
    model.learn(50, reset_num_timesteps=False)
    assert model.policy.optimizer.state_dict()["state"] and logged(model, "train/learning_rate") == 1e-2
    model.save(tmp_path / "model")
    model = REINFORCE.load(tmp_path / "model", env=random_env(), target_kl=0.02)
    before = deepcopy(model.policy.optimizer.state_dict())
    model.learn(50, reset_num_timesteps=False)
    assert_stepped_as_asked(model)
    # It stays for a third change
    assert_same(before, model.policy.optimizer.state_dict())


@pytest.mark.parametrize("n_envs", [1, 3])
@every_configuration
def test_a_loaded_model_learns_on_as_if_it_had_never_been_saved(tmp_path, kwargs, n_envs):
    whole = make_model(n_envs, **kwargs).learn(200)
    half = make_model(n_envs, **kwargs).learn(50)
    half.save(tmp_path / "model")
    env = random_env(n_envs, action_space=kwargs.get("action_space", PAIR))
    resumed = REINFORCE.load(tmp_path / "model", env=env)
    resumed.learn(200 - half.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    assert resumed._n_updates == whole._n_updates > half._n_updates
    assert resumed._next_episode == whole._next_episode
    assert_same_parameters(resumed, whole)
    np.testing.assert_array_equal(resumed.rollout_buffer.actions, whole.rollout_buffer.actions)


def make_cartpole_model(n_envs=2, **kwargs):
    env = make_vec_env("CartPole-v1", n_envs=n_envs)
    return REINFORCE("MlpPolicy", env, **(dict(n_steps=50, seed=0) | kwargs))


@pytest.mark.parametrize("moment", ["_on_rollout_start", "_on_step", "_on_rollout_end"])
def test_a_model_saved_by_a_callback_goes_on_from_the_beginning_of_that_rollout(tmp_path, moment):
    class Save(BaseCallback):
        """In the third rollout."""

        def _on_step(self):
            return True

    def save(callback):
        model = callback.model
        if model._n_updates == 2 and not (tmp_path / "model.zip").exists():
            # Somewhere within episodes
            if moment != "_on_step" or callback.locals["n_steps"] == 17:
                model.save(tmp_path / "model")
        return True

    setattr(Save, moment, save)
    batches = Batches()
    whole = make_cartpole_model().learn(500, callback=[batches, Save()])
    resumed, resumed_batches = REINFORCE.load(tmp_path / "model", env=make_vec_env("CartPole-v1", n_envs=2)), Batches()
    assert resumed._n_updates == 2 < whole._n_updates
    while resumed._n_updates < whole._n_updates:
        resumed.learn(1, reset_num_timesteps=False, callback=resumed_batches)
    assert_same_parameters(resumed, whole)
    np.testing.assert_array_equal(resumed_batches.batches[0]["observations"], batches.batches[2]["observations"])


def test_a_model_saved_within_an_episode_goes_on_with_whole_episodes_in_processes(tmp_path):
    batches, env_fns = Batches(), [lambda index=index: PlaceEnv(index) for index in range(2)]

    def save(locals_, globals_):
        if locals_["n_steps"] == 7:
            locals_["self"].save(tmp_path / "model")
        return True

    with closing(subproc(env_fns)) as env:
        REINFORCE("MlpPolicy", env, n_steps=20, seed=0).learn(1, callback=save)
    with closing(subproc(env_fns)) as env:
        REINFORCE.load(tmp_path / "model", env=env).learn(100, callback=batches, reset_num_timesteps=False)
    assert_whole(batches.episodes(place))


def test_a_loaded_model_goes_on_counting_steps_and_updates(trained, tmp_path):
    trained.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=random_env())
    steps, updates = loaded.num_timesteps, loaded._n_updates
    loaded.learn(1, reset_num_timesteps=False)
    assert loaded.num_timesteps > steps
    assert loaded._n_updates == updates + 1
    loaded.learn(1)
    assert loaded.num_timesteps < steps
    assert loaded._n_updates == updates + 2


def test_vec_normalize_and_the_model_are_saved_side_by_side(tmp_path):
    model = REINFORCE("MlpPolicy", VecNormalize(random_env()), n_steps=16, seed=0).learn(50)
    model.save(tmp_path / "model")
    model.get_vec_normalize_env().save(tmp_path / "statistics.pkl")
    env = VecNormalize.load(tmp_path / "statistics.pkl", random_env())
    loaded = REINFORCE.load(tmp_path / "model", env=env)
    assert loaded.get_vec_normalize_env() is env
    np.testing.assert_array_equal(env.obs_rms.mean, model.get_vec_normalize_env().obs_rms.mean)
    assert loaded.learn(1, reset_num_timesteps=False)._n_updates == model._n_updates + 1


# Environments of loaded models


@pytest.mark.parametrize(
    "make_env",
    [
        pytest.param(lambda: "CartPole-v1", id="id"),
        pytest.param(lambda: gym.spec("CartPole-v1"), id="spec"),
        pytest.param(lambda: lambda: gym.make("CartPole-v1"), id="callable"),
        pytest.param(lambda: gym.make("CartPole-v1"), id="environment"),
        pytest.param(lambda: DummyVecEnv([lambda: gym.make("CartPole-v1")]), id="dummy_vec_env"),
        pytest.param(lambda: EpisodeVecEnv([lambda: gym.make("CartPole-v1")]), id="episode_vec_env"),
    ],
)
def test_a_loaded_model_goes_on_in_whatever_its_environment_is_given_as(tmp_path, make_env):
    whole = make_cartpole_model(n_envs=1).learn(100)
    whole.save(tmp_path / "model")
    whole.learn(100, reset_num_timesteps=False)
    by_load = REINFORCE.load(tmp_path / "model", env=make_env())
    by_set_env = REINFORCE.load(tmp_path / "model")
    by_set_env.set_env(make_env())
    for loaded in (by_load, by_set_env):
        assert type(loaded.get_env()) is EpisodeVecEnv
        loaded.learn(100, reset_num_timesteps=False)
        assert_same_parameters(loaded, whole)


@pytest.mark.parametrize("n_envs", [1, 4])
def test_a_loaded_model_may_have_another_number_of_environments(tmp_path, n_envs):
    make_model(n_envs=2).learn(50).save(tmp_path / "model")
    model = REINFORCE.load(tmp_path / "model", env=random_env(n_envs))
    assert model.n_envs == n_envs
    model.learn(50, reset_num_timesteps=False)
    assert len(model.rollout_buffer.rewards) >= 16 * n_envs


def test_a_loaded_model_may_go_on_in_processes(tmp_path):
    make_model().learn(50).save(tmp_path / "model")
    with closing(subproc([lambda: RandomEnv(VECTOR, PAIR, 7)] * 2)) as env:
        model = REINFORCE.load(tmp_path / "model", env=env).learn(100)
    assert model._n_updates >= 4


def test_without_an_environment_a_model_predicts_but_does_not_learn_until_one_is_set(tmp_path):
    make_model(n_envs=2).learn(50).save(tmp_path / "model")
    model = REINFORCE.load(tmp_path / "model")
    assert model.get_env() is None
    assert model.predict(OBSERVATIONS)[0].shape == (10, 2)
    updates = model._n_updates
    with pytest.raises(ValueError, match="no environment to learn from"):
        model.learn(1)
    model.set_env(random_env(2))
    model.learn(1)
    assert model._n_updates == updates + 1


def test_a_loaded_model_is_evaluated_on_an_environment_of_gymnasium(tmp_path):
    make_cartpole_model(n_envs=1).learn(1).save(tmp_path / "model")
    returns, _ = evaluate_policy(REINFORCE.load(tmp_path / "model"), gym.make("CartPole-v1"), n_eval_episodes=2, warn=False)
    assert 1 <= returns <= 500


def test_set_env_wants_the_same_number_of_environments(trained):
    with pytest.raises(AssertionError, match="number of environments"):
        trained.set_env(random_env(2))


def test_set_env_starts_whole_episodes_in_the_new_environment():
    batches, other = Batches(), PlaceEnv(1)
    model = REINFORCE("MlpPolicy", PlaceEnv(0), n_steps=20, seed=0).learn(50, callback=batches)
    model.set_env(other)
    model.learn(50, reset_num_timesteps=False, callback=batches)
    assert model.get_env().envs[0].unwrapped is other
    assert_whole(batches.episodes(place))
    assert [episode[0, 0] for episode in batches.episodes(place)][-1] == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(dict(action_space=spaces.Discrete(2)), id="other_kind_of_action"),
        pytest.param(dict(action_space=spaces.Box(-1, 1, (3,))), id="other_shape_of_action"),
        pytest.param(dict(action_space=spaces.Box(-2, 2, (2,))), id="other_bounds_of_action"),
        pytest.param(dict(observation_space=spaces.Box(-1, 1, (4,))), id="other_observation"),
    ],
)
def test_environments_of_other_spaces_are_refused(trained, tmp_path, other):
    trained.save(tmp_path / "model")
    env = trained.get_env()
    with pytest.raises(ValueError, match="spaces do not match"):
        REINFORCE.load(tmp_path / "model", env=random_env(**other))
    with pytest.raises(ValueError, match="spaces do not match"):
        trained.set_env(random_env(**other))
    assert trained.get_env() is env


@pytest.mark.parametrize("force_reset", [True, False])
def test_force_reset_decides_whether_the_last_observation_is_kept(trained, tmp_path, force_reset):
    trained.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=random_env(), force_reset=force_reset)
    assert (loaded._last_obs is None) == force_reset
    trained.learn(1, reset_num_timesteps=False)
    loaded.learn(1, reset_num_timesteps=False)
    assert_same_parameters(trained, loaded)


# What is saved and what is loaded can be chosen


def test_what_is_excluded_is_not_saved_unless_it_is_included(tmp_path):
    model = make_model(stats_window_size=7)
    model.note = "kept"
    model.save(tmp_path / "without", exclude=["_stats_window_size", "note"])
    loaded = REINFORCE.load(tmp_path / "without")
    assert loaded._stats_window_size == 100
    assert not hasattr(loaded, "note")
    model.save(tmp_path / "with", exclude=["_stats_window_size", "note"], include=["note"])
    assert REINFORCE.load(tmp_path / "with").note == "kept"


@pytest.mark.parametrize("name", ["max_episode_steps", "n_steps", "seed", "normalize_observations"])
def test_what_is_excluded_has_its_default_in_a_loaded_model(tmp_path, name):
    model = make_model(normalize_observations=True)
    model.save(tmp_path / "model", exclude=[name])
    loaded = REINFORCE.load(tmp_path / "model", env=random_env())
    default = REINFORCE("MlpPolicy", random_env())
    assert getattr(loaded, name) == getattr(default, name)


def test_the_rollout_buffer_is_not_saved(trained, tmp_path):
    trained.save(tmp_path / "model")
    assert not REINFORCE.load(tmp_path / "model").rollout_buffer.full


def test_custom_objects_take_the_place_of_what_was_saved(tmp_path):
    make_model(learning_rate=lambda _: 1e-3, target_kl=lambda _: 1e-3).save(tmp_path / "model")
    objects = dict(learning_rate=0.5, target_kl=0.05)
    loaded = REINFORCE.load(tmp_path / "model", env=random_env(), custom_objects=objects).learn(1)
    assert logged(loaded, "train/kl_divergence_loss") == pytest.approx(0.05, rel=1e-3)
    objects["target_kl"] = None
    loaded = REINFORCE.load(tmp_path / "model", env=random_env(), custom_objects=objects).learn(1)
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 0.5


def test_a_limit_among_the_custom_objects_holds(tmp_path):
    REINFORCE("MlpPolicy", "Pendulum-v1", n_steps=20, max_episode_steps=9, seed=0).save(tmp_path / "model")
    model = REINFORCE.load(tmp_path / "model", env="Pendulum-v1", custom_objects=dict(max_episode_steps=5))
    assert model.max_episode_steps == 5
    model.learn(1)
    assert {info["l"] for info in model.ep_info_buffer} == {5}


def test_a_policy_can_be_copied_in_memory(trained, tmp_path):
    save_to_pkl(tmp_path / "policy.pkl", trained.policy)
    for policy in (deepcopy(trained.policy), load_from_pkl(tmp_path / "policy.pkl")):
        assert_same(dict(policy.state_dict()), dict(trained.policy.state_dict()))


def test_compiled_policies_learn_and_are_saved(tmp_path):
    model = make_model(normalize_observations=True)
    # The eager back-end compiles nothing, but wraps the policy in the same way
    model.policy = th.compile(model.policy, backend="eager")
    model.learn(1)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model")
    np.testing.assert_array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (model, loaded)))


# Arguments of load()


@pytest.fixture
def path(trained, tmp_path):
    trained.save(tmp_path / "model")
    return tmp_path / "model"


def test_arguments_of_load_change_the_model(path):
    kwargs = dict(n_steps=40, gamma=0.5, learning_rate=0.25, ent_coef=0.1, bootstrap_timeouts=False)
    model = REINFORCE.load(path, env=random_env(), **kwargs)
    for name, value in kwargs.items():
        assert getattr(model, name) == value
    model.learn(1)
    assert len(model.rollout_buffer.rewards) >= 40
    assert model.rollout_buffer.gamma == 0.5
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("change", [{}, dict(cg_max_steps=1), dict(cg_damping=10.0), dict(target_kl=0.1)], ids=str)
def test_arguments_of_load_change_the_step(path, change):
    kwargs = dict(target_kl=0.05, cg_max_steps=10, cg_damping=0.01)
    first, second = (REINFORCE.load(path, env=random_env(), **chosen).learn(1) for chosen in (kwargs, kwargs | change))
    assert_stepped_as_asked(second)
    assert th.equal(first.policy.action_net.weight, second.policy.action_net.weight) == (not change)


def test_arguments_of_load_can_change_from_steps_to_episodes(path):
    model = REINFORCE.load(path, env=random_env(), n_steps=None, n_episodes=6).learn(1)
    assert model.rollout_buffer.episode_starts.sum() == 6


def test_another_seed_given_to_load_takes_effect(path):
    same, other = (REINFORCE.load(path, env=random_env(), seed=seed).learn(1) for seed in (3, 4))
    again = REINFORCE.load(path, env=random_env()).learn(1)
    assert_same_parameters(same, again)
    assert not th.equal(same.policy.action_net.weight, other.policy.action_net.weight)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(n_steps=0),
        dict(n_episodes=3),
        dict(gamma=1.5),
        dict(ent_coef=-1),
        dict(learning_rate=-1e-3),
        dict(target_kl=0),
        dict(cg_max_steps=0),
        dict(cg_damping=0),
        dict(max_episode_steps=0),
        dict(advantage="gae"),
        dict(baseline="cubic"),
        dict(baseline_memory=1.0),
        dict(rollout_buffer_class=dict),
    ],
    ids=str,
)
def test_arguments_of_load_that_are_out_of_range_are_refused_by_name(path, kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=name):
        REINFORCE.load(path, **kwargs)


misfits = pytest.mark.parametrize(
    "kwargs",
    [
        dict(advantage="q"),
        dict(advantage="td"),
        dict(baseline="quadratic"),
        dict(normalize_observations=False),
        dict(baseline_memory=0.0),
        dict(baseline_kwargs=dict(ridge=0.5)),
    ],
    ids=str,
)


@misfits
def test_arguments_of_load_that_do_not_fit_the_saved_parameters_are_refused_by_name(path, kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"{name}=.* cannot be given to a model that was saved with {name}="):
        REINFORCE.load(path, **kwargs)


@misfits
def test_custom_objects_that_do_not_fit_the_saved_parameters_are_refused_by_name(path, kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=f"{name}=.* cannot be given to a model that was saved with {name}="):
        REINFORCE.load(path, custom_objects=kwargs)


def test_other_policy_kwargs_given_to_load_are_refused(path):
    with pytest.raises(ValueError, match="policy kwargs do not equal the stored policy kwargs"):
        REINFORCE.load(path, policy_kwargs=dict(net_arch=[3]))


# Files that are no model


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        REINFORCE.load(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18)], ids=["empty", "text", "empty_zip"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.zip is no complete model file"):
        REINFORCE.load(tmp_path / "model.zip")


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo.png", b"...")
    with pytest.raises(ValueError, match=r"photos\.zip is no complete model file"):
        REINFORCE.load(tmp_path / "photos.zip")


def test_a_file_of_a_policy_alone_is_refused(trained, tmp_path):
    trained.policy.save(tmp_path / "policy.zip")
    with pytest.raises(ValueError, match=r"policy\.zip is no complete model file"):
        REINFORCE.load(tmp_path / "policy.zip")


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_refused(trained, tmp_path, fraction):
    trained.save(tmp_path / "model.zip")
    content = (tmp_path / "model.zip").read_bytes()
    (tmp_path / "model.zip").write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match=r"model\.zip is no complete model file"):
        REINFORCE.load(tmp_path / "model.zip")


PARTS = ["data", "policy.pth", "policy.optimizer.pth"]


@pytest.mark.parametrize("part", PARTS)
def test_a_file_of_which_a_part_is_missing_is_refused(trained, tmp_path, part):
    trained.save(tmp_path / "whole.zip")
    with zipfile.ZipFile(tmp_path / "whole.zip") as whole, zipfile.ZipFile(tmp_path / "model.zip", "w") as partial:
        for name in whole.namelist():
            if name != part:
                partial.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match=r"model\.zip"):
        REINFORCE.load(tmp_path / "model.zip")


@pytest.mark.parametrize("part", PARTS)
def test_a_file_of_which_a_part_is_damaged_is_refused(trained, tmp_path, part):
    trained.save(tmp_path / "model.zip")
    content = bytearray((tmp_path / "model.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        info = archive.getinfo(part)
    content[info.header_offset + info.compress_size // 2] ^= 0xFF
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.zip"):
        REINFORCE.load(tmp_path / "model.zip")


def test_a_file_with_any_byte_flipped_is_loaded_as_it_was_saved_or_refused_by_name(tmp_path):
    model = make_model(baseline="linear", policy_kwargs=dict(net_arch=[2])).learn(20)
    model.save(tmp_path / "model.zip")
    content = (tmp_path / "model.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        # Where the zip format says what is what: the header of the policy, and the list of all parts at the end
        headers = archive.getinfo("policy.pth").header_offset, archive.start_dir
    positions = np.random.default_rng(0).integers(len(content), size=100).tolist()
    positions += [
        *range(headers[0], headers[0] + 64),
        *range(headers[1], headers[1] + 64),
        *range(len(content) - 22, len(content)),
    ]
    outcomes = {}
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        (tmp_path / "model.zip").write_bytes(flipped)
        try:
            loaded = REINFORCE.load(tmp_path / "model.zip")
        except Exception as error:
            if not (isinstance(error, ValueError) and "model.zip" in str(error)):
                outcomes[position] = repr(error)
        else:
            assert_same_parameters(model, loaded)
    assert outcomes == {}


@pytest.mark.parametrize("algorithm", [A2C, PPO])
def test_a_model_of_another_algorithm_is_refused(tmp_path, algorithm):
    algorithm("MlpPolicy", random_env()).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model holds a model of another algorithm.* its policy from stable_baselines3"):
        REINFORCE.load(tmp_path / "model")


def test_a_stream_of_another_algorithm_is_refused_and_stays_open():
    stream = io.BytesIO()
    A2C("MlpPolicy", random_env()).save(stream)
    with pytest.raises(ValueError, match="another algorithm"):
        REINFORCE.load(stream)
    assert not stream.closed


# Parameters


def make_other():
    return make_model(**MUCH, seed=8)


def test_parameters_of_one_model_make_another_act_like_it(trained):
    other = make_other()
    assert not np.array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (trained, other)))
    other.set_parameters(trained.get_parameters())
    assert_same_parameters(trained, other)
    np.testing.assert_array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (trained, other)))


@pytest.mark.parametrize("as_text", [True, False])
def test_parameters_can_be_taken_from_a_file(trained, tmp_path, as_text):
    trained.save(tmp_path / "model.zip")
    other = make_other()
    other.set_parameters(str(tmp_path / "model") if as_text else tmp_path / "model.zip")
    assert_same_parameters(trained, other)


def test_parameters_can_be_set_in_part_without_exact_match(trained):
    bias = th.tensor([0.25, -0.25])
    before = deepcopy(trained.get_parameters())
    trained.set_parameters({"policy": {"action_net.bias": bias}}, exact_match=False)
    assert th.equal(trained.policy.action_net.bias.detach(), bias)
    before["policy"]["action_net.bias"] = bias
    assert_same(dict(before), dict(trained.get_parameters()))


@pytest.mark.parametrize("exact_match", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda parameters: parameters.update(nonsense={}), id="unknown_object"),
        pytest.param(lambda parameters: parameters["policy"].update({"log_std": th.zeros(9)}), id="wrong_shape"),
        pytest.param(lambda parameters: parameters.update({"policy.optimizer": {}}), id="empty_optimizer"),
        pytest.param(
            lambda parameters: parameters["policy.optimizer"]["param_groups"][0].update(params=[0]), id="other_optimizer"
        ),
    ],
)
def test_wrong_parameters_are_refused_and_change_nothing(trained, spoil, exact_match):
    before = deepcopy(trained.get_parameters())
    # All others are right, and different from the model's own
    wrong = deepcopy(make_other().learn(20).get_parameters())
    spoil(wrong)
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        trained.set_parameters(wrong, exact_match=exact_match)
    assert_same(dict(before), dict(trained.get_parameters()))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda parameters: parameters.pop("policy"), id="no_policy"),
        pytest.param(lambda parameters: parameters.pop("policy.optimizer"), id="no_optimizer"),
        pytest.param(lambda parameters: parameters["policy"].pop("log_std"), id="parameter_missing"),
        pytest.param(lambda parameters: parameters["policy"].update(surplus=th.zeros(1)), id="parameter_unknown"),
    ],
)
def test_incomplete_parameters_are_no_exact_match(trained, spoil):
    before = deepcopy(trained.get_parameters())
    wrong = deepcopy(make_other().learn(20).get_parameters())
    spoil(wrong)
    with pytest.raises((ValueError, RuntimeError)):
        trained.set_parameters(wrong)
    assert_same(dict(before), dict(trained.get_parameters()))
    trained.set_parameters(wrong, exact_match=False)
    assert th.equal(trained.policy.action_net.weight, wrong.get("policy", before["policy"])["action_net.weight"])


def test_parameters_of_another_algorithm_are_refused_and_change_nothing(trained, tmp_path):
    A2C("MlpPolicy", random_env()).save(tmp_path / "a2c")
    before = deepcopy(trained.get_parameters())
    with pytest.raises((ValueError, RuntimeError)):
        trained.set_parameters(str(tmp_path / "a2c"))
    assert_same(dict(before), dict(trained.get_parameters()))


def test_parameters_that_were_refused_do_not_disturb_learning():
    models = [make_model().learn(20) for _ in range(2)]
    with pytest.raises(ValueError, match="nonsense"):
        models[0].set_parameters({**make_model(seed=8).get_parameters(), "nonsense": {}})
    for model in models:
        model.learn(50, reset_num_timesteps=False)
    assert_same_parameters(*models)


# Policies alone


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param(kwargs, id=name)
        for name, kwargs in CONFIGURATIONS.items()
        if name not in ("policy_of_sb3", "policy_of_sb3_with_action_values", "own_buffer", "n_episodes")
    ],
)
def test_a_policy_saved_alone_acts_and_predicts_values_as_before(tmp_path, kwargs):
    policy = make_model(**kwargs).learn(50).policy
    policy.save(tmp_path / "policy.pth")
    loaded = type(policy).load(tmp_path / "policy.pth")
    assert_same(dict(policy.state_dict()), dict(loaded.state_dict()))
    np.testing.assert_array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (policy, loaded)))
    with th.no_grad():
        assert th.equal(*(one.predict_values(th.as_tensor(OBSERVATIONS)) for one in (policy, loaded)))


@pytest.mark.parametrize(
    "policy_class, observation_space",
    [
        pytest.param(CnnPolicy, spaces.Box(0, 255, (1, 36, 36), np.uint8), id="image"),
        pytest.param(MultiInputPolicy, MIXED, id="dict"),
    ],
)
def test_a_policy_of_images_or_dictionaries_saved_alone_acts_as_before(tmp_path, policy_class, observation_space):
    env = random_env(observation_space=observation_space)
    model = REINFORCE(policy_class, env, n_steps=8).learn(1)
    model.policy.save(tmp_path / "policy.pth")
    loaded = policy_class.load(tmp_path / "policy.pth")
    assert_same(dict(model.policy.state_dict()), dict(loaded.state_dict()))
    obs = env.reset()
    np.testing.assert_array_equal(*(one.predict(obs, deterministic=True)[0] for one in (model.policy, loaded)))


def test_a_policy_is_a_vector_of_parameters_too(trained):
    vector = trained.policy.parameters_to_vector()
    other = make_other()
    other.policy.load_from_vector(vector)
    np.testing.assert_array_equal(other.policy.parameters_to_vector(), vector)
