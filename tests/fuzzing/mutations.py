"""Damaged files: bytes changed, or the structure of JSON changed, in files that are sound.

Every random choice comes from one `random.Random`, which hypothesis seeds: an input costs less than its reading.
"""

import json
import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from hypothesis import strategies as st

Files = Mapping[str, bytes]  # content by name
DEVICE, PIPE, FOLDER = b"<device>", b"<pipe>", b"<folder>"  # contents for which `rule.write` makes something else
HUGE = (10**400, -(10**30), 2**63, 10**19, 1e308, math.nan, math.inf, -1, 0, 0.5)
ODD_TEXTS = (
    "",
    " ",
    "\0",
    "null",
    "[]",
    "../../x",
    "/dev/zero",
    "a" * 300,
    "é" * 200,
    "<image>",
    "-0",
    "1e400",
    "\ufeff",
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(HUGE), st.floats(), st.sampled_from(ODD_TEXTS), st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=6,
)


def damaged(files: Files, rng: Random) -> dict[str, bytes]:
    """Damage one file of several; now and then remove one, exchange two, or put a device, pipe or folder there."""
    result, name = dict(files), rng.choice(sorted(files))
    content = files[name]
    change = STRUCTURED.get(name.rpartition(".")[2], changed_bytes)
    choice = rng.random()
    if choice < 0.6:
        result[name] = change(content, rng)
    elif choice < 0.85:
        result[name] = changed_bytes(content, rng)
    elif choice < 0.88:
        del result[name]
    elif choice < 0.92:
        result[name] = files[rng.choice(sorted(files))]
    elif choice < 0.95:
        result[name] = rng.choice((DEVICE, PIPE, FOLDER))
    else:
        result[name] = rng.randbytes(rng.randrange(64))
    return result


def changed_bytes(content: bytes, rng: Random) -> bytes:
    """Flip, cut out, repeat or insert bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(data))
        end = min(len(data), at + rng.choice((1, 2, 8, 64, 4096)))
        match rng.choice(("flip", "set", "cut", "end", "repeat", "insert", "deep")):
            case "flip" if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case "set":
                data[at:end] = rng.choice((b"\0", b"\xff", b'"', b"{", b"\n")) * (end - at)
            case "cut":
                del data[at:end]
            case "end":
                del data[at:]
            case "repeat":
                data[at:at] = data[at:end]
            case "insert":
                data[at:at] = rng.randbytes(rng.randrange(16))
            case "deep":
                data[at:at] = rng.choice((b"[", b'{"a":')) * 3000
    return bytes(data)


def changed_json(content: bytes, rng: Random) -> bytes:
    """Change the structure of a file of JSON, or of one line of JSON."""
    try:
        return json.dumps(changed_value(json.loads(content), rng)).encode()
    except ValueError:
        lines = content.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(changed_value(json.loads(lines[at]), rng)).encode()
        return b"\n".join(lines) + b"\n"


def changed_header(content: bytes, rng: Random) -> bytes:
    """Change the header of a safetensors file, which is JSON, with the length that it now has."""
    length = int.from_bytes(content[:8], "little")
    header = changed_json(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


STRUCTURED: dict[str, Callable[[bytes, Random], bytes]] = {
    "json": changed_json,
    "jsonl": changed_json,
    "unfinished": changed_json,
    "safetensors": changed_header,
}


def changed_value(value: Any, rng: Random) -> Any:
    """Replace, delete, rename, repeat or wrap one value inside a value of JSON."""
    path = rng.choice(places(value))
    if not path:
        return any_value(rng)
    container, key = value, path[-1]
    for part in path[:-1]:
        container = container[part]
    match rng.choice(("put", "put", "put", "delete", "rename", "wrap", "deep")):
        case "put":
            container[key] = any_value(rng)
        case "delete":
            del container[key]
        case "rename" if isinstance(container, dict):
            container[rng.choice(("", "id", "type", "\0", "é"))] = container.pop(key)
        case "rename":
            container.insert(key, container[key])
        case "wrap":
            member = container[key]
            container[key] = rng.choice(([member], {"a": member}, [member, member], str(member)))
        case "deep":
            container[key] = nested(rng.choice((50, 900)))
    return value


def places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a value of JSON, and its own."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, one in inner for path in places(one, (*prefix, key)))]


def any_value(rng: Random, depth: int = 2) -> Any:
    """Return a value of JSON."""
    choice = rng.randrange(6 if depth else 4)
    if choice == 0:
        return rng.choice((None, True, False))
    if choice == 1:
        return rng.choice(HUGE)
    if choice in (2, 3):
        return rng.choice((*ODD_TEXTS, chr(rng.randrange(0xD7FF)) * rng.randrange(4)))
    values = [any_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    return values if choice == 4 else {rng.choice(("", "a", "id", "text")): one for one in values}


def nested(depth: int) -> Any:
    """Return nothing in `depth` lists."""
    value: Any = None
    for _ in range(depth):
        value = [value]
    return value
