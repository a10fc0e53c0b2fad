"""The sides that are compared on one model, each in a process of its own: flash-linear-attention's
class, the code shipped with an export, and our model. On the GPU if there is one.

python -m tests.checkpoint.huggingface.model_sides SIDE FOLDER OUTPUT
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, WINDOW, STEPS = 512, 96, 6
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "attn": {"layers": [1, 3], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False}
    | {"window_size": WINDOW, "rope_theta": 10000.0},
    "vocab_size": VOCABULARY,
    "hidden_ratio": 4,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


def tokens(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(3, VOCABULARY, shape, generator=generator).to(DEVICE)


def make(folder: Path, output: Path, **fields: Any) -> None:
    """A model with random weights, written by flash-linear-attention's own class."""
    import fla.layers.attn
    from fla.models import SambaConfig, SambaForCausalLM

    if fla.layers.attn.flash_attn_func is None:
        # Its class asks for the package when it is made, and uses it when it is called.
        fla.layers.attn.flash_attn_func = object()
    torch.manual_seed(7)
    model = SambaForCausalLM(SambaConfig(**{**SIZES, **fields}))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            wave = torch.sin(torch.arange(parameter.numel()) + number).view(parameter.shape)
            parameter.add_(0.05 * wave)
    model.save_pretrained(output)


def exact_attention(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
    """What flash-attn computes, but in fp32, which it does not take: [b, L, heads, head dim]."""
    assert causal
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    allowed = (distance >= 0) & (distance <= window_size[0])
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed.to(q.device)
    ).transpose(1, 2)


def flash_linear_attention(folder: Path, output: Path) -> None:
    """Logits by its class, in bf16 and fp32."""
    half = load_fla(folder, torch.bfloat16)
    found = {"module": type(half).__module__, "bf16": logits(half)}
    torch.save(found | {"fp32": logits(load_fla(folder, torch.float32))}, output)


def flash_linear_attention_trains(folder: Path, output: Path) -> None:
    """Losses of its class in fp32."""
    torch.save(losses_of(load_fla(folder, torch.float32)), output)


def load_fla(folder: Path, dtype: torch.dtype) -> Any:
    import fla.layers.attn
    from transformers import AutoModelForCausalLM

    if dtype == torch.float32:
        fla.layers.attn.flash_attn_func = exact_attention
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE).eval()


def shipped(folder: Path, output: Path) -> None:
    """The same of the shipped code; with kernels and without, with the cache and without."""
    from transformers import AutoModelForCausalLM

    def load(dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        return model.to(DEVICE).eval()

    models = {"fp32": load(torch.float32), "bf16": load(torch.bfloat16)}
    results: dict[str, Any] = {"module": type(models["fp32"]).__module__}
    results["kernels"] = [name for name, _ in kernels(models["fp32"])]
    for name, model in models.items():
        results[name] = logits(model)
        results[f"{name} cached"] = in_pieces(model)
        ids = tokens(2, 30)
        results[f"{name} generated"] = [
            model.generate(ids, max_new_tokens=90, min_new_tokens=90, use_cache=cache).cpu()
            for cache in (True, False)
        ]
        results[f"{name} gradients"] = gradients(model)
    for name, module in kernels(models["fp32"]):
        setattr(module, name, None)
    for name, model in models.items():
        results[f"{name} in torch"] = logits(model)
        results[f"{name} gradients in torch"] = gradients(model)
    results["losses in torch"] = losses_of(load(torch.float32))
    torch.save(results, output)


def kernels(model: Any) -> list[tuple[str, Any]]:
    """(name, module that holds it) of the kernels that the shipped code has found."""
    modeling = sys.modules[type(model).__module__]
    operations = sys.modules[modeling.causal_convolution.__module__]
    names = (
        *((name, operations) for name in ("selective_scan_fn", "causal_conv1d_fn")),
        ("step_kernels", operations),
        *((name, modeling) for name in ("flash_attn_func", "flash_attn_with_kvcache")),
    )
    return [(name, module) for name, module in names if getattr(module, name) is not None]


def ours(checkpoint: Path, output: Path) -> None:
    """Logits in fp32 and losses by the model that trains."""
    from samba_megatron.checkpoint.huggingface.parity_sides import load_megatron

    model, _ = load_megatron(checkpoint)
    model = model.to(DEVICE)

    def positions(ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(ids.shape[1], device=DEVICE)[None].expand_as(ids)

    with torch.no_grad():
        found = [model(ids, positions(ids), None).float().cpu() for ids in prompts()]

    def loss(ids: torch.Tensor) -> Any:
        inputs = ids[:, :-1]
        return model(inputs, positions(inputs), None, labels=ids[:, 1:].contiguous()).mean()

    model.train()
    torch.save({"fp32": found, "losses": train(loss, model.parameters())}, output)


def prompts() -> list[torch.Tensor]:
    return [tokens(1, 17), tokens(1, 64), tokens(2, 300)]


def logits(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(ids, use_cache=False).logits.float().cpu() for ids in prompts()]


def in_pieces(model: Any) -> torch.Tensor:
    """Logits of the longest prompt: most of it at once, then a piece, then one by one."""
    cache, found = None, []
    with torch.no_grad():
        for piece in prompts()[-1].split([180, 60, *[1] * 60], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits.float().cpu())
    return torch.cat(found, dim=1)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    ids = tokens(2, 150)
    model(ids, labels=ids).loss.backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    model.zero_grad()
    model.eval()
    return found


def losses_of(model: Any) -> list[float]:
    """Of training steps of a transformers model."""
    model.train()
    return train(lambda ids: model(ids, labels=ids).loss, model.parameters())


def train(loss_of: Callable[[torch.Tensor], Any], parameters: Any) -> list[float]:
    """AdamW on one batch."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    ids, losses = tokens(4, 128), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


SIDES = {
    "make": make,
    "fla": flash_linear_attention,
    "fla_trains": flash_linear_attention_trains,
    "shipped": shipped,
    "ours": ours,
}


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False
    SIDES[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
