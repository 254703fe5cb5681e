"""Log-probabilities of tokens, in float32 and a chunk at a time, and how they become one score a response.

M rows of hidden states (one a response token), D their width, V the vocabulary, K targets of a row; N responses of at
most R tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24  # elements of [rows, V] in float32 that exist at a time: 64 MB
CHUNK_CUDA = 2**27  # 512 MB: every chunk's gradient passes over all of the head's weights


def log_probabilities(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    vocabulary: int,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The log-probability of every target given the hidden state before it; or of several targets each.

    The head runs over so many rows at a time that no more than `chunk` logits exist at once; with gradients it runs
    again in the backward pass, instead of keeping them.

    Args:
        hidden: [M, D].
        head: makes logits [m, V] of hidden states [m, D].
        targets: [M], or [M, K].
        vocabulary: V.
        softcap: logits are `softcap * tanh(logits / softcap)`; None leaves them.
        chunk: logits at a time; as many as the device has room for if not given.

    Returns:
        As `targets`, float32, at most 0.
    """

    def some(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logps = logits.gather(1, targets.view(len(targets), -1)) - logits.logsumexp(1, keepdim=True)
        return logps.view(targets.shape)

    chunks = _chunks(len(targets), vocabulary, chunk or _chunk(hidden))
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(some, hidden[at], targets[at], use_reentrant=False) for at in chunks])
    return torch.cat([some(hidden[at], targets[at]) for at in chunks])


def most_likely(
    hidden: Tensor, head: Callable[[Tensor], Tensor], *, vocabulary: int, chunk: int | None = None
) -> Tensor:
    """The most likely token [M] after each hidden state [M, D], so many at a time as in `log_probabilities`."""
    return torch.cat([head(hidden[at]).argmax(1) for at in _chunks(len(hidden), vocabulary, chunk or _chunk(hidden))])


def _chunk(hidden: Tensor) -> int:
    return CHUNK_CUDA if hidden.is_cuda else CHUNK


def _chunks(length: int, vocabulary: int, chunk: int) -> list[slice]:
    """Parts of so many rows that at most `chunk` logits exist at once."""
    rows = max(1, chunk // vocabulary)
    return [slice(first, first + rows) for first in range(0, length, rows)]


def total(logps: Tensor, mask: Tensor) -> Tensor:
    """The sum over each response's tokens [N]: the log-probability of the whole response, in nats."""
    return logps.where(mask, 0).sum(1)


def mean(logps: Tensor, mask: Tensor) -> Tensor:
    """The mean over each response's tokens [N], in nats a token."""
    return total(logps, mask) / mask.sum(1)


def weighted_mean(logps: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """The mean with weights [N, R] over each response's tokens [N]: the dense score of RLHF-V (arXiv:2312.00849)."""
    weights = weights.where(mask, 0)
    return (logps.where(mask, 0) * weights).sum(1) / weights.sum(1)
