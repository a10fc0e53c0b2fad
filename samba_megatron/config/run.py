"""The whole configuration of a run, as a recipe and the command line give it."""

from dataclasses import dataclass, field

from samba_megatron.config.checkpoint import CheckpointConfig
from samba_megatron.config.data import DataConfig
from samba_megatron.config.faults import FaultsConfig
from samba_megatron.config.kernels import KernelsConfig
from samba_megatron.config.logging import LoggingConfig
from samba_megatron.config.model import ModelConfig
from samba_megatron.config.optimizer import OptimizerConfig, ScheduleConfig
from samba_megatron.config.parallel import ParallelConfig
from samba_megatron.config.precision import PrecisionConfig
from samba_megatron.config.training import TrainingConfig, ValidationConfig


@dataclass
class RunConfig:
    """Everything that decides a run; saved with every checkpoint."""

    name: str = "samba"
    """Name of the run."""

    run_dir: str | None = None
    """Folder for logs, metrics and, unless named elsewhere, checkpoints and dataset indices."""

    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
