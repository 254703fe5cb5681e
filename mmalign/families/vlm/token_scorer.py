"""Network of a vision-language model in training: token log-probabilities without their logits.

M is the number of scored tokens, K the number of targets per position, D the decoder's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from mmalign.language.scores import log_probabilities, most_likely

if TYPE_CHECKING:
    from transformers import PreTrainedModel

R = TypeVar("R")


class TokenScorer(nn.Module):
    """Transformers model that returns log-probabilities of tokens instead of logits.

    `forward` does all of the work, so that a wrapper for distributed training sees it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, positions: Tensor, targets: Tensor, **inputs: object) -> Tensor:
        """Return the log-probabilities of the tokens `targets`, [M] or [M, K].

        They are predicted at the indices `positions` [M] of the flattened rows.
        """
        text = self.model.config.get_text_config()
        return log_probabilities(
            self._hidden(positions, inputs),
            self.model.get_output_embeddings(),
            targets,
            vocabulary=text.vocab_size,
            softcap=getattr(text, "final_logit_softcapping", None),
        )

    @torch.no_grad()
    def argmax(self, positions: Tensor, avoided: Tensor | None, **inputs: object) -> Tensor:
        """Return the most likely tokens [M], predicted at the indices `positions` [M] of the flattened rows.

        With `avoided` [M], they are the most likely ones other than these. A soft cap on the logits would not change
        their order, so it is left out.
        """
        head, text = self.model.get_output_embeddings(), self.model.config.get_text_config()
        return most_likely(self._hidden(positions, inputs), head, avoided, vocabulary=text.vocab_size)

    def run(self, function: Callable[[PreTrainedModel], R]) -> R:
        """Return the result of a function that runs the model in its own way, such as generation."""
        return function(self.model)

    def _hidden(self, positions: Tensor, inputs: dict[str, object]) -> Tensor:
        """Return the last hidden states [M, D] at the indices `positions` [M] of the flattened rows."""
        hidden: Tensor = self.model.base_model(**inputs, use_cache=False, return_dict=True).last_hidden_state
        return hidden.flatten(0, 1)[positions]


def unwrap(net: nn.Module) -> TokenScorer:
    """Return the network itself, without a wrapper for distributed training."""
    return next(part for part in net.modules() if isinstance(part, TokenScorer))
