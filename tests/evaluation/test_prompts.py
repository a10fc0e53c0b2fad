"""Prompts from a file: pieces replace pieces, and what is wrong is said."""

import pytest

from samba_megatron.evaluation.prompts import PasskeyPrompt, PhonebookPrompt, load_prompt
from samba_megatron.platform.errors import UserError


def test_pieces_replace_pieces(tmp_path):
    file = tmp_path / "prompts.yaml"
    file.write_text('passkey:\n  question: "\\nKey?"\n')
    assert load_prompt("passkey", file) == PasskeyPrompt(question="\nKey?")
    assert load_prompt("phonebook", file) == PhonebookPrompt()
    file.write_text('{"phonebook": {"examples": "\\nLook up:\\n"}}')
    assert load_prompt("phonebook", file) == PhonebookPrompt(examples="\nLook up:\n")
    assert load_prompt("passkey", None) == PasskeyPrompt()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("other: {}", "its keys must be passkey or phonebook"),
        ("passkey: {answer: x}", "passkey has the pieces intro, filler, statement"),
        ("passkey: {intro: 5}", "every piece of passkey must be text"),
        ("passkey: {statement: x}", r"passkey.statement must contain \{key\}"),
        ("passkey: [", "is not YAML"),
    ],
)
def test_mistakes(tmp_path, content, message):
    file = tmp_path / "prompts.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompt("passkey", file)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_prompt("passkey", tmp_path / "nowhere.yaml")
