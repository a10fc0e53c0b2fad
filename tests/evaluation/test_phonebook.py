"""Phonebooks: the asked name is in the book and not among the examples; answers are exact."""

import pytest

from samba_megatron.evaluation.phonebook import Phonebook, build_phonebook, first_line
from samba_megatron.evaluation.prompts import PhonebookPrompt
from samba_megatron.platform.errors import UserError


@pytest.mark.parametrize("pairs", [3, 20, 1850])
def test_a_book(pairs):
    text = build_phonebook(PhonebookPrompt(), pairs, "seed")
    assert text == build_phonebook(PhonebookPrompt(), pairs, "seed")
    assert text != build_phonebook(PhonebookPrompt(), pairs, "another")
    book, rest = text.prompt.split("\n\n")
    entries = book.split("\n")
    first, second, asked = rest.split("\n")
    assert len(set(entries)) == pairs == len({entry.split(":")[0] for entry in entries})
    assert {first, second} <= set(entries) and first != second
    assert f"{asked} {text.number}" in set(entries) - {first, second}
    assert all(len(entry.split(": ")[1]) == 10 for entry in entries)


def test_books_that_cannot_be():
    with pytest.raises(UserError, match="phonebook of 2 pairs cannot be made: take 3 to 4096"):
        build_phonebook(PhonebookPrompt(), 2, "seed")
    with pytest.raises(UserError, match="phonebook of 5000 pairs"):
        Phonebook(pairs=(20, 5000)).cases()


def test_the_papers_sizes():
    assert len(Phonebook().cases()) == 10 * 128
    assert {20, 480, 1850} <= set(Phonebook().pairs)


@pytest.mark.parametrize(
    ("text", "line"), [(" 0123456789\nAda", "0123456789"), ("012", "012"), ("\n012", "")]
)
def test_the_answer_is_the_first_line(text, line):
    assert first_line(text) == line
