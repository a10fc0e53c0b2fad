"""What is read: indexed datasets, their blend, and the tokenizer they were made with."""

from dataclasses import dataclass, field
from typing import Literal


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
    """Tokenizer the datasets were made with: compared with vocab_size and their manifests."""

    sequence_length: int = 4096
    """Tokens a sample."""

    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents make samples: end to end and cut, or whole by best fit, padded at the end."""

    reset_at_document_boundaries: bool = True
    """Documents of a sample do not see each other: attention, convolutions, states start anew."""

    eod_mask_loss: bool = False
    """Do not count the loss where the input is an end-of-document token."""

    loss_masks: bool = False
    """Count the loss only on the tokens that the dataset PREFIX_loss_mask beside a dataset marks
    (preprocess_corpus.py --completion-key writes it); on all where there is none."""

    num_workers: int = 1
    """Micro-batches read ahead in the background; 0 reads them when asked."""
