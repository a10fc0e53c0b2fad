"""A quantised export read back: what its packed numbers stand for.

No engine serves Samba from modelopt's format yet, and transformers does not read it: this is how an
export is checked, and how its weights are tried out.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from samba_megatron.checkpoint.huggingface.loading import shipped_class
from samba_megatron.platform.errors import UserError

DESCRIPTION = "hf_quant_config.json"
_SCALES = (".weight_scale", ".weight_scale_2", ".input_scale", ".pre_quant_scale")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float; the fourth bit is the sign."""


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors, as they lie there."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a quantised export under the model's names: packed ones in fp32, others as
    they are. What modelopt lets a layer multiply its input with is in the weight.

    Raises:
        UserError: the folder is no quantised export.
    """
    try:
        content = json.loads((folder / DESCRIPTION).read_text())["quantization"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no quantised export ({error}): name another") from None
    tensors = read_tensors(folder)
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALES):
            continue
        layer = name.removesuffix(".weight")
        if f"{layer}.weight_scale" in tensors:
            weights[name] = _unpacked(content["quant_algo"], tensor, layer, tensors)
        else:
            weights[name] = tensor
    return weights


def load_dequantized(folder: Path) -> Any:
    """The shipped class in fp32 with an export's weights; activations are not quantised."""
    shipped = shipped_class(folder)
    config = shipped.config_class.from_pretrained(folder)
    del config.quantization_config
    model = shipped(config).float()
    weights = dequantized(folder)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    model.load_state_dict(weights)
    return model.eval()


def _unpacked(
    kind: str, packed: torch.Tensor, layer: str, tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    scale = tensors[f"{layer}.weight_scale"].float()
    if kind == "NVFP4":
        low, high = packed & 15, packed >> 4
        values = torch.stack([_e2m1(low), _e2m1(high)], dim=-1).flatten(1)
        scale = scale * tensors[f"{layer}.weight_scale_2"].float()
    elif packed.dtype == torch.uint8:
        # Two rows of 4-bit integers in one.
        pairs = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1)
        values = (pairs.to(torch.int8) ^ 8).float() - 8
    else:
        values = packed.float()
    if scale.dim() == 1:
        scale = scale[:, None]
    elif scale.dim() == 2:
        scale = scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)
    weight = values * scale
    before = tensors.get(f"{layer}.pre_quant_scale")
    return weight if before is None else weight * before.float()


def _e2m1(codes: torch.Tensor) -> torch.Tensor:
    magnitudes = torch.tensor(_E2M1)[(codes & 7).long()]
    return torch.where(codes >= 8, -magnitudes, magnitudes)
