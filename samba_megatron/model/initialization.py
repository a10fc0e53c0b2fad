"""Initial weights that do not depend on the layout.

Every parameter is drawn whole, on the CPU, from a generator seeded by the run's seed and the
parameter's global name, and each rank keeps its slice. So the same seed gives the same model for
any TP, PP, VPP and DP, for both layer backends, and on CPU and GPU alike: layouts can be compared
without a common checkpoint, and a run that is moved to another layout at step 0 stays the same.

The values are the Samba authors' (and so lit-gpt's and Mamba's): see each layer kind.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from samba_megatron.config import ModelConfig
from samba_megatron.model.fp8_weights import set_initial

if TYPE_CHECKING:
    import torch
    from torch import nn

Initializer = Callable[["torch.Tensor", "torch.Generator"], None]
"""Fills a whole (unsplit) fp32 tensor in place."""


def uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""

    def fill(tensor: "torch.Tensor", generator: "torch.Generator") -> None:
        tensor.uniform_(-bound, bound, generator=generator)

    return fill


def linear_uniform(fan_in: int, scale: float = 1.0) -> Initializer:
    """torch's default for a linear layer, Kaiming-uniform with a = sqrt(5): U(±fan_in^-0.5)."""
    return uniform(scale / math.sqrt(fan_in))


def normal(std: float) -> Initializer:
    """N(0, std²)."""

    def fill(tensor: "torch.Tensor", generator: "torch.Generator") -> None:
        tensor.normal_(0.0, std, generator=generator)

    return fill


def constant(value: float) -> Initializer:
    """One value everywhere."""

    def fill(tensor: "torch.Tensor", generator: "torch.Generator") -> None:
        tensor.fill_(value)

    return fill


def initialize_weights(chunk: Any, model: ModelConfig, seed: int) -> None:
    """Fills every parameter of a model chunk in place.

    Args:
        chunk: a Samba model chunk (:class:`samba_megatron.model.samba.SambaModel`).
        model: its sizes.
        seed: the run's seed.

    Raises:
        KeyError: if a parameter has no initializer: nothing stays uninitialised silently.
    """
    import torch

    with torch.no_grad():
        for name, parameter, initializer in _named_initializers(chunk, model):
            whole = torch.empty(_whole_shape(parameter), dtype=torch.float32)
            initializer(whole, _generator(seed, name))
            set_initial(parameter, _slice(whole, parameter))


def _named_initializers(
    chunk: Any, model: ModelConfig
) -> "Iterator[tuple[str, nn.Parameter, Initializer]]":
    from samba_megatron.model.layers import KINDS

    embedding = "embedding.word_embeddings.weight"
    rules: dict[str, Initializer] = {
        embedding: normal(model.embedding_init_std),
        "decoder.final_norm.weight": constant(1.0),
        "output_layer.weight": linear_uniform(model.hidden_size),
    }
    if model.share_embeddings_and_output_weights:
        rules["output_layer.weight"] = rules[embedding]
    num_layers = int(chunk.config.num_layers)
    symbols = chunk.layer_symbols
    for name, parameter in chunk.named_parameters():
        if name in rules:
            shared = name == "output_layer.weight" and model.share_embeddings_and_output_weights
            yield (embedding if shared else name), parameter, rules[name]
            continue
        prefix, local, rest = _split_layer_name(name)
        layer = chunk.decoder.layers[local]
        kind = KINDS[symbols[layer.layer_number - 1]]
        rule = kind.initializers(model, num_layers)[_without_fused_norm(rest)]
        yield f"{prefix}{layer.layer_number - 1}.{_without_fused_norm(rest)}", parameter, rule


def _split_layer_name(name: str) -> tuple[str, int, str]:
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        raise KeyError(f"no initial value is defined for parameter {name}")
    local, rest = name[len(prefix) :].split(".", 1)
    return prefix, int(local), rest


def _without_fused_norm(name: str) -> str:
    """Transformer Engine keeps a layer's norm inside the linear that follows it."""
    return "norm.weight" if name.endswith(("layer_norm_weight", "layernorm.weight")) else name


def _generator(seed: int, name: str) -> "torch.Generator":
    import torch

    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return generator


def _tensor_parallel(parameter: Any) -> tuple[int, int, int, int]:
    """(split dimension, interleaved pieces, ranks, own rank); one rank when it is not split."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return 0, 1, 1, 0
    from megatron.core import parallel_state

    return (
        parameter.partition_dim,
        getattr(parameter, "partition_stride", 1),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _whole_shape(parameter: "nn.Parameter") -> list[int]:
    dim, _, ranks, _ = _tensor_parallel(parameter)
    shape = list(parameter.shape)
    shape[dim] *= ranks
    return shape


def _slice(whole: "torch.Tensor", parameter: "nn.Parameter") -> "torch.Tensor":
    """This rank's part; ``partition_stride`` 2 (x|z, gate|up) splits each half by itself."""
    import torch

    dim, pieces, ranks, rank = _tensor_parallel(parameter)
    if ranks == 1:
        return whole
    parts = [piece.chunk(ranks, dim)[rank] for piece in whole.chunk(pieces, dim)]
    return torch.cat(parts, dim)
