"""Exports by their own code, whatever else in the process goes by their name."""

import json
from pathlib import Path
from typing import Any

from samba_megatron.platform.errors import UserError


def shipped_class(folder: Path) -> Any:
    """The model class in an export's own files, with ``config_class`` and ``from_pretrained``.

    Raises:
        UserError: the folder brings no code.
    """
    if _own_class(folder) is None:
        raise UserError(
            f"{folder} brings no code of its own (auto_map in config.json): make it with "
            "convert_checkpoint.py to-hf"
        )
    return model_class(folder)


def model_class(folder: Path) -> Any:
    """The class to load a Hugging Face folder with: its own, or the one that transformers has.

    ``AutoModelForCausalLM`` gives flash-linear-attention's for an export once anything has imported
    that, and packages import what they find installed.
    """
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = _own_class(folder)
    return get_class_from_dynamic_module(own, str(folder)) if own else AutoModelForCausalLM


def _own_class(folder: Path) -> str | None:
    """As in "modeling_samba.SambaForCausalLM"."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name: str | None = config.get("auto_map", {}).get("AutoModelForCausalLM")
    return name
