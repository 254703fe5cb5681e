"""Content-keyed cache of tensors on disk, in memory-mapped safetensors shards.

The cache stores and finds tensors; it never encodes. Each fingerprint has a folder of its own.

Several processes may write to one folder. Each `put` writes one file, which is complete or absent. A process sees its
own shards and those that were there at its last `open` or `refresh`.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmalign.atomic_io import atomic_write, remove_unfinished
from mmalign.config import Data
from mmalign.data.caches.fingerprint import fingerprint_settings
from mmalign.reading import check_file, read_as

_FINGERPRINT = "fingerprint.json"


Fingerprint = Mapping[str, str | int | float]


class ArrayCache:
    """Folder of tensors with one fingerprint, found by key; made with `open`."""

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._shards: list[Path] = []
        self._fields: list[tuple[str, ...]] = []  # field names of each shard
        self._index: dict[str, int] = {}  # key -> shard
        self._handles: dict[int, Any] = {}  # open shards; safetensors has no types
        self._process = os.getpid()

    @classmethod
    def open(cls, folder: str | Path, fingerprint: Fingerprint) -> ArrayCache:
        """Open the cache with this fingerprint, creating it if necessary.

        Args:
            folder: the folder that holds the caches of one kind.
            fingerprint: everything that the tensors depend on besides their keys: model, resolution, dtype ...

        Raises:
            ValueError: the folder is a file, or the cache's subfolder holds other content.
        """
        # The fingerprint as it reads back from JSON
        wanted = json.loads(json.dumps(dict(fingerprint)))
        cache = cls(Path(folder) / fingerprint_settings(wanted), fingerprint)
        for path in (Path(folder), cache.folder):
            if path.exists() and not path.is_dir():
                raise ValueError(f"data.cache: {path} is a file; choose a folder")
        cache.folder.mkdir(parents=True, exist_ok=True)
        _check_fingerprint(cache.folder, wanted)
        cache.refresh()
        return cache

    def refresh(self) -> None:
        """Index the shards that other processes have added; delete incomplete ones and what killed processes left."""
        remove_unfinished(self.folder)
        known = set(self._shards)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in known:
                continue
            names = _names(path)
            if names is None:
                path.unlink(missing_ok=True)
            else:
                self._add(path, names)

    def put(self, items: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write one shard, ideally of some hundred items. All items must have the same fields.

        Raises:
            CheckpointError: the disk is full or not writable; earlier shards stay.
        """
        if not items:
            return
        assert not any("|" in field for item in items.values() for field in item), "| ends the key in a tensor's name"
        tensors = {f"{key}|{f}": x.detach().cpu().contiguous() for key, item in items.items() for f, x in item.items()}
        assert len({frozenset(item) for item in items.values()}) == 1, "items of one shard have the same fields"
        # A name of its own: processes never write to one file
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        with atomic_write(path, shared=True) as part:
            save_file(tensors, part)
        self._add(path, list(tensors))

    def get(self, key: str) -> dict[str, Tensor]:
        """Return the tensors stored under a key, by field.

        Raises:
            KeyError: the key is not in the cache.
        """
        shard = self._index[key]
        if self._process != os.getpid():  # a forked worker opens its own handles
            self._handles, self._process = {}, os.getpid()
        if shard not in self._handles:
            self._handles[shard] = safe_open(self._shards[shard], "pt")
        return {field: self._handles[shard].get_tensor(f"{key}|{field}") for field in self._fields[shard]}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that are not in the cache, in order, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self._index]

    def share(self, keys: Iterable[str], *, rank: int, world_size: int) -> list[str]:
        """Return the missing keys that process `rank` of `world_size` has to fill, in order.

        Keys go to the processes in turn, by their position among all keys. Positions among the missing keys would not
        do: another process may have stored some already and see a shorter list. All processes must pass the same keys.
        """
        return self.missing(list(dict.fromkeys(keys))[rank::world_size])

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handles": {}}

    def _add(self, path: Path, names: list[str]) -> None:
        split = [name.rpartition("|") for name in names]
        self._fields.append(tuple(dict.fromkeys(field for _, _, field in split)))
        self._index.update(dict.fromkeys((key for key, _, _ in split), len(self._shards)))
        self._shards.append(path)


def _check_fingerprint(folder: Path, expected: Fingerprint) -> None:
    path = folder / _FINGERPRINT
    if not path.exists():
        # A new folder gets the fingerprint; files that a process is still writing do not count as others'
        names = {other.name for other in folder.iterdir() if not other.name.endswith("-part")}
        if names and _FINGERPRINT not in names:  # another process may have written it just now
            raise ValueError(f"data.cache: {folder} holds other files; expected an empty folder, or a free name")
        with atomic_write(path, shared=True) as part:
            part.write_text(json.dumps(expected, indent=1))
        return
    # The folder's name is a hash of the fingerprint, so a difference means a damaged or a moved folder
    stored = read_as(dict[str, str | int | float], path, "delete the folder to rebuild the cache")
    differing = sorted(k for k in expected.keys() | stored.keys() if expected.get(k) != stored.get(k))
    if differing:
        differences = "; ".join(f"{k} is {stored.get(k)!r} there and {expected.get(k)!r} here" for k in differing)
        raise ValueError(f"data.cache: {folder} does not match its name: {differences}; delete the folder")


def _names(path: Path) -> list[str] | None:
    """Return the tensor names in a shard's header; None if the file is truncated or its header damaged.

    Raises:
        ValueError: the file is not a shard of this cache.
    """
    try:
        check_file(path, None)  # a pipe would be read for ever
        with safe_open(path, "pt") as shard:  # checks names, shapes, offsets and the file's length
            names = list(shard.keys())
    except SafetensorError:
        return None
    except OSError as error:
        raise ValueError(
            f"data.cache: {path} cannot be read ({error.strerror or error}); look at its permissions, or move it away"
        ) from error
    # Names are key|field; every key of a shard has every field
    split = [name.rpartition("|") for name in names]
    fields = {field for _, _, field in split}
    keys = {key for key, _, _ in split}
    if not all(bar for _, bar, _ in split) or len(names) != len(keys) * len(fields):
        raise ValueError(f"data.cache: {path} is not a file of this cache; move it away")
    return names


def cache_folder(data: Data, output: Path) -> Path:
    """Return the folder of a recipe's caches; `output` is the recipe's output folder."""
    return output / "cache" if data.cache == "auto" else Path(data.cache)
