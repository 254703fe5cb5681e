"""Checks of single rows and images: unreadable, missing, unusable."""

from __future__ import annotations

from mmalign.data.pairs import Defect
from mmalign.doctor.corpus import Corpus
from mmalign.doctor.findings import Place


def unreadable(corpus: Corpus) -> list[Place]:
    """Return every image that cannot be decoded, once for a file."""
    places = dict[str, Place]()
    for case in corpus.cases:
        for ref in case.images:
            if problem := corpus.pictures[ref.key].problem:
                places.setdefault(ref.path or ref.location, Place(ref.location, problem))
    return list(places.values())


def skipped(corpus: Corpus, defect: Defect) -> list[Place]:
    """Return the rows that the reader skips because of a defect."""
    return [Place(row.location, row.reason) for row in corpus.skipped if row.defect == defect]
