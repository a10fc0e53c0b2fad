"""What test_chosen_kernels runs on two ranks: runs whose second rank lacks what the first has.

The second rank's choice is changed where it is made, since on a CPU all nodes have the same.
"""

import os
import sys
from pathlib import Path

import pytest

from samba_megatron.config import RunConfig
from samba_megatron.platform import distributed
from samba_megatron.platform.errors import UserError
from samba_megatron.training import chosen_kernels
from samba_megatron.training.entry import train
from tests.distributed.run_layouts import configure
from tests.distributed.toy import toy_config, write_dataset


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
    original = chosen_kernels.chosen_kernels

    def another(config: RunConfig, implementation: str) -> dict[str, str]:
        return {**original(config, implementation), "rms_norm": "torch_of_another_kind"}

    def refusing(config: RunConfig, implementation: str) -> dict[str, str]:
        raise UserError("kernels.rms_norm triton cannot run here: use torch")

    prefix = write_dataset(folder / f"data_{rank}")
    for lacking in (another, refusing):
        if rank == 1:
            chosen_kernels.chosen_kernels = lacking
        with pytest.raises(UserError) as refused:
            train(configure(toy_config(prefix, folder / "run", **{"training.train_steps": 4})))
        distributed.leave_layout()  # A failed run leaves it, as its process ends.
        print(f"rank {rank}, {lacking.__name__}: {refused.value}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
