"""Log-probabilities of tokens, computed in float32 chunks, and their reduction to one score per response.

M is the number of rows of hidden states (one per response token), D their width, V the vocabulary's size, K the number
of targets per row. N is the number of responses, of at most R tokens each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24  # elements of [rows, V] in float32 at a time: 64 MB
CHUNK_CUDA = 2**27  # 512 MB: fewer chunks, since each one's gradient passes over all of the head's weights


def log_probabilities(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    vocabulary: int,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Compute the log-probability of one or several targets given the hidden state before each.

    The head runs over chunks of rows, so at most `chunk` logits exist at once. With gradients, the backward pass
    recomputes the logits instead of storing them.

    Args:
        hidden: [M, D].
        head: a function from hidden states [m, D] to logits [m, V].
        targets: [M], or [M, K].
        vocabulary: V.
        softcap: logits become `softcap * tanh(logits / softcap)`; None leaves them unchanged.
        chunk: the maximum number of logits at once; None uses a default for the device.

    Returns:
        Values of the shape of `targets`, float32, at most 0.
    """

    def some(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logps = logits.gather(1, targets.view(len(targets), -1)) - logits.logsumexp(1, keepdim=True)
        return logps.view(targets.shape)

    chunks = _chunks(hidden, vocabulary, chunk)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(some, hidden[at], targets[at], use_reentrant=False) for at in chunks])
    return torch.cat([some(hidden[at], targets[at]) for at in chunks])


def most_likely(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    avoided: Tensor | None = None,
    *,
    vocabulary: int,
    chunk: int | None = None,
) -> Tensor:
    """Return the most likely token [M] after each hidden state [M, D], in chunks as in `log_probabilities`.

    With `avoided` [M], return the most likely token other than the avoided one.
    """

    def some(at: slice) -> Tensor:
        logits = head(hidden[at])
        if avoided is not None:
            logits = logits.scatter(1, avoided[at, None], -torch.inf)
        return logits.argmax(1)

    return torch.cat([some(at) for at in _chunks(hidden, vocabulary, chunk)])


def _chunks(hidden: Tensor, vocabulary: int, chunk: int | None) -> list[slice]:
    """Return slices of the rows with at most `chunk` logits each; None for the default of the device."""
    rows = max(1, (chunk or (CHUNK_CUDA if hidden.is_cuda else CHUNK)) // vocabulary)
    return [slice(first, first + rows) for first in range(0, len(hidden), rows)]


def total(logps: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over each response's tokens [N]: the log-probability of the whole response, in nats."""
    return logps.where(mask, 0).sum(1)


def mean(logps: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over each response's tokens [N], in nats per token."""
    return total(logps, mask) / mask.sum(1)


def weighted_mean(logps: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over each response's tokens [N]: the dense score of RLHF-V (arXiv:2312.00849).

    The weights are [N, R].
    """
    weights = weights.where(mask, 0)
    return (logps.where(mask, 0) * weights).sum(1) / weights.sum(1)
