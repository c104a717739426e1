"""REINFORCE as a Stable-Baselines3 algorithm."""

from sb3_reinforce.callbacks import AtomicCheckpointCallback, newest_checkpoint
from sb3_reinforce.natural_gradient import InverseTimeDecay
from sb3_reinforce.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_reinforce.reinforce import REINFORCE

__version__ = "0.1.0"

__all__ = [
    "REINFORCE",
    "AtomicCheckpointCallback",
    "CnnPolicy",
    "InverseTimeDecay",
    "MlpPolicy",
    "MultiInputPolicy",
    "newest_checkpoint",
]
