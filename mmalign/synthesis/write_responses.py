"""Writer of generated response pairs: JSON lines that name images, or Parquet files that hold them.

The files have the layouts `trl`, `realign` and `rankings`, which the readers and other programs read. An extra column
holds each pair's provenance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mmalign.data.images import decode
from mmalign.data.pairs import ImageRef, ResponsePair

SUFFIXES = (".jsonl", ".parquet")
GROUP = 64  # rows of a Parquet file in memory at once


@dataclass(frozen=True)
class SynthesizedPair:
    """A generated pair, or a list of responses with scores.

    Attributes:
        source: the prompt, the images and the chosen response.
        rejected: the rejected response.
        hallucinated: a second rejected response; empty if there is none.
        retrieved: the retrieved image of the layout `realign`; None in the layout `trl`.
        provenance: the origin of the responses.
        scores: a judge's scores of the chosen and the rejected response; None if no judge ranked them.
        ranking: all responses with their scores, in place of a pair; empty for a pair.
    """

    source: ResponsePair
    rejected: str
    hallucinated: str
    retrieved: ImageRef | None
    provenance: Mapping[str, object]
    scores: tuple[float, float] | None = None
    ranking: Sequence[tuple[str, float]] = ()


def write_pairs(path: Path, pairs: Iterable[SynthesizedPair], *, suffix: str, images: Path) -> None:
    """Write a file of at least one pair, of the kind `suffix`; image paths in JSON lines are relative to `images`."""
    if suffix == ".parquet":
        write_parquet(path, map(_packed, pairs))
        return

    def name(ref: ImageRef) -> str:
        return Path(os.path.relpath(ref.path, images)).as_posix()

    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(_record(pair, name), ensure_ascii=False) + "\n" for pair in pairs)


def _record(synthesized: SynthesizedPair, shown: Callable[[ImageRef], object]) -> dict[str, object]:
    """Return a pair's record; `shown` returns the value that represents an image."""
    pair = synthesized.source
    prompt = [{"role": turn.role, "content": turn.text} for turn in pair.turns]
    chosen, rejected = (
        [{"role": "assistant", "content": text}] for text in (pair.chosen.strip(), synthesized.rejected)
    )
    provenance = {"of": pair.location, **synthesized.provenance}
    # The layout `realign`, whose sides are whole conversations
    if synthesized.retrieved is not None:
        image, retrieved = shown(pair.images[0]), shown(synthesized.retrieved)
        conversations = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        return {"image": image, "retrieved_image": retrieved, **conversations, "provenance": provenance}
    more = dict[str, object]({"hallucinated": synthesized.hallucinated} if synthesized.hallucinated else {})
    images = [shown(ref) for ref in pair.images]
    # The layout `rankings`
    if synthesized.ranking:
        texts, scores = map(list, zip(*synthesized.ranking, strict=True))
        return {"images": images, "prompt": prompt, "responses": texts, "scores": scores, "provenance": provenance}
    # The layout `trl`
    if synthesized.scores is not None:
        more |= dict(zip(("score_chosen", "score_rejected"), synthesized.scores, strict=True))
    responses = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"images": images, **responses, **more, "provenance": provenance}


def write_parquet(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a Parquet file of at least one row; the first `GROUP` rows fix its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rest = iter(rows)
    table = pa.Table.from_pylist(list(islice(rest, GROUP)))
    assert len(table), "there are pairs"
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        while group := list(islice(rest, GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=table.schema))


def _packed(pair: SynthesizedPair) -> dict[str, object]:
    """Return a record that holds the images; its provenance is JSON text, since the keys differ from row to row."""

    def image(ref: ImageRef) -> dict[str, object]:
        decode(ref)  # no other file may be copied into a data set that is made to be shared
        return {"bytes": ref.read(), "path": Path(ref.path).name}  # a text in every row, since the first fix the type

    record = _record(pair, image)
    return {**record, "provenance": json.dumps(record["provenance"], ensure_ascii=False)}
