"""Binding of the losses that a recipe can choose, and the laws that hold for each of them."""

import inspect

import pytest
import torch

from mmalign.config.base import Choice
from mmalign.config.losses import DiscoPOPLossConfig, DPOLossConfig, PairLossConfig, RobustLossConfig
from mmalign.losses import pairwise
from mmalign.losses.pairwise import Pair
from mmalign.methods._pair_loss import bound_loss
from mmalign.registry import import_callable

LOSSES = Choice.sections(PairLossConfig)
every_loss = pytest.mark.parametrize("config", LOSSES.values(), ids=LOSSES)


@every_loss
def test_a_config_has_the_keyword_arguments_of_its_function(config: type[PairLossConfig]) -> None:
    function = import_callable("method.loss", config().location)
    arguments = inspect.signature(function).parameters.values()
    keywords = [argument.name for argument in arguments if argument.kind is argument.KEYWORD_ONLY]
    assert keywords == ["beta", *config().arguments, *(["preference"] if config.reads_preference else [])]
    assert function.__name__ == config.model_fields["name"].default


@every_loss
def test_gradient_step_raises_the_margin_at_the_reference(config: type[PairLossConfig]) -> None:
    sides = Pair(torch.tensor([-0.3, -2.0], requires_grad=True), torch.tensor([-0.1, -5.0], requires_grad=True))
    (bound_loss(config(), 0.5)(sides, Pair(*(side.detach() for side in sides))) + 0 * sides.margin).sum().backward()
    # DiscoPOP's gate falls faster than its losses: it pushes towards z < 0 from 0, and back from beyond
    assert (sides.chosen.grad < sides.rejected.grad).all() != (config is DiscoPOPLossConfig)


def test_a_loss_is_bound_once_with_its_hyper_parameters() -> None:
    assert bound_loss(RobustLossConfig(flip_rate=0.2), 2.0) is bound_loss(RobustLossConfig(flip_rate=0.2), 2.0)
    policy, reference = Pair(torch.tensor([0.5]), torch.tensor([0.2])), Pair(torch.tensor([0.4]), torch.tensor([0.3]))
    smoothed = bound_loss(DPOLossConfig(label_smoothing=0.1), 5.0)(policy, reference)
    assert torch.equal(smoothed, pairwise.dpo(policy, reference, beta=5.0, label_smoothing=0.1))


def test_a_loss_from_outside_without_a_function_is_refused() -> None:
    with pytest.raises(ValueError, match="my_losses:Offset names no function"):
        bound_loss(PairLossConfig(name="my_losses:Offset"), 1.0)
