"""Mixtures of annotators' tastes, from a CLIP's unit vectors to scores."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mmalign.losses import pairwise
from mmalign.losses.pairwise import Pair
from mmalign.rewards._annotators import FILE, PACE, AnnotatorMixture, Form, load_mixture

FORMS: tuple[Form, ...] = ("angle", "distance")
SCALE = torch.tensor(2.0, dtype=torch.float64)


def vectors(number: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(number, 4, generator=torch.Generator().manual_seed(seed)).double(), dim=1)


def mixture(form: Form, prototypes: int = 2) -> AnnotatorMixture:
    """Return a mixture of ann, ben and cem with random prototypes, in float64."""
    result = AnnotatorMixture(["ann", "ben", "cem"], 4, prototypes=prototypes, form=form, seed=1).double()
    with torch.no_grad():
        for parameter in (x for x in (result.maps, result.points) if x is not None):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 4)
    return result


def scores(judge: AnnotatorMixture, names: list[str], images: Tensor, prompts: Tensor) -> Tensor:
    return judge.score(images, judge(prompts, judge.places(names)), SCALE)


def by_hand(form: Form, prototypes: int = 2) -> AnnotatorMixture:
    """Return a mixture of two prototypes, whose points are (1, 0) and (0, 1), with shares 3/4 and 1/4 of ann."""
    judge = AnnotatorMixture(["ann"], 2, prototypes=prototypes, form=form).double()
    with torch.no_grad():
        judge.points.copy_(torch.eye(2))
        judge.weights.copy_(torch.tensor([[math.log(3), 0.0]], dtype=torch.float64) / PACE)
        if judge.maps is not None:
            judge.maps[0] = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # the first component becomes the second
    return judge


def test_an_angle_by_hand() -> None:
    """The prompt is (0, 1), so ann looks for (0, 1) + 3/4 ((1, 0) + (1, 0)) + 1/4 (0, 1) = (1.5, 1.25)."""
    prompts, images = torch.tensor([[0.0, 1.0]] * 2).double(), torch.eye(2).double()
    expected = [2 * 1.5 / math.hypot(1.5, 1.25), 2 * 1.25 / math.hypot(1.5, 1.25)]
    assert scores(by_hand("angle"), ["ann"] * 2, images, prompts).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_distance_and_its_loss_by_hand() -> None:
    """u - v is (1, -1) for the first image and 0 for the second; the point is (3/4, 1/4)."""
    prompts, images = torch.tensor([[0.0, 1.0]] * 2).double(), torch.eye(2).double()
    first, second = scores(by_hand("distance"), ["ann"] * 2, images, prompts)
    assert first.item() == pytest.approx(-2 * math.hypot(0.25, -1.25), rel=1e-12)
    assert second.item() == pytest.approx(-2 * math.hypot(0.75, 0.25), rel=1e-12)
    loss = pairwise.soft_preference(Pair(first[None], second[None]), torch.tensor([0.9], dtype=torch.float64))
    gap = 2 * (math.hypot(0.75, 0.25) - math.hypot(0.25, 1.25))
    expected = 0.9 * math.log1p(math.exp(-gap)) + 0.1 * math.log1p(math.exp(gap))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_with_one_prototype_all_share_one_judge(form: Form) -> None:
    images, prompts = vectors(4, 3), vectors(1, 4).expand(4, -1)
    single, two = (
        [scores(mixture(form, k), [name] * 4, images, prompts) for name in ("ann", "ben", "nobody")] for k in (1, 2)
    )
    assert torch.equal(single[0], single[1]) and torch.equal(single[0], single[2])
    assert not torch.allclose(two[0], two[1])


@pytest.mark.parametrize("form", FORMS)
def test_all_begin_as_the_judge_without_annotators(form: Form) -> None:
    images, prompts = vectors(4, 3), vectors(4, 4)
    judge = AnnotatorMixture(["ann", "ben"], 4, prototypes=3, form=form).double()
    plain = {"angle": (images * prompts).sum(1), "distance": -(images - prompts).norm(dim=1)}[form]
    torch.testing.assert_close(scores(judge, ["ann", "ben", "x", "ann"], images, prompts), SCALE * plain)


def test_somebody_unknown_has_the_mean_of_the_shares() -> None:
    judge, prompts = mixture("distance"), vectors(1, 4)
    wanted = torch.cat([judge(prompts, judge.places([name])) for name in ("ann", "ben", "cem", "nobody")])
    torch.testing.assert_close(wanted[3], wanted[:3].mean(0))


@pytest.mark.parametrize("form", FORMS)
def test_a_mixture_is_read_as_it_was_written(form: Form, tmp_path: Path) -> None:
    judge = mixture(form).float()
    judge.save(tmp_path)
    first = (tmp_path / FILE).read_bytes()
    read = load_mixture(str(tmp_path))
    assert read is not None and (read.names, read.form) == (judge.names, form)
    assert all(torch.equal(own, read.get_parameter(name)) for name, own in judge.named_parameters())
    read.save(tmp_path)
    assert (tmp_path / FILE).read_bytes() == first
    (tmp_path / "empty").mkdir()
    assert load_mixture(str(tmp_path / "empty")) is None
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"annotators\.safetensors: cannot be read .*; train the judge again"):
        load_mixture(str(tmp_path))


@pytest.mark.parametrize("form", FORMS)
def test_added_annotators_begin_with_the_mean_and_learn_their_shares_alone(form: Form) -> None:
    judge, prompts, images = mixture(form), vectors(4, 4), vectors(4, 3)
    more = judge.extended(["dan", "eve"])
    old = ["ann", "ben", "cem", "nobody"]
    assert torch.equal(scores(judge, old, images, prompts), scores(more, old, images, prompts))
    torch.testing.assert_close(more.shares()[3:5], judge.shares()[-1].expand(2, -1))
    scores(more, ["dan", "ann", "nobody", "eve"], images, prompts).sum().backward()
    assert [name for name, weight in more.named_parameters() if weight.grad is not None] == ["added"]
    assert more.added is not None and more.added.grad is not None and (more.added.grad != 0).all()


def test_the_mean_is_that_of_the_original_annotators(tmp_path: Path) -> None:
    judge = mixture("angle").float()
    more = judge.extended(["dan"])
    assert more.added is not None
    with torch.no_grad():
        more.added[0, 0] += 1
    more.save(tmp_path)
    read = load_mixture(str(tmp_path))
    assert read is not None and (read.names, read.num_original, read.added) == (more.names, 3, None)
    assert torch.equal(read.shares(), more.shares()) and torch.equal(read.shares()[-1], judge.shares()[-1])
    assert not torch.allclose(read.shares()[:-1].mean(0), read.shares()[-1])


def test_shares_that_vanish_have_a_finite_start() -> None:
    judge = mixture("distance").float()
    with torch.no_grad():
        judge.weights[:, 1] = -1e3
    assert judge.shares()[-1].tolist() == [1.0, 0.0]
    added = judge.extended(["dan"]).added
    assert added is not None and added.isfinite().all()


def test_a_file_of_an_earlier_version_has_the_mean_of_all(tmp_path: Path) -> None:
    judge = mixture("distance").float()
    content = {name: weight.detach() for name, weight in judge.named_parameters()}
    save_file(content, tmp_path / FILE, metadata={"annotators": '{"names": ["ann", "ben", "cem"], "form": "distance"}'})
    read = load_mixture(str(tmp_path))
    assert read is not None and torch.equal(read.shares(), judge.shares())
