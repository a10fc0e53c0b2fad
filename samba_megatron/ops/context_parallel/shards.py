"""Which positions of a sequence a rank holds."""

from torch import Tensor
from torch.distributed import ProcessGroup


def own_positions(whole: Tensor, group: ProcessGroup | None, dim: int = 0) -> Tensor:
    """A rank's positions of something that every rank has of the whole sequence: a view.

    Args:
        whole: positions along ``dim``, as many for each rank.
        group: the ranks that hold the sequence; None: all of it.
        dim: where the positions are.
    """
    if group is None or group.size() == 1:
        return whole
    length, rest = divmod(whole.shape[dim], group.size())
    if rest:
        raise ValueError(f"{whole.shape[dim]} positions do not make {group.size()} equal pieces")
    return whole.narrow(dim, group.rank() * length, length)
