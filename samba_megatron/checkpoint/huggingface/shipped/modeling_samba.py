"""Samba for transformers (4.57 and 5), shipped with every exported model.

Samba (arXiv 2406.07522): blocks of a mixer, Mamba-1 (arXiv 2312.00752) or attention in a sliding
window, and a SwiGLU MLP. mamba-ssm, causal-conv1d and flash-attn are used on a GPU when they are
installed, and Triton for single tokens, else plain torch. A :class:`SambaCache` holds the last keys
and values of each window in a ring, and the state of each convolution and scan: memory and time of
a generated token do not depend on the length of the context. (Only attention without a window keeps
all its keys.)

Shapes: b sequences of L tokens, width d, E Mamba channels with N states each.
"""

import math
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .cache_samba import AttentionState, MambaState, SambaCache
from .configuration_samba import SambaConfig, SambaHybridConfig
from .operations_samba import causal_convolution, rotate, selective_scan

try:
    from flash_attn import flash_attn_func, flash_attn_with_kvcache
except ImportError:
    flash_attn_func = flash_attn_with_kvcache = None

logger = logging.get_logger(__name__)
_TRANSFORMERS = int(transformers.__version__.split(".")[0])
_QUERY_BLOCK = 512
"""Queries that attend at a time: scores are this by this and the window."""


class SambaRMSNorm(nn.Module):
    """RMSNorm with a weight, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] → [..., d]."""
        if x.dtype == self.weight.dtype:
            # One kernel, which computes in fp32 as well.
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class SambaMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, L, d] → [b, L, d]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SambaMamba(nn.Module):
    """Mamba-1 mixer."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__()
        d, e = config.hidden_size, config.intermediate_size
        self.rank, self.n = config.time_step_rank, config.state_size
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv1d = nn.Conv1d(e, e, config.conv_kernel, groups=e, bias=True)
        self.x_proj = nn.Linear(e, self.rank + 2 * self.n, bias=False)
        self.dt_proj = nn.Linear(self.rank, e, bias=True)
        self.A_log = nn.Parameter(torch.zeros(e, self.n))
        self.D = nn.Parameter(torch.ones(e))
        self.out_proj = nn.Linear(e, d, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotary: Any, state: MambaState | None
    ) -> Tensor:
        """[b, L, d] → [b, L, d]; ``mask`` [b, L] is false on padding, which leaves no trace."""
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        if mask is not None:
            x = x * mask[:, None]
        before = None if state is None else state.conv
        x, last_inputs = causal_convolution(x, self.conv1d.weight, self.conv1d.bias, before)
        if mask is not None:
            x = x * mask[:, None]
        projected = self.x_proj(x.transpose(1, 2))
        dt, b, c = projected.split([self.rank, self.n, self.n], dim=-1)
        y, last_state = selective_scan(
            x,
            F.linear(dt, self.dt_proj.weight.to(dt.dtype)).transpose(1, 2),
            -torch.exp(self.A_log.float()),
            b.transpose(1, 2),
            c.transpose(1, 2),
            self.D.float(),
            z,
            self.dt_proj.bias.float(),
            None if state is None else state.scan,
        )
        if state is not None:
            state.conv, state.scan = last_inputs, last_state
        return self.out_proj(y.transpose(1, 2))


class SambaAttention(nn.Module):
    """Causal grouped-query attention; ``window`` keys a query, itself included (None: all)."""

    def __init__(self, config: SambaConfig, window: int | None) -> None:
        super().__init__()
        self.config = config
        self.window = window
        self.heads, self.kv_heads = config.attn["num_heads"], config.attention_kv_heads
        self.head_dim = config.attention_head_dim
        d, inner = config.hidden_size, self.heads * self.head_dim
        shared, bias = self.kv_heads * self.head_dim, bool(config.attn.get("qkv_bias"))
        self.q_proj = nn.Linear(d, inner, bias=bias)
        self.k_proj = nn.Linear(d, shared, bias=bias)
        self.v_proj = nn.Linear(d, shared, bias=bias)
        self.o_proj = nn.Linear(inner, d, bias=False)
        if config.short_convolution:
            for name, channels in (("q", inner), ("k", shared), ("v", shared)):
                taps = nn.Conv1d(
                    channels, channels, config.conv_kernel, groups=channels, bias=False
                )
                self.add_module(f"{name}_conv1d", taps)

    def forward(
        self, x: Tensor, mask: Tensor | None, rotary: Any, state: AttentionState | None
    ) -> Tensor:
        """[b, L, d] → [b, L, d]; ``mask`` [b, L] is false on padding."""
        q, k, v = (self._project(x, name, mask, state) for name in ("q", "k", "v"))
        q, k = rotate(q, k, rotary)
        valid = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        one_by_one = False
        if state is not None:
            one_by_one = x.shape[1] == 1
            k, v, valid = state.extend(k, v, valid)
        y = self._attend(q, k, v, None if mask is None else valid, one_by_one)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _project(
        self, x: Tensor, name: str, mask: Tensor | None, state: AttentionState | None
    ) -> Tensor:
        """[b, L, d] → [b, heads, L, head dim] of queries, keys or values."""
        flat = getattr(self, f"{name}_proj")(x)
        if self.config.short_convolution:
            flat = flat if mask is None else flat * mask[..., None]
            before = None if state is None else getattr(state, f"conv_{name}")
            weight = getattr(self, f"{name}_conv1d").weight
            convolved, last = causal_convolution(flat.transpose(1, 2), weight, None, before)
            flat = convolved.transpose(1, 2)
            if state is not None:
                setattr(state, f"conv_{name}", last)
        return flat.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, one_by_one: bool
    ) -> Tensor:
        """q [b, heads, L, hd] over k and v [b, kv heads, n, hd], whose last L are q's own."""
        eager = getattr(self.config, "_attn_implementation", None) == "eager"
        half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
        flash = flash_attn_func is not None and half and valid is None and not eager
        if one_by_one and flash and not torch.is_grad_enabled():
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            return flash_attn_with_kvcache(q, k, v).transpose(1, 2)
        if one_by_one:
            return self._softmax(q, k, v, None if valid is None else valid[:, None, None])
        if flash:
            reach = (-1, -1) if self.window is None else (self.window - 1, 0)
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            return flash_attn_func(q, k, v, causal=True, window_size=reach).transpose(1, 2)
        total, offset, outputs = k.shape[2], k.shape[2] - q.shape[2], []
        for start in range(0, q.shape[2], _QUERY_BLOCK):
            queries = q[:, :, start : start + _QUERY_BLOCK]
            stop = offset + start + queries.shape[2]
            first = 0 if self.window is None else max(0, offset + start - self.window + 1)
            rows = torch.arange(offset + start, stop, device=q.device)[:, None]
            columns = torch.arange(first, min(stop, total), device=q.device)
            allowed = columns <= rows
            if self.window is not None:
                allowed &= columns > rows - self.window
            if valid is not None:
                # Padding may see itself, so that no softmax is over nothing.
                seen = valid[:, None, None, first:stop] | (columns == rows)
                allowed = allowed & seen
            outputs.append(
                self._softmax(queries, k[:, :, first:stop], v[:, :, first:stop], allowed)
            )
        return torch.cat(outputs, dim=2)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        """Attention where ``allowed`` [b or 1, 1, L or 1, n]; no copies of shared keys."""
        batch, _, length, dim = q.shape
        # The heads of one group become rows of one query matrix.
        q = q.reshape(batch, self.kv_heads, -1, dim)
        if allowed is not None:
            allowed = allowed.expand(batch, 1, length, k.shape[2])
            allowed = allowed.repeat(1, 1, self.heads // self.kv_heads, 1)
        if getattr(self.config, "_attn_implementation", None) == "eager":
            scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(dim)
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -math.inf)
            y = scores.softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return y.reshape(batch, self.heads, length, dim)


class SambaBlock(GradientCheckpointingLayer):
    """x += mixer(norm x), then x += mlp(norm x); a block of a variant may lack one of them."""

    def __init__(self, config: SambaConfig, mixer: str | None, mlp: bool) -> None:
        super().__init__()
        norm = (config.hidden_size, config.norm_eps)
        self.mixer_norm: Any = None
        self.mixer: Any = None
        self.mlp_norm: Any = None
        self.mlp: Any = None
        if mixer is not None:
            self.mixer_norm = SambaRMSNorm(*norm)
            window = config.attn.get("window_size") if mixer == "*" else None
            self.mixer = SambaMamba(config) if mixer == "M" else SambaAttention(config, window)
        if mlp:
            self.mlp_norm = SambaRMSNorm(*norm)
            self.mlp = SambaMLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, rotary: Any, state: Any) -> Tensor:
        """[b, L, d] → [b, L, d]."""
        if self.mixer is not None:
            x = x + self.mixer(self.mixer_norm(x), mask, rotary, state)
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x


class SambaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights."""

    config_class: Any = SambaConfig
    base_model_prefix = "backbone"
    _no_split_modules: ClassVar[list[str]] = ["SambaBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True

    def __init__(self, config: SambaConfig) -> None:
        super().__init__(config)
        if any(letter == "M" for letter, _ in config.blocks):
            # transformers 4 wants names of modules, and only such as the model has.
            step = "dt_proj.bias" if _TRANSFORMERS >= 5 else "dt_proj"
            self._keep_in_fp32_modules_strict = ["A_log", "D", step]

    def _init_weights(self, module: nn.Module) -> None:
        config = self.config
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=config.initializer_range)
        elif isinstance(module, nn.Conv1d):
            bound = config.conv_kernel**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, SambaRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, SambaMamba):
            self._init_mamba(module)

    def _init_mamba(self, module: SambaMamba) -> None:
        """Step sizes log-uniform, A = -1 … -N in every channel, D = 1."""
        config, bound = self.config, module.rank**-0.5 * self.config.time_step_scale
        nn.init.ones_(module.D)
        nn.init.uniform_(module.dt_proj.weight, -bound, bound)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        with torch.no_grad():
            if not getattr(module.A_log, "_is_hf_initialized", False):
                states = torch.arange(1, module.n + 1, device=module.A_log.device)
                module.A_log.copy_(torch.log(states.float()))
            if not getattr(module.dt_proj.bias, "_is_hf_initialized", False):
                drawn = torch.empty_like(module.dt_proj.bias, dtype=torch.float32)
                dt = drawn.uniform_(low, high).exp().clamp(min=config.time_step_floor)
                module.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class SambaModel(SambaPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__(config)
        self.embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SambaBlock(config, *block) for block in config.blocks)
        self.norm_f = SambaRMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [b, L, d] of tokens [b, L].

        Args:
            input_ids: the tokens; or ``inputs_embeds``, their embeddings [b, L, d].
            attention_mask: [b, tokens so far], 0 on padding, which must be on the left.
            position_ids: [b, L]; counted from the mask when absent.
            past_key_values: what an earlier call has returned; changed in place.
            use_cache: return a cache.
        """
        if kwargs.get("output_attentions"):
            logger.warning_once("output_attentions is ignored: the weights are not kept")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.training and self.gradient_checkpointing:
            use_cache = False
        elif use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = self._cache(past_key_values) if use_cache else None
        past = 0 if cache is None else cache.seen
        mask, positions = self._mask_and_positions(x, attention_mask, position_ids, past)
        if cache is not None:
            # Once there was padding, rings hold slots that must be masked for ever.
            cache.padded = cache.padded or mask is not None
            if cache.padded and mask is None:
                mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        rotary = self._rotary(positions) if self.config.use_rope else None
        collected: list[Tensor] = []
        for index, block in enumerate(self.layers):
            collected.append(x)
            x = block(x, mask, rotary, None if cache is None else cache.states[index])
        x = self.norm_f(x)
        if cache is not None:
            cache.seen += x.shape[1]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*collected, x) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _cache(self, given: Any) -> SambaCache:
        if given is None:
            return SambaCache(self.config)
        if not isinstance(given, SambaCache):
            raise TypeError(f"past_key_values must be a SambaCache, not {type(given).__name__}")
        return given

    def _mask_and_positions(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int
    ) -> tuple[Tensor | None, Tensor]:
        """The new tokens' mask [b, L], None where nothing is padding, and positions [b or 1, L]."""
        length, mask = x.shape[1], None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] not in (length, past + length):
                raise ValueError(f"attention_mask must be [batch, {past + length}]")
            padding = attention_mask == 0
            if bool(padding.any()):
                mask = ~padding[:, -length:]
                if position_ids is None:
                    position_ids = ((~padding).long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)[None]
        return mask, position_ids

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [b or 1, L, head dim / 2] in fp32."""
        dim = self.config.attention_head_dim
        exponents = torch.arange(0, dim, 2, device=positions.device).float() / dim
        angles = positions[..., None].float() / self.config.attn["rope_theta"] ** exponents
        return angles.cos(), angles.sin()


class SambaForCausalLM(SambaPreTrainedModel, GenerationMixin):
    """Samba with its head."""

    _tied_weights_keys = (
        {"lm_head.weight": "backbone.embeddings.weight"}
        if _TRANSFORMERS >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config: SambaConfig) -> None:
        super().__init__(config)
        self.backbone = SambaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.backbone.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the head."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits [b, L, vocabulary], and the loss where ``labels`` [b, L] are given.

        ``logits_to_keep``: only of so many last tokens (0: all), or of the given ones.
        """
        output = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            output_attentions=kwargs.pop("output_attentions", None),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = SambaCache(self.config)


class SambaHybridForCausalLM(SambaForCausalLM):
    """A variant of Samba that needs this file."""

    config_class = SambaHybridConfig
