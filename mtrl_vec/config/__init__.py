"""Everything that can be set about a training run, checked before anything starts."""

from mtrl_vec.config.sections import EnvironmentConfig, LearnerConfig, PolicyConfig, RuntimeConfig
from mtrl_vec.config.train import PRESETS, TrainConfig

__all__ = ["PRESETS", "EnvironmentConfig", "LearnerConfig", "PolicyConfig", "RuntimeConfig", "TrainConfig"]
