"""Pretrains Samba: a recipe in, training out. Started by torchrun, srun, or alone.

torchrun --nproc-per-node 2 pretrain/pretrain_samba.py --config pretrain/recipes/samba_421m.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from samba_megatron.platform.errors import run_command


def main() -> int:
    """Parses the recipe and the overrides, and trains."""
    from samba_megatron.config.load import parse_run_config

    config = parse_run_config(sys.argv[1:])

    from samba_megatron.platform import distributed
    from samba_megatron.training.entry import train

    code = train(config)
    distributed.shutdown()
    return code


if __name__ == "__main__":
    run_command(main)
