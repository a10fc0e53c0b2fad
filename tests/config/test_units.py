import pytest
from hypothesis import given
from hypothesis import strategies as st

from samba_megatron.config.units import format_tokens, parse_bytes, parse_tokens
from samba_megatron.platform.errors import UserError


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        ("20B", 20_000_000_000),
        ("3.2T", 3_200_000_000_000),
        ("0.001M", 1000),
        ("500k", 500_000),
        ("1.5 B", 1_500_000_000),
        ("2_000_000", 2_000_000),
        ("1e9", 1_000_000_000),
        ("4096", 4096),
        (4096, 4096),
        (2.0e9, 2_000_000_000),
        ("0", 0),
    ],
)
def test_suffixes_are_decimal_and_exact(written, tokens):
    assert parse_tokens(written) == tokens


@pytest.mark.parametrize(
    "written", ["", "B", "20G", "-5", "1.5", "0.0001K", "20BB", "nan", "1e99", True]
)
def test_what_is_no_number_of_tokens_is_refused(written):
    with pytest.raises(ValueError, match="whole number of tokens"):
        parse_tokens(written)


@given(st.integers(0, 10**15))
def test_writing_and_reading_is_exact(tokens):
    assert parse_tokens(format_tokens(tokens)) == tokens


def test_the_shortest_suffix_is_written():
    assert [format_tokens(n) for n in (20 * 10**9, 3200 * 10**9, 1_048_576, 999, 1500)] == [
        "20B",
        "3.2T",
        "1048576",
        "999",
        "1.5K",
    ]


@pytest.mark.parametrize(
    ("written", "unit", "size"),
    [
        ("5GB", "B", 5 * 10**9),
        ("0.5 g", "B", 5 * 10**8),
        ("300b", "MB", 300),
        ("12", "B", 12),
        ("2.5", "MB", 2_500_000),
    ],
)
def test_sizes_have_units_or_the_options_own(written, unit, size):
    assert parse_bytes("--size", written, unit) == size


@pytest.mark.parametrize("written", ["", "GB", "5XB", "-1", "0", "1e9"])
def test_what_is_no_size_is_refused_by_option(written):
    with pytest.raises(UserError, match=f"--size is '{written}': write a size"):
        parse_bytes("--size", written)
