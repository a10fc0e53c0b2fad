"""What is read: indexed datasets, their blend, and the tokenizer they were made with."""

from dataclasses import dataclass, field


@dataclass
class DataConfig:
    """Megatron's ``.bin/.idx`` datasets by prefix (the path without the ending)."""

    data_path: list[str] = field(default_factory=list)
    """Training datasets: prefixes, or alternating weight and prefix (``[0.3, a, 0.7, b]``)."""

    blend_file: list[str] = field(default_factory=list)
    """Blend files instead of ``data_path``: sources with weights, caps on epochs, stages."""

    valid_data_path: list[str] = field(default_factory=list)
    """Held-out datasets: prefixes, or blend files. Without it ``split`` takes a part of each."""

    split: str = "98,2,0"
    """Parts for training, validation and test when ``valid_data_path`` is not given."""

    path_to_cache: str | None = None
    """Folder for the dataset indices, shared by all ranks; beside the run when unset."""

    tokenizer: str | None = None
    """Folder of the tokenizer the datasets were made with: checked against vocab_size."""

    sequence_length: int = 4096
    """Tokens a sample."""

    reset_position_ids: bool = False
    """Start position ids again after each end-of-document token."""

    eod_mask_loss: bool = False
    """Do not count the loss where the input is an end-of-document token."""

    num_workers: int = 1
    """Micro-batches read ahead in the background; 0 reads them when asked."""
