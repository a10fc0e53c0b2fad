"""Perplexity by length: the sums are those of the losses, from datasets and from text."""

import math

import numpy as np
import pytest
import torch

from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.evaluation.perplexity import Perplexity
from samba_megatron.evaluation.reading import token_losses
from samba_megatron.platform.errors import UserError


def test_sums_and_perplexities(subject, tokenizer, text):
    suite = Perplexity(str(text), tokenizer, lengths=(40, 100, 64), blocks=2, piece=32)
    assert suite.cases() == [0, 1]
    records = [record for batch in suite.batches(set()) for record in suite.run(subject, batch)]
    losses = []
    for block in range(2):
        tokens = torch.from_numpy(suite.tokens[block * 101 : block * 101 + 101])
        losses.append(torch.cat(list(token_losses(subject.model, tokens, 100))).double())
    found = suite.summary(records)
    for length in (40, 64, 100):
        mean = float(torch.stack([loss[:length] for loss in losses]).mean())
        assert found["perplexity"][length] == pytest.approx(math.exp(mean), rel=1e-6)
    last = float(torch.stack([loss[64:] for loss in losses]).mean())
    assert found["perplexity_of_last_stretch"][100] == pytest.approx(math.exp(last), rel=1e-6)
    assert list(suite.batches({"perplexity/0"})) == [[1]]


def test_a_dataset_a_file_of_text_and_json_lines_are_the_same(tokenizer, tmp_path):
    sentence = "one two three four five six seven eight\n" * 20
    (tmp_path / "a.txt").write_text(sentence)
    (tmp_path / "a.jsonl").write_text('{"text": "' + sentence.replace("\n", "\\n") + '"}\n')
    ids = [*tokenizer.encode(sentence), tokenizer.eod]
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.array(ids))
        writer.finish()
    for name in ("a.txt", "a.jsonl", "a"):
        assert Perplexity(str(tmp_path / name), tokenizer, (64,)).tokens.tolist() == ids


def test_mistakes(tokenizer, tmp_path, subject):
    file = tmp_path / "short.txt"
    file.write_text("short")
    with pytest.raises(UserError, match="but a block of 101 is needed"):
        Perplexity(str(file), tokenizer, (100,)).cases()
    with pytest.raises(UserError, match="neither the prefix of a dataset"):
        Perplexity(str(tmp_path / "no"), tokenizer, (100,)).cases()
    with pytest.raises(UserError, match="text needs a tokenizer"):
        Perplexity(str(file), None, (100,)).cases()
    with IndexedWriter(tmp_path / "b", np.uint16) as writer:
        writer.add_document(np.full(200, 999))
        writer.finish()
    with pytest.raises(UserError, match="token id 999, outside the model's vocabulary of 400"):
        Perplexity(str(tmp_path / "b"), None, (100,)).run(subject, [0])
