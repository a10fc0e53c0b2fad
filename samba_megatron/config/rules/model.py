"""Rules of the network alone, whatever it runs on."""

from collections.abc import Iterator

from samba_megatron.config.rules.situation import Situation, divisors, nearest


def heads_share_the_width(situation: Situation) -> Iterator[str]:
    """Without explicit ``kv_channels`` the heads divide the width."""
    model = situation.config.model
    heads = model.num_attention_heads
    if situation.has_attention and model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads {heads} does not divide model.hidden_size "
            f"{model.hidden_size}: use "
            f"{nearest(heads, divisors(model.hidden_size))}, or set model.kv_channels"
        )


def query_groups_share_the_heads(situation: Situation) -> Iterator[str]:
    """Every key/value head serves the same number of query heads."""
    model = situation.config.model
    if situation.has_attention and model.num_attention_heads % model.kv_heads:
        yield (
            f"model.num_query_groups {model.kv_heads} does not divide model.num_attention_heads "
            f"{model.num_attention_heads}: use {nearest(model.kv_heads, _groups(situation))}"
        )


def _groups(situation: Situation) -> list[int]:
    return divisors(situation.config.model.num_attention_heads)


def rotary_pairs(situation: Situation) -> Iterator[str]:
    """Rotary embedding turns pairs of a head's dimensions."""
    model = situation.config.model
    if (
        situation.has_attention
        and model.position_embedding_type == "rope"
        and model.head_dim % 2
        and (model.kv_channels is not None or model.hidden_size % model.num_attention_heads == 0)
    ):
        yield (
            f"heads have {model.head_dim} dimensions (model.kv_channels, or model.hidden_size / "
            "model.num_attention_heads), and model.position_embedding_type rope needs an even "
            f"number: {model.head_dim - 1 or 2} or {model.head_dim + 1}"
        )


def step_sizes(situation: Situation) -> Iterator[str]:
    """The range of initial step sizes is not empty."""
    model = situation.config.model
    if model.dt_min > model.dt_max:
        yield f"model.dt_min {model.dt_min} is over model.dt_max {model.dt_max}: swap them"


RULES = (heads_share_the_width, query_groups_share_the_heads, rotary_pairs, step_sizes)
