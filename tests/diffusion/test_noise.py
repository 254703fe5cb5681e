"""The noise process against published values, diffusers, and its own algebra."""

import pytest
import torch
from diffusers import DDPMScheduler

from mmalign.diffusion.noise import Diffusion, mean_square
from tests.helpers.golden import golden

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def test_published_noising() -> None:
    """x_t and the v target as diffusers 0.20 computes them in float32."""
    given = golden("diffusion_dpo")["noising"]
    process = Diffusion.from_config({**SD15, "prediction_type": "v_prediction"}, "test")
    x_0, eps, t = torch.tensor(given["latents"]), torch.tensor(given["noise"]), torch.tensor(given["timesteps"])
    torch.testing.assert_close(process.alphas_cumprod[t], torch.tensor(given["alphas_cumprod_at_t"]))
    torch.testing.assert_close(process.add_noise(x_0, eps, t), torch.tensor(given["x_t_fp32"]), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(process.target(x_0, eps, t), torch.tensor(given["velocity_fp32"]), rtol=2e-5, atol=2e-6)


def test_diffusers_agrees() -> None:
    scheduler = DDPMScheduler(**SD15, prediction_type="v_prediction")
    process = Diffusion.from_config(scheduler.config, "test")
    x_0, eps = torch.randn(2, 4, 3, 8, 8).unbind()
    t = torch.tensor([0, 1, 500, 999])
    torch.testing.assert_close(process.add_noise(x_0, eps, t), scheduler.add_noise(x_0, eps, t))
    torch.testing.assert_close(process.target(x_0, eps, t), scheduler.get_velocity(x_0, eps, t))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_right_answer_is_turned_back_into_noise_and_image(prediction: str) -> None:
    process = Diffusion.from_config({**SD15, "prediction_type": prediction}, "test")
    x_0, eps = torch.randn(2, 5, 2, 4, 4).unbind()
    t = torch.tensor([0, 10, 400, 900, 999])
    x_t = process.add_noise(x_0, eps, t)
    answer = process.target(x_0, eps, t)
    torch.testing.assert_close(process.to_eps(answer, x_t, t), eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(process.to_clean(answer, x_t, t), x_0, rtol=1e-3, atol=1e-4)


def test_velocity_errors_are_epsilon_errors_over_abar() -> None:
    """|v error|^2 = |eps error|^2 / abar_t, whatever the network says."""
    v = Diffusion.from_config({**SD15, "prediction_type": "v_prediction"}, "test")
    x_0, eps, answer = torch.randn(3, 4, 2, 4, 4).unbind()
    t = torch.tensor([5, 300, 700, 990])
    x_t = v.add_noise(x_0, eps, t)
    v_error, eps_error = mean_square(answer, v.target(x_0, eps, t)), mean_square(v.to_eps(answer, x_t, t), eps)
    torch.testing.assert_close(v_error, eps_error / v.alphas_cumprod[t], rtol=1e-4, atol=1e-4)


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"here/.*'sample'; expected epsilon or v_prediction"):
        Diffusion.from_config({**SD15, "prediction_type": "sample"}, "here/scheduler")


def test_errors_are_reduced_in_float32_under_bfloat16() -> None:
    """At D = 16384 and an error of 0.15, outputs rounded to bfloat16 move the logit (beta 5000) by a standard deviation
    below 0.1; taking the means in bfloat16 as well moves it by about 1.
    """
    torch.manual_seed(0)
    target = torch.randn(64, 16384)
    outputs = target + 0.15**0.5 * torch.randn(64, 16384)
    exact = mean_square(outputs.double(), target.double())
    rounded = outputs.bfloat16()

    def logit_noise(errors: torch.Tensor) -> float:
        wrong = (errors.double() - exact).view(16, 4)  # policy and reference, chosen and rejected
        return float((-0.5 * 5000 * ((wrong[:, 0] - wrong[:, 1]) - (wrong[:, 2] - wrong[:, 3]))).std())

    actual = logit_noise(mean_square(rounded, target))
    careless = logit_noise((rounded - target.bfloat16()).square().mean(1))
    assert actual < 0.1
    assert careless > 0.5
