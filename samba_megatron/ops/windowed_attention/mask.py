"""Who may attend to whom: the causal window and the documents."""

import torch
from torch import Tensor


def attention_mask(
    queries: slice, keys: slice, window: int | None, documents: Tensor | None, device: torch.device
) -> Tensor:
    """The allowed pairs of two stretches of one sequence's positions.

    Args:
        queries: positions of the queries.
        keys: positions of the keys, on the same count.
        window: how many keys a query sees, itself included; None for all before it.
        documents: the number of each position's document [positions, b]; None for one document.

    Returns:
        bool [q, k], or [b, q, k] when there are documents; True where attention is allowed.
    """
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)[None, :]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    if documents is None:
        return allowed
    query_documents, key_documents = documents[queries].t(), documents[keys].t()
    return allowed & (query_documents[:, :, None] == key_documents[:, None, :])


def document_numbers(reset: Tensor | None) -> Tensor | None:
    """The number of each position's document, from where documents start; both [positions, b]."""
    return None if reset is None else reset.cumsum(0)
