"""Classifier-free guidance."""

import torch

from mmalign.diffusion.guidance import apply_guidance


def test_a_worked_example_and_the_two_ends() -> None:
    without, with_prompt = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    torch.testing.assert_close(apply_guidance(without, with_prompt, 5.0), torch.tensor([6.0, -3.0]))
    torch.testing.assert_close(apply_guidance(without, with_prompt, 1.0), with_prompt)
    torch.testing.assert_close(apply_guidance(without, with_prompt, 0.0), without)


def test_half_precision_is_raised_before_the_difference() -> None:
    """1.0078 and 1 differ by one step of bfloat16; five of these differences are no step of it at 1."""
    without, with_prompt = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0078125]).bfloat16()
    assert apply_guidance(without, with_prompt, 4.5).item() == 1 + 4.5 * 0.0078125
