"""Numbers of tokens and bytes as people write them: ``20B``, ``3.2T``, ``500M``; ``5GB``.

The suffixes are decimal (K = 1000), as papers use them: a sequence of 4096 tokens is 4096, not 4K.
"""

import re
from decimal import Decimal

from samba_megatron.platform.errors import UserError

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
"""Decimal suffixes of a number of tokens."""

TOKENS_ALLOWED = "a whole number of tokens such as 2000000, 500M, 20B or 3.2T"
"""What :func:`parse_tokens` reads, for error messages."""

MOST_TOKENS = 10**18
"""More is a slip of the pen, and would not fit the counters that 64 bits hold."""

_NUMBER = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*([KMBT]?)", re.IGNORECASE)

_BYTES = {"B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]B?|B)?", re.IGNORECASE)


def parse_tokens(value: str | int | float) -> int:
    """Reads a number of tokens, with or without a suffix.

    Raises:
        ValueError: it is no whole, non-negative number of tokens.
    """
    match = _NUMBER.fullmatch(str(value).strip())
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is not {TOKENS_ALLOWED}")
    tokens = Decimal(match[1].replace("_", "")) * SUFFIXES[match[2].upper()]
    if tokens != tokens.to_integral_value() or tokens > MOST_TOKENS:
        raise ValueError(f"{value!r} is not {TOKENS_ALLOWED}")
    return int(tokens)


def parse_bytes(option: str, value: str, unit: str = "B") -> int:
    """Reads a size, with ``K``, ``M``, ``G`` or ``T`` (decimal), with or without ``B``.

    Args:
        option: where it was written, for the message.
        value: as it was written.
        unit: that of a bare number.

    Raises:
        UserError: it is no size, or none of a byte at least.
    """
    match = _SIZE.fullmatch(value.strip())
    size = int(Decimal(match[1]) * _BYTES[(match[2] or unit)[0].upper()]) if match else 0
    if size < 1:
        raise UserError(f"{option} is {value!r}: write a size such as 5GB or 500MB")
    return size


def format_tokens(tokens: int) -> str:
    """The shortest exact way to write ``tokens``: ``20B`` for 20,000,000,000."""
    written = [str(tokens)]
    for suffix, size in SUFFIXES.items():
        thousandths, rest = divmod(tokens * 1000, size)
        if tokens >= size and rest == 0:
            written.append(f"{(Decimal(thousandths) / 1000).normalize():f}{suffix}")
    return min(reversed(written), key=len)
