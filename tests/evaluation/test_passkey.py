"""Passkey prompts: exactly so long, the key where it was asked for, the same every time."""

import pytest

from samba_megatron.evaluation.passkey import Passkey, build_passkey, first_number, make_key
from samba_megatron.evaluation.prompts import PasskeyPrompt
from samba_megatron.platform.errors import UserError


@pytest.mark.parametrize("length", [150, 151, 500, 1777])
def test_prompts_have_the_length_and_the_key_at_its_depth(tokenizer, length):
    prompt = PasskeyPrompt()
    places = []
    for depth in (0.0, 0.3, 0.7, 1.0):
        ids = build_passkey(prompt, tokenizer, "54321", depth, length)
        text = tokenizer.decode(ids)
        assert len(ids) == length
        assert text.count("54321") == 2
        assert text.startswith(prompt.intro) and text.endswith(prompt.question)
        places.append(text.index("54321") / len(text))
    assert places == sorted(places)
    if length > 1000:
        assert places[0] < 0.1 < 0.2 < places[1] < 0.4 < 0.6 < places[2] < 0.8 < 0.9 < places[3]


def test_what_does_not_fit_is_said(tokenizer):
    with pytest.raises(UserError, match="passkey prompt of 40 tokens has no room"):
        build_passkey(PasskeyPrompt(), tokenizer, "54321", 0.5, 40)


def test_the_papers_385_cases():
    suite = Passkey()
    cases = suite.cases()
    assert len(cases) == 385 == len({case.name for case in cases})
    assert [case.length for case in cases[::55]] == [4096 * 2**n for n in range(7)]
    assert sorted({case.depth for case in cases})[:2] == [0.0, 0.1]
    batches = list(suite.batches({cases[0].name}))
    assert sum(map(len, batches)) == 384
    assert all(len({case.length for case in batch}) == 1 for batch in batches)


def test_keys_are_fixed_and_differ():
    keys = [make_key(f"1234/{case.name}") for case in Passkey().cases()]
    assert keys[:3] == [make_key(f"1234/{case.name}") for case in Passkey().cases()[:3]]
    assert all(len(key) == 5 and key.isdigit() for key in keys)
    assert len(set(keys)) > 370


@pytest.mark.parametrize(
    ("text", "number"),
    [(" 54321.", "54321"), ("\n54321 is", "54321"), (" 543210", "543210"), (" the 5", None)],
)
def test_the_answer_is_the_number_it_begins_with(text, number):
    assert first_number(text) == number


def test_summary_counts_what_was_asked():
    suite = Passkey(lengths=(256, 512), depths=2, keys=2)
    records = [
        {"length": 256, "depth": depth, "correct": correct, "key": "12345", "answer": answer}
        for depth, correct, answer in (
            *((0.0, True, " 12345"), (0.0, False, " 19395 and"), (0.0, False, " none")),
            (1.0, True, "12345"),
        )
    ]
    found = suite.summary(records)
    assert found["accuracy"] == {256: 0.5, 512: None}
    assert found["accuracy_by_depth"][256] == {"0": pytest.approx(1 / 3), "1": 1.0}
    assert found["digits"] == {256: pytest.approx((1 + 0.6 + 0 + 1) / 4), 512: None}
