"""Log-probabilities in chunks are those of the whole, and gradients too; reductions by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from mmalign.language.scores import log_probabilities, mean, most_likely, total, weighted_mean

M, D, V = 7, 5, 11


def given() -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return torch.randn(M, D, requires_grad=True), nn.Linear(D, V, bias=False), torch.randint(0, V, (M,))


def plain(hidden: Tensor, head: nn.Linear, targets: Tensor, softcap: float | None = None) -> Tensor:
    logits = head(hidden)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return logits.log_softmax(1)[range(M), targets]


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("chunk", [1, 3 * V, 10**6])
def test_chunks_change_neither_values_nor_gradients(chunk: int, softcap: float | None) -> None:
    """To the last bits: the head multiplies other numbers of rows at a time."""
    hidden, head, targets = given()
    result = log_probabilities(hidden, head, targets, vocabulary=V, softcap=softcap, chunk=chunk)
    expected = plain(hidden, head, targets, softcap)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    up = torch.randn(M)
    gradients = torch.autograd.grad(result, [hidden, head.weight], up)
    expected_gradients = torch.autograd.grad(expected, [hidden, head.weight], up)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3 * V, 10**6])
def test_the_most_likely_tokens_are_those_of_the_whole(chunk: int) -> None:
    hidden, head, _ = given()
    assert torch.equal(most_likely(hidden, head, vocabulary=V, chunk=chunk), head(hidden).argmax(1))


@pytest.mark.parametrize("chunk", [3 * V, 10**6])
def test_scores_several_targets_from_the_same_logits(chunk: int) -> None:
    hidden, head, targets = given()
    several = torch.stack([targets, (targets + 1) % V], -1)
    result = log_probabilities(hidden, head, several, vocabulary=V, chunk=chunk)
    for index in (0, 1):
        torch.testing.assert_close(result[:, index], plain(hidden, head, several[:, index]), rtol=1e-5, atol=1e-6)


def test_no_more_logits_than_a_chunk_exist_at_once() -> None:
    """Nor are they kept for the backward pass: it makes them again."""
    hidden, head, targets = given()
    seen: list[int] = []

    def counted(x: Tensor) -> Tensor:
        seen.append(len(x))
        logits: Tensor = head(x)
        return logits

    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() if tensor.shape[-1:] == (V,) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logps = log_probabilities(hidden, counted, targets, vocabulary=V, chunk=2 * V)
    assert seen == [2, 2, 2, 1] and not any(kept)
    logps.sum().backward()
    assert len(seen) == 8


def test_half_precision_logits_are_raised_before_the_softmax() -> None:
    """Of a vocabulary of equal logits every token has 1 / V; bfloat16 would say 2.391 for ln 11 = 2.398."""
    head = nn.Linear(D, V, bias=False).to(torch.bfloat16)
    result = log_probabilities(torch.zeros(1, D).to(torch.bfloat16), head, torch.tensor([3]), vocabulary=V)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(-math.log(11), abs=1e-6)


LOGPS = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -6.0, 100.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_sum_and_mean_by_hand() -> None:
    assert total(LOGPS, MASK).tolist() == [-6.0, -10.0]
    assert mean(LOGPS, MASK).tolist() == [-2.0, -5.0]


def test_a_weighted_mean_by_hand() -> None:
    """(-1 - 2 - 5 * 3) / 7 and (-5 * 4 - 6) / 6; padding has no weight, whatever stands there."""
    weights = torch.tensor([[1.0, 1.0, 5.0], [5.0, 1.0, 9.0]])
    torch.testing.assert_close(weighted_mean(LOGPS, MASK, weights), torch.tensor([-18 / 7, -26 / 6]))
    torch.testing.assert_close(weighted_mean(LOGPS, MASK, torch.ones(2, 3)), mean(LOGPS, MASK))
