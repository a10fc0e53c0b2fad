"""Exports by their own code, whatever else in the process goes by their name."""

import json
from pathlib import Path
from typing import Any

from samba_megatron.platform.errors import UserError


def shipped_class(folder: Path) -> Any:
    """The model class in an export's own files, with ``config_class`` and ``from_pretrained``.

    ``AutoModelForCausalLM`` gives flash-linear-attention's once anything has imported that, and
    packages import what they find installed.

    Raises:
        UserError: the folder brings no code.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    if "AutoModelForCausalLM" not in named:
        raise UserError(
            f"{folder} brings no code of its own (auto_map in config.json): make it with "
            "convert_checkpoint.py to-hf"
        )
    return get_class_from_dynamic_module(named["AutoModelForCausalLM"], str(folder))
