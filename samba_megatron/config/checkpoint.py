"""When and where the state is saved, and what is loaded at start."""

from dataclasses import dataclass


@dataclass
class CheckpointConfig:
    """Sharded checkpoints (megatron-core's torch_dist) that load at any TP, PP and DP."""

    save: str | None = None
    """Folder of the run's checkpoints; ``checkpoints`` in the run folder when unset."""

    load: str | None = None
    """Folder of checkpoints, or one checkpoint (``.../step_0000100``), to start from when ``save``
    has none yet; a run whose ``save`` folder has one always resumes from that."""

    load_weights_only: bool = False
    """From ``load`` take the weights only: optimizer, schedule, data and step begin anew."""

    save_interval: int | None = None
    """Steps between saves; unset: at the end, and where the run is stopped early, only."""

    save_at_end: bool = True
    """Save after the last step."""

    async_save: bool = True
    """Write in the background while training goes on (on a GPU; on a CPU a process is forked)."""

    keep_last: int = 3
    """Newest checkpoints to keep; 0 keeps all."""

    milestone_interval: int | None = None
    """Keep every checkpoint whose step is a multiple of this for ever."""

    fully_parallel_save: bool = True
    """Every data-parallel rank writes a part."""

    fully_parallel_load: bool = True
    """Every data-parallel rank reads a part and the parts are exchanged."""

    verify_on_load: bool = True
    """Compare sizes, hashes and checksums with those recorded at save before a checkpoint is taken;
    all ranks share the reading."""

    fall_back: bool = True
    """Where the latest checkpoint is corrupt, take the one before it; else end with code 76."""
