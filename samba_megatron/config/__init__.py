"""The typed configuration of a run: small dataclasses, one a concern, joined in :class:`RunConfig`.

Field names are megatron-core's wherever it has one, and the Mamba paper's for the state space
model, so that what a user knows from there holds here. Nothing in this package imports torch or
megatron: a planner, a submitter or a test can read a recipe in milliseconds.
"""

from samba_megatron.config.checkpoint import CheckpointConfig
from samba_megatron.config.data import DataConfig
from samba_megatron.config.faults import FaultsConfig
from samba_megatron.config.kernels import KernelsConfig
from samba_megatron.config.logging import LoggingConfig
from samba_megatron.config.model import ModelConfig
from samba_megatron.config.optimizer import OptimizerConfig, ScheduleConfig
from samba_megatron.config.parallel import ParallelConfig
from samba_megatron.config.precision import PrecisionConfig
from samba_megatron.config.run import RunConfig
from samba_megatron.config.training import TrainingConfig, ValidationConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "FaultsConfig",
    "KernelsConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "ValidationConfig",
]
