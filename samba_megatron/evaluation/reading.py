"""Long texts read in pieces, so that memory does not grow with them; and what comes next.

A model of Samba's kind remembers a window of keys and a state a channel, whatever it has read: a
piece at a time needs the memory of one piece. (Attention without a window keeps all its keys.)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_HEAD_POSITIONS = 1024
"""Positions whose logits exist at a time: a vocabulary's width each, in fp32."""


def token_losses(model: Any, tokens: "torch.Tensor", piece: int) -> "Iterator[torch.Tensor]":
    """Cross entropies of each next token, in nats.

    Args:
        model: a causal language model of transformers.
        tokens: [n + 1] ids; the last one is only predicted.
        piece: tokens read at a time.

    Yields:
        fp32 [up to ``piece``] for consecutive positions, n in all, on the CPU.
    """
    import torch

    inputs, labels, cache = tokens[:-1], tokens[1:], None
    with torch.inference_mode():
        for start in range(0, len(inputs), piece):
            part = inputs[start : start + piece].to(model.device)[None]
            output = model.base_model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            wanted = labels[start : start + piece].to(model.device)
            yield _losses(model, output.last_hidden_state[0], wanted).cpu()


def _losses(model: Any, hidden: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    """[n, d] hidden states and [n] labels → [n] cross entropies."""
    import torch

    head = model.get_output_embeddings()
    parts = []
    for start in range(0, len(labels), _HEAD_POSITIONS):
        logits = head(hidden[start : start + _HEAD_POSITIONS]).float()
        wanted = labels[start : start + _HEAD_POSITIONS]
        parts.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(parts)


def continue_greedily(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, piece: int
) -> list[list[int]]:
    """The likeliest next token, so many times.

    Args:
        model: a causal language model of transformers.
        prompts: token ids; shorter ones are padded on the left, which leaves no trace.
        new_tokens: how many to add to each.
        piece: tokens of the prompts read at a time.
    """
    import torch

    longest = max(len(prompt) for prompt in prompts)
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(padded, device=model.device)
    mask = None
    if any(len(prompt) != longest for prompt in prompts):
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        mask = torch.arange(longest, device=model.device) >= longest - lengths[:, None]
    with torch.inference_mode():
        cache, logits = read(model, tokens, piece, mask)
        found = [logits.argmax(-1)]
        while len(found) < new_tokens:
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=True)
            output = model(
                found[-1][:, None], past_key_values=cache, attention_mask=mask, use_cache=True
            )
            found.append(output.logits[:, -1].argmax(-1))
    rows: list[list[int]] = torch.stack(found, dim=1).tolist()
    return rows


def read(
    model: Any,
    tokens: "torch.Tensor",
    piece: int,
    mask: "torch.Tensor | None" = None,
    progress: "Callable[[int], object]" = lambda count: None,
) -> tuple[Any, "torch.Tensor"]:
    """The caches after [b, n] tokens, and the last logits [b, vocabulary].

    Args:
        model: a causal language model of transformers.
        tokens: ids.
        piece: tokens read at a time.
        mask: [b, n], false where a token is padding on the left.
        progress: is told after each piece how many tokens it has.
    """
    cache, output = None, None
    for start in range(0, tokens.shape[1], piece):
        stop = min(start + piece, tokens.shape[1])
        output = model(
            tokens[:, start:stop],
            past_key_values=cache,
            attention_mask=None if mask is None else mask[:, :stop].long(),
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        progress(stop - start)
    assert output is not None
    return cache, output.logits[:, -1]
