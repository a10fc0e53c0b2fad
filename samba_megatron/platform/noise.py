"""Keeps known, harmless messages of libraries off the user's screen, so that real ones are seen.

Each entry names what it silences. ``SAMBA_MEGATRON_VERBOSE=1`` lets everything through.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_WARNINGS = (
    r".*MimoModelConfig is experimental.*",
    r".*full scope is deprecated.*",
    # Samples hold no padding.
    r".*The pad token id in the tokenizer collides.*",
    # megatron's optimizer asks views of the parameters for their gradient.
    r".*is not a leaf Tensor.*",
    # Internal to torch's and megatron's checkpointing.
    r".*TypedStorage is deprecated.*",
    r".*torch\.distributed\._shard.*deprecated.*",
    r".*Please use DTensor instead.*",
)

# Their import says which optional packages they do without; the start of a run says what is used.
_TALKATIVE = (
    "megatron.core.optimizer",
    "megatron.core.models.hybrid.hybrid_model",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing",
)

_LOG_LINES = (
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    ("megatron.core.rerun_state_machine", "RerunStateMachine initialized"),
    ("megatron.core.rerun_state_machine", "Result validation enabled"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param"),
)


def silence() -> None:
    """Installs the filters; called once by whatever brings megatron in."""
    if os.environ.get("SAMBA_MEGATRON_VERBOSE") == "1":
        return
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=f"(?s){pattern}")
    for logger, start in _LOG_LINES:
        logging.getLogger(logger).addFilter(_Without(start))


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Inside, imports warn of nothing; the filters are set again afterwards, since an import
    inside megatron resets them all."""
    silence()
    with warnings.catch_warnings():
        if os.environ.get("SAMBA_MEGATRON_VERBOSE") != "1":
            warnings.simplefilter("ignore")
        yield
    silence()


def import_megatron() -> None:
    """Imports what every run needs of megatron."""
    for module in _TALKATIVE:
        importlib.import_module(module)


class _Without(logging.Filter):
    """Drops records whose message begins with a text."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._start)
