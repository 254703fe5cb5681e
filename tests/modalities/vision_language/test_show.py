"""Numbers that `mmalign show` prints of response pairs."""

from functools import partial

from mmalign.data.loaders.response_pairs import ResponseExample
from mmalign.data.pairs import ImageRef, ResponsePair
from mmalign.language.chat import Turn
from mmalign.language.tokens import TokenizedResponse
from mmalign.modalities.vision_language.show import _facts


def test_responses_of_lists_are_counted_in_their_order() -> None:
    image, scores = ImageRef("image", partial(str, "image"), bytes), tuple(float(-n) for n in range(8))
    texts = tuple("abcdefgh")
    pair = ResponsePair(
        0, (Turn("user", "?"),), "a", "b", (image,), (image,), (), "row", "g", others=texts[2:], scores=scores
    )
    rows = [TokenizedResponse((0, *range(n + 1)), 1) for n in range(8)]
    _, *facts = _facts([ResponseExample(pair, rows, None, {}, {})], 100)
    assert [fact.split(" (")[0] for fact in facts] == [f"tokens of a {n}." for n in range(1, 9)]
