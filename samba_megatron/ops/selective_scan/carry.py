"""How a scan goes on from positions that another process holds."""

from typing import Protocol

from torch import Tensor


class Carry(Protocol):
    """Says what enters a stretch of time, in the place of an initial state.

    A scan calls it once forward, and once in the backward pass, where the gradient of the state
    comes from the stretch after. For that it runs through its positions once more, from a zero
    state and for the states only, unless it does so anyway.
    """

    def __call__(self, decay: Tensor, state: Tensor, backward_in_time: bool) -> Tensor:
        """What enters the stretch.

        Args:
            decay: the product of the stretch's decays, zero where a document starts in it; in any
                shape with an element for each sequence, channel and state.
            state: what the stretch leaves of a zero state, of the same shape; backward in time, of
                a zero gradient of its final state.
            backward_in_time: whether the gradient is carried, from the last stretch to the first.

        Returns:
            Of the same shape and dtype.
        """
        ...
