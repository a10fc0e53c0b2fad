"""What test_chosen_kernels runs on three ranks: runs whose second node lacks what others have.

The second rank's choice is changed where it is made, since on a CPU all nodes have the same.
"""

import os
import sys
from pathlib import Path

import pytest

from samba_megatron.config import RunConfig
from samba_megatron.platform import distributed
from samba_megatron.platform.errors import ExitWith, UserError
from samba_megatron.training import chosen_kernels
from samba_megatron.training.entry import train
from tests.distributed.run_layouts import configure
from tests.distributed.toy import toy_config, write_dataset


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
    original = chosen_kernels.chosen_kernels

    def another(config: RunConfig) -> dict[str, str]:
        return {**original(config), "rms_norm": f"kind_{rank}"}

    def refusing(config: RunConfig) -> dict[str, str]:
        raise UserError("kernels.rms_norm triton cannot run here: use torch")

    prefix = write_dataset(folder / f"data_{rank}")
    fields = {"training.train_steps": 4, "training.global_batch_size": 6}
    for lacking, ranks in ((another, (1,)), (refusing, (1,)), (another, (1, 2))):
        chosen_kernels.chosen_kernels = lacking if rank in ranks else original
        name = f"{lacking.__name__}_{len(ranks)}"
        with pytest.raises(UserError if len(ranks) > 1 else ExitWith) as refused:
            train(configure(toy_config(prefix, folder / name, **fields)))
        distributed.leave_layout()  # A failed run leaves it, as its process ends.
        print(f"rank {rank}, {name}: {refused.value}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
