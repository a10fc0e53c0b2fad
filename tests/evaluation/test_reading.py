"""The model under test is the same from both formats, whole or in pieces, alone or padded."""

import torch

from samba_megatron.evaluation.reading import continue_greedily, token_losses
from samba_megatron.evaluation.subject import load_subject
from tests.evaluation.conftest import VOCABULARY


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(5))


def losses(subject, tokens: torch.Tensor, piece: int) -> torch.Tensor:
    return torch.cat(list(token_losses(subject.model, tokens, piece)))


def test_an_export_is_the_checkpoint_it_came_from(subject, exported, own_modules):
    other = load_subject(exported, None, "cpu", "auto")
    tokens = random_tokens(80)
    torch.testing.assert_close(
        losses(other, tokens, 80), losses(subject, tokens, 80), rtol=0, atol=1e-6
    )
    assert other.require_tokenizer().identity == subject.require_tokenizer().identity
    assert subject.identity["step"] == 0
    half = load_subject(exported, None, "cpu", "bf16")
    assert half.model.lm_head.weight.dtype == torch.bfloat16
    assert half.model.backbone.layers[0].mixer.A_log.dtype == torch.float32


def test_pieces_give_the_losses_of_the_whole(subject):
    """Beyond the window, which is 24; the last piece is short."""
    tokens = random_tokens(101)
    whole = losses(subject, tokens, 100)
    logits = subject.model(tokens[None, :-1]).logits[0].float()
    direct = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    torch.testing.assert_close(whole, direct.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(losses(subject, tokens, 17), whole, rtol=0, atol=1e-5)


def test_a_continuation_depends_on_neither_pieces_nor_neighbours(subject):
    prompts = [random_tokens(90)[:length].tolist() for length in (90, 61, 90)]
    together = continue_greedily(subject.model, prompts, 8, 25)
    alone = [continue_greedily(subject.model, [prompt], 8, 1000)[0] for prompt in prompts]
    assert together == alone
    assert together[0] == together[2]
    sequence = torch.tensor(prompts[1])[None]
    for token in together[1]:
        assert int(subject.model(sequence, use_cache=False).logits[0, -1].argmax()) == token
        sequence = torch.cat([sequence, torch.tensor([[token]])], dim=1)
