"""The layer kinds of Samba and its ablations, each in a file that owns all there is to say of it.

``KINDS`` maps a letter of the layer pattern to its kind; everything that is summed over layers
(parameters, FLOPs, names, initial values) asks the kinds.
"""

from samba_megatron.model.layers.attention import FullAttentionKind, WindowedAttentionKind
from samba_megatron.model.layers.base import LayerKind
from samba_megatron.model.layers.mamba import MambaKind
from samba_megatron.model.layers.mlp import MLPKind

KINDS: dict[str, LayerKind] = {
    kind.symbol: kind
    for kind in (MambaKind(), WindowedAttentionKind(), FullAttentionKind(), MLPKind())
}

__all__ = ["KINDS", "LayerKind"]
