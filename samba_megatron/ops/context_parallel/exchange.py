"""Messages between the ranks of a group, all of one exchange in flight together.

Everything that context parallelism sends goes through here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, Work


class Message(NamedTuple):
    """A tensor and the rank within the group that it goes to or comes from."""

    tensor: Tensor
    """Contiguous."""
    peer: int


class Exchange:
    """Messages under way; the tensors must not be touched before :meth:`wait`."""

    def __init__(
        self, sends: Sequence[Message], receives: Sequence[Message], group: ProcessGroup
    ) -> None:
        """Posts all messages and returns at once. Empty tensors are neither sent nor received.

        Every rank that is sent to must post the matching receive in the same exchange: one message
        at most between two ranks in either direction.
        """
        operations = [
            P2POp(function, message.tensor, group=group, group_peer=message.peer)
            for function, messages in (
                (torch.distributed.isend, sends),
                (torch.distributed.irecv, receives),
            )
            for message in messages
            if message.tensor.numel()
        ]
        # What is sent is kept alive until it has gone.
        self._tensors = [message.tensor for message in (*sends, *receives)]
        self._works: list[Work] = (
            torch.distributed.batch_isend_irecv(operations) if operations else []
        )

    def wait(self) -> None:
        """Waits for all messages; on a GPU it is the current stream that waits."""
        for work in self._works:
            work.wait()
        self._works, self._tensors = [], []
