"""Checks of what a model reads: prompts, lengths and chat templates."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from mmalign.data.loaders.response_pairs import tokenize_all
from mmalign.data.pairs import ResponsePair
from mmalign.doctor.checks.rows import skipped
from mmalign.doctor.corpus import Case, Corpus, NotChecked, ResponseTokens
from mmalign.doctor.findings import Place, place
from mmalign.families.types import ImageView


def long_captions(corpus: Corpus) -> list[Place] | NotChecked:
    """Return the prompts of which the text encoder does not read the end."""
    count = corpus.inputs.count_truncated
    if isinstance(count, NotChecked):
        return count
    texts = list(dict.fromkeys(prompt.text for prompt in corpus.prompts))
    if not count(texts):
        return []
    too_long = {text for text in texts if count([text])}
    return [
        Place(prompt.location, f"{len(prompt.text):,} characters", (("prompt", prompt.text),))
        for prompt in corpus.prompts
        if prompt.text in too_long
    ]


def over_budget(corpus: Corpus) -> list[Place] | NotChecked:
    """Return the rows that training cuts or skips because of their tokens; images are counted by their size."""
    tokens = corpus.inputs.tokens
    if isinstance(tokens, NotChecked):
        return tokens
    # One view for each size: the content of an image does not change its tokens
    views = dict[tuple[int, int], ImageView]()
    places = []
    for case in corpus.cases:
        sizes = {ref.key: corpus.pictures[ref.key].size for ref in case.images if not corpus.pictures[ref.key].problem}
        for size in sizes.values():
            if size not in views:
                views[size] = tokens.processor.preprocess_image(Image.new("RGB", size, "gray"))
        try:
            problem = _budget_problem(case, {key: views[size] for key, size in sizes.items()}, tokens)
        except (KeyError, ValueError):  # an unreadable image, or a placeholder in a text: of other checks
            continue
        if problem:
            places.append(place(case, problem))
    return places


def _budget_problem(case: Case, views: Mapping[str, ImageView], tokens: ResponseTokens) -> str:
    """Return how a pair exceeds the maximum number of tokens, as its loader sees it, or an empty text.

    Raises:
        KeyError: an image has no view.
        ValueError: the placeholders do not match the images.
    """
    assert isinstance(case.pair, ResponsePair)
    limit = tokens.max_length
    rows = tokenize_all(tokens.processor, case.pair, views)
    start, longest = max(row.start for row in rows), max(len(row.ids) for row in rows)
    if start >= limit:
        return f"the prompt with its images has {start:,} tokens, the limit is {limit:,}; the pair is skipped"
    if longest <= limit:
        return ""
    if case.pair.rejected and not case.pair.scores and rows[0].ids[:limit] == rows[1].ids[:limit]:
        return f"the responses first differ after {limit:,} tokens; the pair is skipped"
    return f"prompt and response have up to {longest:,} tokens, the limit is {limit:,}; the end is cut"


def template(corpus: Corpus) -> list[Place] | NotChecked:
    """Return the rows whose sides are rendered after two prompts, or whose responses the chat template changes."""
    two_prompts, tokens = skipped(corpus, "two prompts"), corpus.inputs.tokens
    if isinstance(tokens, NotChecked):
        return two_prompts or tokens
    places = list(two_prompts)
    for case in corpus.cases:
        assert isinstance(case.pair, ResponsePair)
        responses = [*case.pair.responses, *filter(None, [case.pair.hallucinated])]
        problem = tokens.processor.template_problem(case.pair.turns, responses)
        if problem is not None:
            places.append(place(case, problem))
    return places
