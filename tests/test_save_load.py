"""Models, policies and parameters survive a round trip through a file, and what is no model of REINFORCE is refused."""

import io
import zipfile
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_reinforce.buffers import EpisodeRolloutBuffer
from tests.envs import RandomEnv

VECTOR = spaces.Box(-1, 1, (3,))
PAIR = spaces.Box(-1, 1, (2,))
OBSERVATIONS = np.random.default_rng(0).uniform(-1, 1, (10, 3)).astype(np.float32)


class OwnBuffer(EpisodeRolloutBuffer):
    """A rollout buffer of the user's."""


class OwnPolicy(MlpPolicy):
    """A subclass of the policies here."""


CONFIGURATIONS = {
    "default": {},
    "quadratic_with_memory": dict(baseline="quadratic", baseline_memory=0.5),
    "linear": dict(baseline="linear", baseline_memory=0.0, normalize_observations=False),
    "no_baseline": dict(baseline=None),
    "gsde": dict(use_sde=True, policy_kwargs=dict(full_std=False, squash_output=True)),
    "n_episodes": dict(n_steps=None, n_episodes=5, max_grad_norm=0.5, learning_rate=lambda progress: 1e-2 * progress),
    "separate_features": dict(normalize_observations=True, policy_kwargs=dict(share_features_extractor=False)),
    "own_buffer": dict(rollout_buffer_class=OwnBuffer),
    "rmsprop": dict(policy_kwargs=dict(optimizer_class=th.optim.RMSprop, optimizer_kwargs=dict(alpha=0.9))),
}


def random_env(n_envs=1, action_space=PAIR, observation_space=VECTOR):
    return DummyVecEnv([lambda: RandomEnv(observation_space, action_space, 7)] * n_envs)


def make_model(n_envs=1, **kwargs):
    return REINFORCE("MlpPolicy", random_env(n_envs), **(dict(n_steps=16, seed=3, learning_rate=1e-2) | kwargs))


@pytest.fixture
def trained():
    return make_model(normalize_observations=True, baseline_memory=0.5).learn(50)


def assert_same(one, other):
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


def assert_same_parameters(model, other):
    assert_same(dict(model.get_parameters()), dict(other.get_parameters()))


class TestModel:
    @pytest.mark.parametrize("kind", ["str", "str_with_suffix", "path", "bytes_io", "file"])
    def test_is_saved_to_and_loaded_from_every_kind_of_place(self, trained, tmp_path, kind):
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

    @pytest.mark.parametrize("kwargs", [pytest.param(kwargs, id=name) for name, kwargs in CONFIGURATIONS.items()])
    def test_acts_and_predicts_values_as_before(self, tmp_path, kwargs):
        model = make_model(**kwargs).learn(50)
        model.save(tmp_path / "model")
        loaded = REINFORCE.load(tmp_path / "model")
        for deterministic in (True, False):
            chosen = []
            for one in (model, loaded):
                th.manual_seed(0)
                if one.use_sde:
                    one.policy.reset_noise()
                chosen.append(one.predict(OBSERVATIONS, deterministic=deterministic)[0])
            np.testing.assert_array_equal(*chosen)
        with th.no_grad():
            values = [one.policy.predict_values(th.as_tensor(OBSERVATIONS)) for one in (model, loaded)]
        assert th.equal(*values)

    @pytest.mark.parametrize("kwargs", [pytest.param(kwargs, id=name) for name, kwargs in CONFIGURATIONS.items()])
    def test_keeps_parameters_optimiser_baseline_and_statistics(self, tmp_path, kwargs):
        model = make_model(**kwargs).learn(50)
        assert model.policy.optimizer.state_dict()["state"]
        model.save(tmp_path / "model")
        assert_same_parameters(model, REINFORCE.load(tmp_path / "model"))

    def test_keeps_the_observation_statistics_and_the_memory_of_the_baseline(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        policy = REINFORCE.load(tmp_path / "model").policy
        assert policy.observation_normalizer.count_0 == trained.policy.observation_normalizer.count_0 > 50
        assert th.equal(policy.observation_normalizer.mean_0, trained.policy.observation_normalizer.mean_0)
        assert policy.value_net.count == trained.policy.value_net.count > 16
        assert th.equal(policy.value_net.scatter, trained.policy.value_net.scatter)

    @pytest.mark.parametrize("given", [None, False], ids=str)
    @pytest.mark.parametrize("policy", ["MlpPolicy", OwnPolicy, ActorCriticPolicy])
    def test_keeps_whether_observations_are_normalised(self, tmp_path, policy, given):
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

    def test_of_a_policy_of_sb3_with_all_defaults_learns_and_acts_as_before(self, tmp_path):
        model = REINFORCE(ActorCriticPolicy, random_env(), seed=0)
        before = deepcopy(model.policy.state_dict())
        model.learn(2 * model.n_steps)
        assert model._n_updates == 2
        for name in ("action_net.weight", "mlp_extractor.policy_net.0.weight", "log_std", "value_net.weight"):
            assert not th.equal(model.policy.state_dict()[name], before[name].to(model.policy.state_dict()[name])), name
        model.save(tmp_path / "model")
        loaded = REINFORCE.load(tmp_path / "model", env=random_env())
        assert_same_parameters(model, loaded)
        np.testing.assert_array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (model, loaded)))
        with th.no_grad():
            assert th.equal(*(one.policy.predict_values(th.as_tensor(OBSERVATIONS)) for one in (model, loaded)))
        # The memory of the baseline goes on as well
        for one in (model, loaded):
            one.set_env(random_env())
            one.learn(1, reset_num_timesteps=False)
        assert_same_parameters(model, loaded)

    def test_keeps_hyperparameters_and_counters(self, tmp_path):
        given = dict(
            n_steps=None,
            n_episodes=4,
            gamma=0.9,
            ent_coef=0.01,
            max_grad_norm=0.5,
            normalize_advantage=False,
            max_episode_steps=100,
            baseline="quadratic",
            baseline_memory=0.25,
            bootstrap_timeouts=True,
            normalize_observations=True,
            seed=11,
        )
        model = make_model(**given).learn(50)
        model.save(tmp_path / "model")
        loaded = REINFORCE.load(tmp_path / "model")
        for name in [*given, "num_timesteps", "_n_updates"]:
            assert getattr(loaded, name) == getattr(model, name), name
        assert loaded.rollout_buffer.gamma == 0.9

    @pytest.mark.parametrize("kwargs", [pytest.param(kwargs, id=name) for name, kwargs in CONFIGURATIONS.items()])
    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_learns_on_as_if_it_had_never_been_saved(self, tmp_path, kwargs, n_envs):
        # Schedules depend on the total number of steps, which is another when it comes in two parts
        if callable(kwargs.get("learning_rate")):
            kwargs = kwargs | dict(learning_rate=1e-2)
        whole = make_model(n_envs, **kwargs).learn(200)
        half = make_model(n_envs, **kwargs).learn(50)
        half.save(tmp_path / "model")
        resumed = REINFORCE.load(tmp_path / "model", env=random_env(n_envs))
        resumed.learn(200 - half.num_timesteps, reset_num_timesteps=False)
        assert resumed.num_timesteps == whole.num_timesteps
        assert resumed._n_updates == whole._n_updates > half._n_updates
        assert_same_parameters(resumed, whole)

    def test_goes_on_counting_steps_and_updates(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        loaded = REINFORCE.load(tmp_path / "model", env=random_env())
        steps, updates = loaded.num_timesteps, loaded._n_updates
        loaded.learn(1, reset_num_timesteps=False)
        assert loaded.num_timesteps > steps
        assert loaded._n_updates == updates + 1
        loaded.learn(1)
        assert loaded.num_timesteps < steps
        assert loaded._n_updates == updates + 2

    @pytest.mark.parametrize("n_envs", [1, 4])
    def test_can_be_loaded_on_another_number_of_environments(self, tmp_path, n_envs):
        make_model(n_envs=2).learn(50).save(tmp_path / "model")
        model = REINFORCE.load(tmp_path / "model", env=random_env(n_envs))
        assert model.n_envs == n_envs
        model.learn(50, reset_num_timesteps=False)
        assert len(model.rollout_buffer.rewards) >= 16 * n_envs

    def test_can_be_loaded_on_an_environment_that_is_not_vectorised(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        env = RandomEnv(VECTOR, PAIR, 7)
        assert REINFORCE.load(tmp_path / "model", env=env).learn(1)._n_updates == trained._n_updates + 1

    def test_without_an_environment_predicts_but_does_not_learn_until_one_is_set(self, tmp_path):
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

    def test_set_env_wants_the_same_number_of_environments(self, trained):
        with pytest.raises(AssertionError, match="number of environments"):
            trained.set_env(random_env(2))

    def test_set_env_starts_whole_episodes_in_the_new_environment(self, trained):
        env = RandomEnv(VECTOR, PAIR, 7)
        trained.set_env(env)
        trained.learn(50, reset_num_timesteps=False)
        assert trained.get_env().envs[0].unwrapped is env
        assert trained.rollout_buffer.episode_starts[0]

    @pytest.mark.parametrize(
        "other",
        [
            pytest.param(dict(action_space=spaces.Discrete(2)), id="other_kind_of_action"),
            pytest.param(dict(action_space=spaces.Box(-1, 1, (3,))), id="other_shape_of_action"),
            pytest.param(dict(action_space=spaces.Box(-2, 2, (2,))), id="other_bounds_of_action"),
            pytest.param(dict(observation_space=spaces.Box(-1, 1, (4,))), id="other_observation"),
        ],
    )
    def test_refuses_environments_of_other_spaces(self, trained, tmp_path, other):
        trained.save(tmp_path / "model")
        env = trained.get_env()
        with pytest.raises(ValueError, match="spaces do not match"):
            REINFORCE.load(tmp_path / "model", env=random_env(**other))
        with pytest.raises(ValueError, match="spaces do not match"):
            trained.set_env(random_env(**other))
        assert trained.get_env() is env

    @pytest.mark.parametrize("force_reset", [True, False])
    def test_force_reset_decides_whether_the_last_observation_is_kept(self, trained, tmp_path, force_reset):
        trained.save(tmp_path / "model")
        loaded = REINFORCE.load(tmp_path / "model", env=random_env(), force_reset=force_reset)
        assert (loaded._last_obs is None) == force_reset
        loaded.learn(1, reset_num_timesteps=False)
        assert loaded.rollout_buffer.episode_starts[0]

    def test_what_is_excluded_is_not_saved_unless_it_is_included(self, tmp_path):
        model = make_model(stats_window_size=7, verbose=0)
        model.note = "kept"
        model.save(tmp_path / "without", exclude=["_stats_window_size", "note"])
        loaded = REINFORCE.load(tmp_path / "without")
        assert loaded._stats_window_size == 100
        assert not hasattr(loaded, "note")
        model.save(tmp_path / "with", exclude=["_stats_window_size", "note"], include=["note"])
        assert REINFORCE.load(tmp_path / "with").note == "kept"

    def test_the_rollout_buffer_is_not_saved(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        assert not REINFORCE.load(tmp_path / "model").rollout_buffer.full

    def test_custom_objects_take_the_place_of_what_was_saved(self, tmp_path):
        make_model(learning_rate=lambda _: 1e-3).save(tmp_path / "model")
        loaded = REINFORCE.load(tmp_path / "model", env=random_env(), custom_objects=dict(learning_rate=0.5))
        loaded.learn(1)
        assert loaded.policy.optimizer.param_groups[0]["lr"] == 0.5

    def test_can_be_copied_in_memory(self, trained, tmp_path):
        save_to_pkl(tmp_path / "policy.pkl", trained.policy)
        for policy in (deepcopy(trained.policy), load_from_pkl(tmp_path / "policy.pkl")):
            assert_same(dict(policy.state_dict()), dict(trained.policy.state_dict()))

    @pytest.mark.parametrize(
        "policy, observation_space",
        [
            pytest.param("CnnPolicy", spaces.Box(0, 255, (36, 36, 1), np.uint8), id="image"),
            pytest.param("MultiInputPolicy", spaces.Dict(vec=VECTOR, choice=spaces.Discrete(3)), id="dict"),
        ],
    )
    @pytest.mark.parametrize("share_features_extractor", [True, False])
    def test_of_images_and_dictionaries_acts_as_before(self, tmp_path, policy, observation_space, share_features_extractor):
        env = random_env(observation_space=observation_space)
        kwargs = dict(share_features_extractor=share_features_extractor)
        model = REINFORCE(policy, env, n_steps=8, seed=0, normalize_observations=True, policy_kwargs=kwargs).learn(20)
        model.save(tmp_path / "model")
        loaded = REINFORCE.load(tmp_path / "model", env=env)
        assert_same_parameters(model, loaded)
        obs = env.reset()
        np.testing.assert_array_equal(*(one.predict(obs, deterministic=True)[0] for one in (model, loaded)))
        assert loaded.learn(1)._n_updates == model._n_updates + 1

    def test_compiled_policies_learn_and_are_saved(self, tmp_path):
        model = make_model(normalize_observations=True)
        # The eager back-end compiles nothing, but wraps the policy in the same way
        model.policy = th.compile(model.policy, backend="eager")
        model.learn(1)
        model.save(tmp_path / "model")
        loaded = REINFORCE.load(tmp_path / "model")
        np.testing.assert_array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (model, loaded)))


class TestArgumentsOfLoad:
    @pytest.fixture
    def path(self, trained, tmp_path):
        trained.save(tmp_path / "model")
        return tmp_path / "model"

    def test_change_the_model(self, path):
        kwargs = dict(n_steps=40, gamma=0.5, learning_rate=0.25, ent_coef=0.1, max_grad_norm=1.0, bootstrap_timeouts=True)
        model = REINFORCE.load(path, env=random_env(), **kwargs)
        for name, value in kwargs.items():
            assert getattr(model, name) == value
        model.learn(1)
        assert len(model.rollout_buffer.rewards) >= 40
        assert model.rollout_buffer.gamma == 0.5
        assert model.policy.optimizer.param_groups[0]["lr"] == 0.25

    def test_can_change_from_steps_to_episodes(self, path):
        model = REINFORCE.load(path, env=random_env(), n_steps=None, n_episodes=6).learn(1)
        assert model.rollout_buffer.episode_starts.sum() == 6

    def test_another_seed_takes_effect(self, path):
        same, other = (REINFORCE.load(path, env=random_env(), seed=seed).learn(1) for seed in (3, 4))
        again = REINFORCE.load(path, env=random_env()).learn(1)
        assert_same_parameters(same, again)
        assert not th.equal(same.policy.action_net.weight, other.policy.action_net.weight)

    @pytest.mark.parametrize(
        "kwargs",
        [
            dict(n_steps=0),
            dict(n_steps=None),
            dict(n_episodes=3),
            dict(gamma=1.5),
            dict(ent_coef=-1),
            dict(learning_rate=-1e-3),
            dict(max_grad_norm=0),
            dict(max_episode_steps=0),
            dict(baseline="cubic"),
            dict(baseline_memory=1.0),
            dict(rollout_buffer_class=dict),
        ],
        ids=str,
    )
    def test_out_of_range_are_refused_by_name(self, path, kwargs):
        (name,) = kwargs
        with pytest.raises(ValueError, match=name):
            REINFORCE.load(path, **kwargs)

    @pytest.mark.parametrize(
        "kwargs", [dict(baseline="quadratic"), dict(normalize_observations=False), dict(baseline_memory=0.0)], ids=str
    )
    def test_that_do_not_fit_the_saved_parameters_are_refused_by_name(self, path, kwargs):
        (name,) = kwargs
        with pytest.raises((ValueError, RuntimeError), match=name):
            REINFORCE.load(path, **kwargs)

    def test_other_policy_kwargs_are_refused(self, path):
        with pytest.raises(ValueError, match="policy kwargs do not equal the stored policy kwargs"):
            REINFORCE.load(path, policy_kwargs=dict(net_arch=[3]))


class TestFilesThatAreNoModel:
    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            REINFORCE.load(tmp_path / "nothing")

    @pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18)], ids=["empty", "text", "empty_zip"])
    def test_a_file_of_something_else(self, tmp_path, content):
        (tmp_path / "model.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.zip is no complete model file"):
            REINFORCE.load(tmp_path / "model.zip")

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
    def test_a_file_that_was_cut_short(self, trained, tmp_path, share):
        trained.save(tmp_path / "model.zip")
        content = (tmp_path / "model.zip").read_bytes()
        (tmp_path / "model.zip").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"model\.zip is no complete model file"):
            REINFORCE.load(tmp_path / "model.zip")

    @pytest.mark.parametrize("member", ["data", "policy.pth", "policy.optimizer.pth"])
    def test_a_file_of_which_a_part_is_missing(self, trained, tmp_path, member):
        trained.save(tmp_path / "whole.zip")
        with zipfile.ZipFile(tmp_path / "whole.zip") as whole, zipfile.ZipFile(tmp_path / "model.zip", "w") as partial:
            for name in whole.namelist():
                if name != member:
                    partial.writestr(name, whole.read(name))
        with pytest.raises(ValueError, match=r"model\.zip"):
            REINFORCE.load(tmp_path / "model.zip")

    @pytest.mark.parametrize("member", ["data", "policy.pth", "policy.optimizer.pth"])
    def test_a_file_of_which_a_part_is_damaged(self, trained, tmp_path, member):
        trained.save(tmp_path / "model.zip")
        with zipfile.ZipFile(tmp_path / "model.zip") as archive:
            part = archive.getinfo(member)
            start, size = part.header_offset, part.compress_size
        content = bytearray((tmp_path / "model.zip").read_bytes())
        content[start + size // 2] ^= 0xFF
        (tmp_path / "model.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.zip"):
            REINFORCE.load(tmp_path / "model.zip")

    def test_a_file_of_a_policy_alone(self, trained, tmp_path):
        trained.policy.save(tmp_path / "policy.zip")
        with pytest.raises(ValueError, match=r"policy\.zip is no complete model file"):
            REINFORCE.load(tmp_path / "policy.zip")

    @pytest.mark.parametrize("algorithm", [A2C, PPO])
    def test_a_model_of_another_algorithm(self, tmp_path, algorithm):
        algorithm("MlpPolicy", random_env()).save(tmp_path / "model")
        with pytest.raises(ValueError, match=r"model holds a model of another algorithm, not of REINFORCE"):
            REINFORCE.load(tmp_path / "model")

    def test_a_stream_of_another_algorithm_which_stays_open(self):
        stream = io.BytesIO()
        A2C("MlpPolicy", random_env()).save(stream)
        with pytest.raises(ValueError, match="another algorithm"):
            REINFORCE.load(stream)
        assert not stream.closed


class TestParameters:
    def test_of_one_model_make_another_act_like_it(self, trained):
        other = make_model(normalize_observations=True, baseline_memory=0.5, seed=8)
        assert not np.array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (trained, other)))
        other.set_parameters(trained.get_parameters())
        assert_same_parameters(trained, other)
        np.testing.assert_array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (trained, other)))

    @pytest.mark.parametrize("as_text", [True, False])
    def test_can_be_taken_from_a_file(self, trained, tmp_path, as_text):
        trained.save(tmp_path / "model.zip")
        other = make_model(normalize_observations=True, baseline_memory=0.5, seed=8)
        other.set_parameters(str(tmp_path / "model") if as_text else tmp_path / "model.zip")
        assert_same_parameters(trained, other)

    def test_can_be_set_in_part_without_exact_match(self, trained):
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
            pytest.param(lambda parameters: parameters.update({"policy.optimizer": {}}), id="empty_optimiser"),
            pytest.param(
                lambda parameters: parameters["policy.optimizer"]["param_groups"][0].update(params=[0]), id="other_optimiser"
            ),
        ],
    )
    def test_that_are_wrong_are_refused_and_change_nothing(self, trained, spoil, exact_match):
        before = deepcopy(trained.get_parameters())
        # All others are right, and different from the model's own
        wrong = deepcopy(make_model(normalize_observations=True, baseline_memory=0.5, seed=8).learn(20).get_parameters())
        spoil(wrong)
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            trained.set_parameters(wrong, exact_match=exact_match)
        assert_same(dict(before), dict(trained.get_parameters()))

    @pytest.mark.parametrize(
        "spoil",
        [
            pytest.param(lambda parameters: parameters.pop("policy"), id="no_policy"),
            pytest.param(lambda parameters: parameters.pop("policy.optimizer"), id="no_optimiser"),
            pytest.param(lambda parameters: parameters["policy"].pop("log_std"), id="parameter_missing"),
            pytest.param(lambda parameters: parameters["policy"].update(surplus=th.zeros(1)), id="parameter_unknown"),
        ],
    )
    def test_must_be_complete_for_an_exact_match(self, trained, spoil):
        before = deepcopy(trained.get_parameters())
        wrong = deepcopy(make_model(normalize_observations=True, baseline_memory=0.5, seed=8).learn(20).get_parameters())
        spoil(wrong)
        with pytest.raises((ValueError, RuntimeError)):
            trained.set_parameters(wrong)
        assert_same(dict(before), dict(trained.get_parameters()))
        trained.set_parameters(wrong, exact_match=False)
        assert th.equal(trained.policy.action_net.weight, wrong.get("policy", before["policy"])["action_net.weight"])

    def test_of_another_algorithm_are_refused_and_change_nothing(self, trained, tmp_path):
        A2C("MlpPolicy", random_env()).save(tmp_path / "a2c")
        before = deepcopy(trained.get_parameters())
        with pytest.raises((ValueError, RuntimeError)):
            trained.set_parameters(str(tmp_path / "a2c"))
        assert_same(dict(before), dict(trained.get_parameters()))

    def test_that_were_refused_do_not_disturb_learning(self):
        models = [make_model().learn(20) for _ in range(2)]
        with pytest.raises(ValueError, match="nonsense"):
            models[0].set_parameters({**make_model(seed=8).get_parameters(), "nonsense": {}})
        for model in models:
            model.learn(50, reset_num_timesteps=False)
        assert_same_parameters(*models)


class TestPolicyAlone:
    @pytest.mark.parametrize("kwargs", [pytest.param(kwargs, id=name) for name, kwargs in CONFIGURATIONS.items()])
    def test_acts_and_predicts_values_as_before(self, tmp_path, kwargs):
        policy = make_model(**kwargs).learn(50).policy
        policy.save(tmp_path / "policy.pth")
        loaded = MlpPolicy.load(tmp_path / "policy.pth")
        assert_same(dict(policy.state_dict()), dict(loaded.state_dict()))
        np.testing.assert_array_equal(*(one.predict(OBSERVATIONS, deterministic=True)[0] for one in (policy, loaded)))
        with th.no_grad():
            assert th.equal(*(one.predict_values(th.as_tensor(OBSERVATIONS)) for one in (policy, loaded)))

    @pytest.mark.parametrize(
        "policy_class, observation_space",
        [
            pytest.param(CnnPolicy, spaces.Box(0, 255, (1, 36, 36), np.uint8), id="image"),
            pytest.param(MultiInputPolicy, spaces.Dict(vec=VECTOR, choice=spaces.Discrete(3)), id="dict"),
        ],
    )
    def test_of_images_and_dictionaries_acts_as_before(self, tmp_path, policy_class, observation_space):
        env = random_env(observation_space=observation_space)
        model = REINFORCE(policy_class, env, n_steps=8, normalize_observations=True, baseline="random").learn(1)
        model.policy.save(tmp_path / "policy.pth")
        loaded = policy_class.load(tmp_path / "policy.pth")
        assert_same(dict(model.policy.state_dict()), dict(loaded.state_dict()))
        obs = env.reset()
        np.testing.assert_array_equal(*(one.predict(obs, deterministic=True)[0] for one in (model.policy, loaded)))

    def test_is_a_vector_of_parameters_too(self, trained):
        vector = trained.policy.parameters_to_vector()
        other = make_model(normalize_observations=True, baseline_memory=0.5, seed=8)
        other.policy.load_from_vector(vector)
        np.testing.assert_array_equal(other.policy.parameters_to_vector(), vector)


def test_a_checkpoint_taken_within_an_episode_resumes_bit_for_bit(tmp_path):
    def make():
        # Not a schedule, which depends on the total number of steps
        return REINFORCE("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_steps=50, seed=0, learning_rate=1e-2)

    def save_once(locals_, globals_):
        if locals_["self"].num_timesteps == 250:
            locals_["self"].save(tmp_path / "checkpoint")
        return True

    whole = make().learn(500, callback=save_once)
    resumed = REINFORCE.load(tmp_path / "checkpoint", env=make_vec_env("CartPole-v1", n_envs=2))
    assert resumed.num_timesteps == 250
    assert 0 < resumed._n_updates < whole._n_updates
    while resumed._n_updates < whole._n_updates:
        resumed.learn(1, reset_num_timesteps=False)
    assert_same_parameters(resumed, whole)


def test_a_loaded_model_evaluates_on_a_plain_gymnasium_environment(tmp_path):
    REINFORCE("MlpPolicy", "CartPole-v1", n_steps=50).learn(1).save(tmp_path / "model")
    model = REINFORCE.load(tmp_path / "model")
    env = gym.make("CartPole-v1")
    obs, _ = env.reset(seed=0)
    for _ in range(5):
        action, _ = model.predict(obs, deterministic=True)
        obs, *_ = env.step(action)
    assert env.observation_space.contains(obs)
