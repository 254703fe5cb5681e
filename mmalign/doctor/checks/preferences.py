"""Checks of preferences: equal sides, contradictions, cycles, ties."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

from mmalign.doctor.checks.rows import skipped
from mmalign.doctor.corpus import Case, Corpus, nearly_same_text, normalize
from mmalign.doctor.findings import Place, place

Node = tuple[str, ...]  # identity of a side
Edges = dict[tuple[Node, Node], list[Case]]  # cases that prefer the first side to the second


def identical(corpus: Corpus) -> list[Place]:
    """Return the pairs whose sides have the same image bytes and the same text."""
    same = [case for case in corpus.compared if _equal(case)]
    return [*skipped(corpus, "same sides"), *(place(case, "both sides are the same") for case in same)]


def near_identical(corpus: Corpus) -> list[Place]:
    """Return the other pairs whose sides differ by compression, scaling, case, punctuation or slips of the pen."""
    places = []
    for case in corpus.compared:
        if case.same_pictures and nearly_same_text(case.chosen.text, case.rejected.text) and not _equal(case):
            differing = "images" if case.chosen.images != case.rejected.images else "responses"
            places.append(place(case, f"the {differing} are nearly the same"))
    return places


def contradictions(corpus: Corpus) -> list[Place]:
    """Return one place for each two sides of a prompt of which either is preferred in some row.

    A single output of a prompt that is liked in one row and disliked in another is one as well.
    """
    places = list(_contradicting_thumbs(corpus))
    for edges in _preferences(corpus).values():
        seen = set[tuple[Node, Node]]()
        for (better, worse), cases in edges.items():
            seen.add((better, worse))
            opposite = edges.get((worse, better))
            # Once for both directions, at the first
            if opposite and (worse, better) not in seen:
                others = ", ".join(case.location for case in [*cases[1:], *opposite])
                places.append(place(cases[0], f"labelled the other way: {others}"))
    return places


def _contradicting_thumbs(corpus: Corpus) -> Iterator[Place]:
    labels: dict[Node, tuple[list[Case], list[Case]]] = defaultdict(lambda: ([], []))
    for case in corpus.cases:
        if len(case.pair.scores) == 1:
            is_liked = case.pair.scores[0] > 0
            labels[normalize(case.prompt), *case.chosen.identity][is_liked].append(case)
    for disliked, liked in labels.values():
        if disliked and liked:
            first, *others = [*liked, *disliked]
            yield place(first, f"labelled the other way: {', '.join(case.location for case in others)}")


def cycles(corpus: Corpus) -> list[Place]:
    """Return one place for each cycle of three or more sides of a prompt; cycles that share all sides count once."""
    places = []
    for edges in _preferences(corpus).values():
        for cycle in _cycles(edges):
            first, *others = cycle
            places.append(place(first, f"cycle of {len(cycle)} with {', '.join(case.location for case in others)}"))
    return places


def ties(corpus: Corpus) -> list[Place]:
    """Return the pairs in which neither side is preferred."""
    return [Place(location, "neither side is preferred") for location in corpus.tied]


def _equal(case: Case) -> bool:
    same_images = [ref.key for ref in case.chosen.images] == [ref.key for ref in case.rejected.images]
    return same_images and case.chosen.text.strip() == case.rejected.text.strip()


def _preferences(corpus: Corpus) -> Mapping[str, Edges]:
    """Return the preferences of every prompt."""
    graphs: dict[str, Edges] = defaultdict(lambda: defaultdict(list))
    for case in corpus.compared:
        if case.chosen.identity != case.rejected.identity:
            graphs[normalize(case.prompt)][case.chosen.identity, case.rejected.identity].append(case)
    return graphs


def _cycles(edges: Edges) -> Iterator[list[Case]]:
    """Yield shortest cycles of at least three sides as cases, until every side of a cycle was in one."""
    worse_of: dict[Node, list[Node]] = defaultdict(list)
    for better, worse in edges:
        worse_of[better].append(worse)
    # Few prompts have cycles, and a sort tells them apart fast
    try:
        TopologicalSorter(worse_of).prepare()
        return
    except CycleError:
        pass
    done = set[Node]()
    # A preference is in a cycle if a path leads back from its worse side to the better one
    for better, worse in edges:
        if {better, worse} <= done:
            continue
        path = _path(worse_of, worse, better)
        if path is not None:
            done.update(path)
            yield [edges[edge][0] for edge in zip([better, *path], path, strict=False)]


def _path(worse_of: Mapping[Node, list[Node]], start: Node, end: Node) -> list[Node] | None:
    """Return the shortest path of at least two steps between two sides, without the direct one."""
    # Breadth first, with the side from which each side was reached
    before: dict[Node, Node | None] = {start: None}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        for following in worse_of.get(node, ()):
            # The direct step back would be a contradiction, not a cycle
            if following in before or (node, following) == (start, end):
                continue
            before[following] = node
            if following == end:
                path = [end]
                while (previous := before[path[-1]]) is not None:
                    path.append(previous)
                return path[::-1]
            queue.append(following)
    return None
