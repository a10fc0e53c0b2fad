"""Program of two processes that build the same samples: alone at once, then together.

Run as ``two_ranks.py RANK FOLDER TRAIN VALID``; prints one line of JSON.
"""

import hashlib
import json
import sys

import torch

from samba_megatron.config.data import DataConfig
from samba_megatron.data import sample_index
from samba_megatron.data.datasets import build_train_and_valid
from samba_megatron.platform.errors import UserError


def digest(dataset) -> str:
    """A hash of all samples."""
    result = hashlib.sha256()
    for index in range(len(dataset)):
        result.update(dataset[index]["tokens"].numpy().tobytes())
    return result.hexdigest()


def note_orders() -> list[str]:
    """The datasets whose order this process makes, from now on."""
    made, make = [], sample_index.epoch_order

    def noting(part, *settings):
        made.append(part.prefix)
        return make(part, *settings)

    sample_index.epoch_order = noting
    return made


def build(folder: str, cache: str, train: str, valid: str) -> str:
    """Builds a blend of two and gives its hash."""
    data = DataConfig(
        data_path=["0.7", train, "0.3", valid],
        valid_data_path=[valid],
        path_to_cache=f"{folder}/{cache}",
        sequence_length=128,
    )
    train_samples, valid_samples = build_train_and_valid(data, 3000, 50, random_seed=7)
    return digest(train_samples) + digest(valid_samples)


def main() -> None:
    """Runs one of the two processes."""
    rank, folder, train, valid = int(sys.argv[1]), *sys.argv[2:]
    made = note_orders()
    found = {"alone": build(folder, "raced", train, valid)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    made.clear()
    found["together"] = build(folder, "shared", train, valid)
    assert bool(made) == (rank == 0), f"rank {rank} has made the orders of {made}"
    try:
        build(folder, "shared", train, "/nowhere")
    except UserError as error:
        found["error"] = str(error)
    torch.distributed.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
