"""The one rule of tokenisation, by hand."""

import pytest
import torch

from mmalign.language.tokens import TokenizedResponse, Tokens, common_prefix, cut_tail, expand


def test_the_common_prefix_ends_where_any_row_differs_or_ends() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert common_prefix([[1, 2, 3], [1, 2, 3, 4]]) == 3
    assert common_prefix([[5], [6]]) == 0
    assert common_prefix([[], [6]]) == 0


def test_every_placeholder_becomes_its_own_image_s_tokens() -> None:
    """Also where an image's tokens are the placeholder itself, as LLaVA's are."""
    assert expand([1, 9, 2, 9], 9, [[9, 9], [7]]) == [1, 9, 9, 2, 7]
    assert expand([1, 2], 9, []) == [1, 2]
    with pytest.raises(ValueError, match="1 image placeholders in the text for 2 images"):
        expand([1, 9], 9, [[9], [9]])


def test_a_response_loses_its_tail_and_a_prompt_nothing() -> None:
    row = TokenizedResponse((1, 2, 3, 4, 5), 2, ("a",))
    assert cut_tail(row, 5) == row and cut_tail(row, 99) == row
    assert cut_tail(row, 3) == TokenizedResponse((1, 2, 3), 2, ("a",))
    with pytest.raises(ValueError, match="the prompt with its images has 2 tokens; the limit is 2"):
        cut_tail(row, 2)


def test_a_batch_by_hand() -> None:
    tokens = Tokens.from_rows([TokenizedResponse((5, 6, 7), 1), TokenizedResponse((5, 8, 9, 4), 2, ("a", "b"))], pad=0)
    assert tokens.ids.tolist() == [[5, 6, 7, 0], [5, 8, 9, 4]]
    assert tokens.mask.tolist() == [[True, True, True, False], [True] * 4]
    assert tokens.is_response.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert tokens.num_tokens.tolist() == [2, 2] and tokens.images == ((), ("a", "b"))
    assert tokens.responses.tolist() == [[6, 7], [9, 4]] and tokens.response_mask.all()


def test_shorter_responses_are_masked() -> None:
    tokens = Tokens.from_rows([TokenizedResponse((5, 6), 1), TokenizedResponse((5, 8, 9, 4), 1)], pad=0)
    assert tokens.response_mask.tolist() == [[True, False, False], [True, True, True]]
    assert torch.equal(tokens.responses[tokens.response_mask], torch.tensor([6, 8, 9, 4]))


def test_parts_are_padded_to_the_longest_with_no_image_s_token() -> None:
    """Each row with its own last token; what pads is masked like any padding."""
    short = Tokens.from_rows(
        [TokenizedResponse((9, 9, 5, 6), 2, ("a",)), TokenizedResponse((9, 9, 7), 2, ("b",))], pad=0
    )
    long = Tokens.from_rows([TokenizedResponse((9, 9, 9, 9, 5, 6), 4, ("c",))], pad=0)
    whole = Tokens.cat([short, long])
    assert whole.ids.tolist() == [[9, 9, 5, 6, 6, 6], [9, 9, 7, 0, 0, 0], [9, 9, 9, 9, 5, 6]]
    assert whole.responses.tolist()[0] == [5, 6] and whole.num_tokens.tolist() == [2, 1, 2]
    assert whole.mask.sum(1).tolist() == [4, 3, 6] and whole.images == (("a",), ("b",), ("c",))


def test_some_rows_of_a_batch() -> None:
    tokens = Tokens.from_rows([TokenizedResponse((5, 6), 1, ("a",)), TokenizedResponse((5, 8, 9, 4), 1, ("b",))], pad=0)
    first = tokens[:1]
    assert first.ids.tolist() == [[5, 6, 0, 0]] and first.images == (("a",),)
    assert first.responses.tolist() == [[6]] and len(first) == 1


def test_rows_survive_joining_and_slicing() -> None:
    """As they would be read from the tokens, which a GPU would have to be asked for."""
    rows = [
        TokenizedResponse((5, 6), 1, ("a",)),
        TokenizedResponse((5, 8, 9, 4), 1, ("b",)),
        TokenizedResponse((7, 7, 3), 2),
    ]
    tokens = Tokens.from_rows(rows, pad=0)
    for result in (tokens[1:], Tokens.cat([tokens[:1], tokens]), tokens.to(torch.device("cpu"))[::2]):
        assert "rows" in vars(result)
        assert result.rows == Tokens(result.ids, result.starts, result.lengths, result.images).rows


def test_rows_of_one_prompt_are_found_wherever_they_are() -> None:
    """By all that comes before the response, and the images: three have the words 1 2 3, two of them an image alike."""
    rows = [
        TokenizedResponse((1, 2, 3, 7), 3, ("a",)),
        TokenizedResponse((1, 2, 3, 7), 3, ("b",)),
        TokenizedResponse((1, 2, 4, 7), 3, ("a",)),
        TokenizedResponse((1, 2, 3, 8, 9), 3, ("a",)),
        TokenizedResponse((1, 2, 3, 7), 2, ("a",)),
    ]
    tokens = Tokens.from_rows(rows, pad=0)
    assert tokens.by_prompt == ((0, 3), (1,), (2,), (4,))
    assert tokens.rows == tuple(rows)
    assert tokens[1:4].by_prompt == ((0,), (1,), (2,))
    assert Tokens.cat([tokens[:1], tokens[3:4]]).by_prompt == ((0, 1),)
