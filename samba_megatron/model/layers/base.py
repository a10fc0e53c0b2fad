"""What a layer kind must say of itself."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from samba_megatron.config import ModelConfig

if TYPE_CHECKING:
    from samba_megatron.model.backend import Backend
    from samba_megatron.model.initialization import Initializer


@dataclass(frozen=True)
class RowGroups:
    """A matrix whose rows hold several Hugging Face tensors in turn, group after group."""

    parts: dict[str, int]
    """Hugging Face name → rows in one group, in the order of the rows."""

    groups: int = 1


@dataclass(frozen=True)
class SavedActivations:
    """Numbers a token that a layer keeps for its backward pass, by what lays hands on them.

    Operands are inputs of linear layers: a byte each where these are computed in FP8, like
    everything else two bytes in bf16.
    """

    stream: int
    """As wide as the residual stream: sequence parallelism alone splits them."""
    stream_operands: int
    """Operands of that width."""
    inner: int
    """Inside the layer: tensor parallelism splits them."""
    inner_operands: int
    """Operands inside the layer."""


@dataclass(frozen=True)
class RecomputablePart:
    """What it costs a token to compute one result of a layer again."""

    moved: int
    """Numbers read and written."""
    flops: float = 0.0
    """Floating-point operations, where the layer counts them."""
    inner: bool = True
    """Whether tensor parallelism splits it; else only sequence parallelism does."""


class LayerKind(Protocol):
    """One letter of the layer pattern. Counts are of the whole layer, unsplit, norm included.

    Nothing here imports torch or megatron until :meth:`spec` or :meth:`initializers` is called:
    planners and checks read the numbers for free.
    """

    symbol: str
    name: str

    def parameters(self, model: ModelConfig) -> int:
        """Trainable numbers of one layer."""
        ...

    def unsplit_parameters(self, model: ModelConfig) -> int:
        """Those of them that every tensor-parallel rank holds whole."""
        ...

    def fp32_parameters(self, model: ModelConfig) -> int:
        """Those that are fp32 whatever the dtype of the others."""
        ...

    def flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """Floating-point operations of the forward pass of one layer, a token of a sequence of
        ``sequence_length``; a multiply-add counts two. The backward pass does twice as many."""
        ...

    def linear_flops_per_token(self, model: ModelConfig) -> float:
        """Of :meth:`flops_per_token`, those of the linears that FP8 computes."""
        ...

    def recomputed_flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """Of :meth:`flops_per_token`, those that recomputing this layer kind alone
        (``recompute_modules``) does again."""
        ...

    def recomputable_parts(self, model: ModelConfig) -> Mapping[str, RecomputablePart]:
        """The results that ``recompute_modules`` can name in this kind of layer."""
        ...

    def saved_activations(
        self, model: ModelConfig, recomputed: Collection[str] = ()
    ) -> SavedActivations:
        """What one layer of the Transformer Engine backend keeps for its backward pass.

        Args:
            model: sizes.
            recomputed: what ``recompute_modules`` names.
        """
        ...

    def spec(self, backend: "Backend") -> Any:
        """The Megatron layer spec (``ModuleSpec``) over the backend's modules."""
        ...

    def initializers(self, model: ModelConfig, num_layers: int) -> "dict[str, Initializer]":
        """Initial values by parameter name within the layer; ``num_layers`` is the number of
        residual branches, by whose root the branches' last matrices are scaled down."""
        ...

    def huggingface_names(self, model: ModelConfig) -> dict[str, str | RowGroups]:
        """Where each of the layer's tensors goes in a Hugging Face block: checkpoint key within
        the layer → name within the block."""
        ...


def norm_part(model: ModelConfig) -> dict[str, RecomputablePart]:
    """The norm's output, which every kind of layer has."""
    return {"layernorm": RecomputablePart(moved=2 * model.hidden_size, inner=False)}


def linear_flops(rows: int, columns: int) -> int:
    """Forward operations of one token times a [rows, columns] matrix."""
    return 2 * rows * columns
