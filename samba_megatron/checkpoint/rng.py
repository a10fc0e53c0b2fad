"""The random generators of a rank: captured as plain tensors and lists, and set back."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import (
    convert_cuda_rng_state,
    get_cuda_rng_tracker,
    is_graph_safe_cuda_rng_tracker,
)

from samba_megatron.platform import distributed


def capture_rng() -> dict[str, Any]:
    """State of Python's, numpy's and torch's generators and of megatron's named ones."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    named = get_cuda_rng_tracker().get_states()
    state = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "tracker": {name: convert_cuda_rng_state(value) for name, value in named.items()},
    }
    if distributed.device_type() == "cuda":
        state["device"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Sets back what :func:`capture_rng` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "device" in state and distributed.device_type() == "cuda":
        torch.cuda.set_rng_state(state["device"])
    tracker = get_cuda_rng_tracker()
    graphable = is_graph_safe_cuda_rng_tracker(tracker)
    if state["tracker"]:
        tracker.set_states(
            {
                name: convert_cuda_rng_state(value, to_graphable=graphable)
                for name, value in state["tracker"].items()
            }
        )
