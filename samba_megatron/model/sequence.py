"""What the layers know of their sequences besides the hidden states: where documents begin.

Megatron hands one object from the model to every layer, whatever is recomputed on the way: the
argument ``packed_seq_params``. Ours takes that way. Its format is not Megatron's packed one ("thd",
one row of documents without a batch): hidden states stay [s, b, h], and Megatron's own code reads
nothing of it but the length of the sequence, for the rotary embedding.

The sequences of a micro-batch may lie end to end, as one row [b·s, 1, h]: what works on a position
at a time does not see the difference, and the operations that look back get a view of them side by
side (:meth:`SequenceParams.apart`). Attention kernels want them so, and need no copies then.

Rotary positions count from the start of the sequence, not of the document: attention sees only
their differences.
"""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from samba_megatron.ops.continued import Past
from samba_megatron.ops.windowed_attention.packing import PackedDocuments, pack_documents


@dataclass
class SequenceParams(PackedSeqParams):
    """The sequences of one micro-batch.

    ``max_seqlen_q`` and ``max_seqlen_kv``, which Megatron's rotary embedding reads, are the length
    of the whole sequence, before tensor parallelism or anything else divides it.
    """

    reset: Tensor | None = None
    """bool [s, b], True where a document begins and nothing before it may be seen. Of the whole
    sequence on every rank, however sequence and context parallelism divide the hidden states."""

    past: Past | None = None
    """What precedes these positions, where a sequence is computed piece by piece."""

    sequences: int = 1
    """How many lie end to end in the one row of hidden states; 1: the batch lies side by side."""

    document_start: Tensor | None = None
    """``reset`` on the CPU, [b, s]: what makes something of it there need not wait for a device."""

    room: int | None = None
    """Packed forms are made for so many documents, whatever there are; None: for those."""

    _packed: dict[tuple[int, int, int], PackedDocuments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qkv_format is not None:
            raise ValueError(f"sequences lie as [s, b, h], not in the format {self.qkv_format}")

    def apart(self, x: Tensor) -> Tensor:
        """Sequences side by side: [b·s, 1, …] → [s, b, …], a view."""
        if self.sequences == 1:
            return x
        return x.unflatten(0, (self.sequences, -1)).squeeze(2).transpose(0, 1)

    def joined(self, y: Tensor) -> Tensor:
        """The inverse of :meth:`apart`; a copy if ``y``'s memory has sequences side by side."""
        return y if self.sequences == 1 else y.transpose(0, 1).flatten(0, 1).unsqueeze(1)

    def packed(self, keys: slice, queries: int) -> PackedDocuments | None:
        """Documents end to end, for attention kernels that want them so; made once for all layers.

        Args:
            keys: positions of the keys.
            queries: how many of them, the last ones, are queries'.
        """
        if self.document_start is None or self.reset is None:
            return None
        stretch = (keys.start, keys.stop, queries)
        if stretch not in self._packed:
            self._packed[stretch] = self._pack(stretch).to(self.reset.device)
        return self._packed[stretch]

    def _pack(self, stretch: tuple[int, int, int]) -> PackedDocuments:
        """Of (first key, one past the last, queries); on the CPU."""
        assert self.document_start is not None
        start, stop, queries = stretch
        documents = pack_documents(self.document_start.t()[start:stop], queries)
        return documents if self.room is None else documents.filled(self.room, stop - start)

    def renew(self, document_start: Tensor) -> None:
        """The sequences of another batch, in the memory of these.

        Args:
            document_start: of the same shape, on the CPU, with no more documents than there is
                ``room`` for.
        """
        assert self.reset is not None and self.room is not None
        self.document_start = document_start
        self.reset.copy_(document_start.t(), non_blocking=True)
        for stretch, packed in self._packed.items():
            new = self._pack(stretch)
            packed.query_ends.copy_(new.query_ends, non_blocking=True)
            packed.key_ends.copy_(new.key_ends, non_blocking=True)


def documents_apart(
    document_start: Tensor, device: torch.device | str, end_to_end: bool = False
) -> SequenceParams:
    """The sequences of a batch whose documents must not see each other.

    Args:
        document_start: bool [b, s], True at the first token of a document. Where it lies on the
            CPU, nothing here waits for ``device``.
        device: where the layers compute.
        end_to_end: whether the model gets the sequences as one row.
    """
    reset = document_start.t()
    length, batch = reset.shape
    return SequenceParams(
        max_seqlen_q=length,
        max_seqlen_kv=length,
        reset=reset.to(device, non_blocking=True).contiguous(),
        document_start=document_start,
        sequences=batch if end_to_end else 1,
    )


def piece_of(sequence: SequenceParams | None, length: int, past: Past) -> SequenceParams:
    """A piece of a sequence.

    Args:
        sequence: where the whole one's documents begin; None: it is one.
        length: of the piece.
        past: where it lies and what precedes it.
    """
    whole = sequence or SequenceParams()
    return SequenceParams(
        max_seqlen_q=length,
        max_seqlen_kv=length,
        reset=whole.reset,
        past=past,
        document_start=whole.document_start,
    )


def sequence_params(packed_seq_params: PackedSeqParams | None) -> SequenceParams:
    """A layer's argument ``packed_seq_params`` as ours; without one, one long document."""
    if packed_seq_params is None:
        return SequenceParams()
    if not isinstance(packed_seq_params, SequenceParams):
        raise NotImplementedError("these layers take no sequences in Megatron's packed format")
    return packed_seq_params
