import pytest
from hypothesis import given
from hypothesis import strategies as st

from samba_megatron.config.units import format_tokens, parse_tokens


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
