"""Documents to train on: as long as asked, and never a key of the evaluation."""

import math

from samba_megatron.evaluation.passkey import Passkey, make_key
from samba_megatron.evaluation.retrieval_data import PasskeyData, PhonebookData


def test_passkeys_have_the_length(tokenizer):
    texts = [
        example["prompt"] + example["completion"]
        for example in PasskeyData(tokenizer, 400).examples(20)
    ]
    lengths = [len(tokenizer.encode(text)) + 1 for text in texts]
    assert all(390 <= length <= 400 for length in lengths)
    assert texts == [
        example["prompt"] + example["completion"]
        for example in PasskeyData(tokenizer, 400).examples(20)
    ]
    assert len(set(texts)) == 20
    for text in texts:
        assert text.count(text[-5:]) == 3


def test_drawn_lengths_are_even_on_a_logarithmic_scale(tokenizer):
    data = PasskeyData(tokenizer, 1200, shortest=150)
    lengths = [
        len(tokenizer.encode(example["prompt"] + example["completion"]))
        for example in data.examples(200)
    ]
    assert min(lengths) >= 140 and max(lengths) <= 1200
    assert abs(sum(map(math.log, lengths)) / 200 - math.log(math.sqrt(150 * 1200))) < 0.15


def test_training_keys_are_not_those_of_the_evaluation(tokenizer):
    """By chance some few are: there are 90,000."""
    asked = {make_key(f"1234/{case.name}") for case in Passkey().cases()}
    trained = {example["completion"][1:] for example in PasskeyData(tokenizer, 200).examples(300)}
    assert len(trained) > 290 and len(asked & trained) < 10


def test_phonebooks():
    examples = list(PhonebookData(30, fewest=5).examples(40))
    sizes = [example["prompt"].split("\n\n")[0].count("\n") + 1 for example in examples]
    assert min(sizes) < 10 and max(sizes) > 25 and all(5 <= size <= 30 for size in sizes)
    for example in examples:
        name = example["prompt"].rsplit("\n", 1)[1]
        assert name + example["completion"] in example["prompt"] + "\n"
