"""REINFORCE as a Stable-Baselines3 algorithm."""

from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from sb3_reinforce.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_reinforce.reinforce import REINFORCE
from sb3_reinforce.tools.checkpoints import AtomicCheckpointCallback, newest_checkpoint, restore_evaluations
from sb3_reinforce.tools.env_factory import EnvFactory

__version__ = "0.2.0"

__all__ = [
    "REINFORCE",
    "AtomicCheckpointCallback",
    "CnnPolicy",
    "EnvFactory",
    "EpisodeRolloutBuffer",
    "EpisodeVecEnv",
    "MlpPolicy",
    "MultiInputPolicy",
    "newest_checkpoint",
    "restore_evaluations",
]
