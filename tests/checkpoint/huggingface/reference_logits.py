"""Logits of checkpoints, by our model on one rank.

python -m tests.checkpoint.huggingface.reference_logits OUTPUT.pt CHECKPOINT…
"""

import sys
from pathlib import Path

import torch

from samba_megatron.checkpoint.huggingface import parity_sides
from samba_megatron.platform import distributed


def main() -> None:
    results = {}
    for path in sys.argv[2:]:
        target = Path(sys.argv[1]).with_suffix(".one")
        parity_sides.megatron_logits(Path(path), "float32", target)
        results[path] = torch.load(target)
        distributed.leave_layout()
    torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
