"""Prompts and conversations become tokens and masks: completions count, prompts do not."""

import numpy as np
import pytest

from samba_megatron.data.indexed import sequence_lengths
from samba_megatron.data.loss_masks import map_mask, mask_prefix
from samba_megatron.data.manifest import read_manifest
from samba_megatron.data.preprocessing.instructions import (
    InstructionOptions,
    encode_pieces,
    preprocess_instructions,
)
from samba_megatron.platform.errors import UserError


def made(tokenizer, tmp_path, file, **options):
    prefix = str(tmp_path / "out")
    options = {"tokenizer": str(tokenizer.path.parent), "output_prefix": prefix, **options}
    report = preprocess_instructions(InstructionOptions(inputs=[str(file)], **options))
    tokens, mask = np.fromfile(f"{prefix}.bin", np.uint16).tolist(), map_mask(prefix)
    assert mask is not None and len(mask) == len(tokens)
    assert sequence_lengths(prefix).tolist() == sequence_lengths(mask_prefix(prefix)).tolist()
    learned = [token if counts else None for token, counts in zip(tokens, mask, strict=True)]
    return report, tokens, learned


def test_completions_count_and_their_end(tokenizer, tmp_path, write_jsonl):
    file = write_jsonl({"q": "def f():", "a": "\n    return 1\n"}, "", {"q": "", "a": "x = 2"})
    keys = {"prompt_key": "q", "completion_key": "a"}
    report, tokens, learned = made(tokenizer, tmp_path, file, **keys)
    prompt, *answers = (
        tokenizer.encode(text) for text in ("def f():", "\n    return 1\n", "x = 2")
    )
    eod = tokenizer.eod
    assert tokens == [*prompt, *answers[0], eod, *answers[1], eod]
    assert learned == [*[None] * len(prompt), *answers[0], eod, *answers[1], eod]
    assert (report.documents, report.tokens) == (2, len(tokens))
    assert report.counted == len(tokens) - len(prompt)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and manifest.counts["counted_tokens"] == report.counted


def test_the_assistants_turns_count(tokenizer, tmp_path, write_jsonl):
    turns = [("system", "be brief"), ("user", "1+1"), ("assistant", "2"), ("user", "3")]
    file = write_jsonl({"m": [{"role": role, "content": text} for role, text in turns]})
    _, tokens, learned = made(tokenizer, tmp_path, file, messages_key="m")
    assert tokenizer.decode(tokens[:-1]) == "system: be brief\nuser: 1+1\nassistant: 2\nuser: 3\n"
    assert tokenizer.decode([token for token in learned if token is not None]) == " 2\n"
    own = {"messages_key": "m", "turn_format": "<{role}>{content}</>", "overwrite": True}
    _, tokens, learned = made(tokenizer, tmp_path, file, append_eod=False, **own)
    assert tokenizer.decode(tokens).startswith("<system>be brief</><user>1+1</>")
    assert tokenizer.decode([token for token in learned if token is not None]) == "2</>"


def test_pieces_of_one_kind_are_tokenized_together(tokenizer):
    ids, counts = encode_pieces([("re", False), ("turn", False), (" x", True)], tokenizer, False)
    assert ids == tokenizer.encode("return") + tokenizer.encode(" x")
    assert sum(counts) == len(tokenizer.encode(" x"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt_key": "q"}, "--prompt-key and --completion-key together"),
        (
            {"prompt_key": "q", "completion_key": "a", "messages_key": "m"},
            "together, or --messages",
        ),
        ({"messages_key": "m", "turn_format": "{content}"}, r"must contain \{role\}"),
        ({"messages_key": "m", "turn_format": "{content}{role}"}, "the role must come first"),
        ({"prompt_key": "q", "completion_key": "b"}, r"jsonl:1: no text under q or b; mend it"),
        ({"messages_key": "q"}, "jsonl:1: no list of messages under q"),
    ],
)
def test_mistakes(tokenizer, tmp_path, write_jsonl, keys, message):
    file = write_jsonl({"q": "x", "a": "y"})
    with pytest.raises(UserError, match=message):
        made(tokenizer, tmp_path, file, **keys)
    assert not list(tmp_path.glob("out*"))


def test_lines_can_be_passed_over_and_nothing_is_replaced_unasked(tokenizer, tmp_path, write_jsonl):
    file = write_jsonl("{", {"q": "x", "a": ""}, {"q": "x", "a": "y"})
    keys = {"prompt_key": "q", "completion_key": "a"}
    report, _, _ = made(tokenizer, tmp_path, file, on_error="skip", **keys)
    assert (report.documents, report.skipped) == (1, 2)
    with pytest.raises(UserError, match="is there already: choose another prefix"):
        made(tokenizer, tmp_path, file, on_error="skip", **keys)
