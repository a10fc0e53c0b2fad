"""The rotary embedding of contiguous pieces of sequences, or of sequences laid end to end; and who
applies it."""

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from torch.distributed import ProcessGroup

from samba_megatron.config import KernelsConfig, ModelConfig


class ShardedRotaryEmbedding(RotaryEmbedding):
    """megatron's, for the piece of the sequence that a context-parallel rank has.

    megatron's own gives each rank one piece from the front and one from the back, so that causal
    attention without a window costs all of them the same; a scan and a window want one piece, in
    the order of the ranks.
    """

    start = 0
    """First position of what the model is given, where that is a piece of a sequence."""

    sequences = 1
    """How many sequences lie end to end in what the model is given."""

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: ProcessGroup | None = None,
    ) -> Tensor:
        """Angles of this rank's positions, [max_seq_len / ranks, 1, 1, kv_channels]; those of
        sequences end to end one after the other.

        Args:
            max_seq_len: length of the whole sequence.
            offset: of its first position.
            packed_seq: must be false.
            cp_group: the ranks that share the sequence, where they are not those it was built with.
        """
        if packed_seq:
            raise NotImplementedError("sequences in Megatron's packed format are not cut in pieces")
        group = cp_group or self.cp_group
        own = max_seq_len // group.size()
        angles = self.get_emb(own, self.start + offset + group.rank() * own)
        return angles.repeat(self.sequences, 1, 1, 1)


def splits_and_rotates(model: ModelConfig, kernels: KernelsConfig, tensor_parallel: int) -> bool:
    """Whether this project's kernel splits the joined projection and applies the rotary embedding.

    It cannot where something comes between the two: a short convolution, or the choice of a rank's
    queries among those of a key/value head that several ranks share.

    Args:
        model: sizes.
        kernels: choices of implementation.
        tensor_parallel: ranks that share the heads.
    """
    from samba_megatron.ops.rotary.triton_rotary import BACKEND

    wanted = kernels.rotary
    own = BACKEND.unavailable() is None if wanted == "auto" else wanted != "megatron"
    return (
        own
        and model.position_embedding_type == "rope"
        and not model.short_convolution
        and tensor_parallel <= model.kv_heads
    )
