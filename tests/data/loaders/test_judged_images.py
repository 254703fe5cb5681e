"""Rows of images for a judge in training, good and bad."""

import torch
from PIL import Image

from mmalign.data.loaders.judged_images import JudgedImageReader
from mmalign.data.pairs import ImagePair, ImageRef
from tests.helpers import data_files


def pair(number: int, data: list[bytes]) -> ImagePair:
    outputs = tuple(ImageRef(f"{number}-{n}", lambda: "here", lambda x=content: x) for n, content in enumerate(data))
    scores = tuple(float(-n) for n in range(len(data)))
    ratings = tuple((float(10 * number + n),) for n in range(len(data)))
    return ImagePair(number, "p", outputs, lambda: "row", "p", scores=scores, attributes=ratings)


def size(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.size).float()


def test_a_bad_row_of_more_images_leaves_the_others_ratings_in_place() -> None:
    """The bad row has weight 0 and the good row's images, so that its own three ratings have no place."""
    reader = JudgedImageReader(size)
    good, bad = pair(1, [data_files.png(0), data_files.png(1)]), pair(2, [data_files.png(2), b"", b""])
    example = reader.read(good, 0)
    assert not isinstance(example, list) and isinstance(reader.read(bad, 0), list)
    batch = reader.collate([good, bad], [example, example], torch.tensor([1.0, 0.0]))
    assert batch.ratings is not None and batch.ratings.shape[:2] == batch.scores.shape == (2, 2)
    assert batch.ratings[0].flatten().tolist() == [10, 11]
