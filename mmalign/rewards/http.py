"""Judge on an HTTP server, in the environment or on the machine that it needs.

A request is a POST of JSON, `{"images": [PNG in base64, ...], "prompts": [text, ...]}`. The reply is `{"scores":
[number, ...]}`, one for each prompt, or `{"error": text}` with a status of 400 or more. An empty request, whose reply
has no scores and may name the server's `"model"`, tests the server. docs/judge_server.py is an example. For responses a
request has a list of images for each prompt, `"responses"`, and `"truths"` where the data have true answers.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

import torch
from PIL import Image
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor

from mmalign.reading import parse_as
from mmalign.rewards import BatchConfig, ResponseJudge, Shown, Truths, as_scores, in_batches

logger = logging.getLogger(__name__)

BUSY = (408, 425, 429, 500, 502, 503, 504)  # statuses after which a request is repeated
MAX_BYTES = 2**24  # of a reply
EMPTY: Mapping[str, object] = {"images": [], "prompts": []}  # request that tests the server
REMEDY = "correct the server (docs/judges.md describes its replies), or reward.path"
RESUME = "then run the same command again: prepare and evaluate resume"


class Config(BatchConfig):
    """Options of the server's client."""

    of_responses = True

    timeout: PositiveFloat = 60.0
    """Seconds to wait for a reply."""
    retries: NonNegativeInt = 3
    """Further attempts after no reply, or after a status such as 503."""
    wait: NonNegativeFloat = 1.0
    """Seconds before the second attempt; doubled before each further one."""

    def served_model(self, path: str) -> str:
        """Return the name of the model that the server at `path` gives; "" if it gives none."""
        return Server(path, self).model()


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Follow no redirect: images and texts go to the recipe's address alone."""


@cache
def _opener() -> OpenerDirector:
    return build_opener(_NoRedirects)


@dataclass(frozen=True)
class Server:
    """Address of a server, with the options of its client."""

    url: str
    options: Config

    def scores(self, content: Mapping[str, object], prompts: Sequence[str]) -> Tensor:
        """Send a request and return the scores [N] of its reply, float32.

        Raises:
            ValueError: the server does not reply in time, or its reply has no such scores.
        """
        return as_scores(str(self), self._entries(content)["scores"], prompts, REMEDY)

    def model(self) -> str:
        """Return the name of the model that the reply to an empty request gives; "" if it gives none.

        Raises:
            ValueError: the server does not reply in time, or its reply has no scores.
        """
        return str(self._entries(EMPTY).get("model", ""))

    def _entries(self, content: Mapping[str, object]) -> dict[str, object]:
        """Return the entries of the reply, "scores" among them."""
        reply = self._reply(json.dumps(content).encode())
        try:
            entries = parse_as(dict[str, object], reply)
            entries["scores"]
        except (ValueError, KeyError):
            shown = " ".join(reply[:100].decode("utf-8", "replace").split())
            raise ValueError(f'{self} replied {shown!r}; expected JSON, {{"scores": [...]}}; {REMEDY}') from None
        return entries

    def _reply(self, body: bytes) -> bytes:
        """Return the body of the reply; repeat the request while the server is dead, slow or busy."""
        request = Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(self.options.retries + 1):
            try:
                with _opener().open(request, timeout=self.options.timeout) as reply:
                    content: bytes = reply.read(MAX_BYTES)
                return content
            except (OSError, HTTPException) as error:
                # Any reply but that of a busy server is final
                if isinstance(error, HTTPError) and error.code not in BUSY:
                    raise ValueError(f"{self} replied {_status(error)}; {REMEDY}") from None
                failure = error
            if attempt < self.options.retries:
                logger.warning(f"{self}: no reply ({self._reason(failure)}); repeating the request")
                time.sleep(self.options.wait * 2**attempt)
        raise ValueError(
            f"{self} gave no reply in {self.options.retries + 1} attempts ({self._reason(failure)}); start the server, "
            f"raise options.timeout or lower options.batch_size; {RESUME}"
        ) from failure

    def _reason(self, error: Exception) -> str:
        if isinstance(error, HTTPError):
            return _status(error)
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError):
            return f"nothing within {self.options.timeout:g} s"
        return " ".join(str(reason).split()) or type(reason).__name__

    def __str__(self) -> str:
        return f"reward http: {self.url}"


def _status(error: HTTPError) -> str:
    """Return the status of a reply, with the server's own error if it gives one."""
    try:
        text = str(parse_as(dict[str, object], error.read(MAX_BYTES))["error"])
    except (ValueError, KeyError, OSError, HTTPException):
        text = ""
    return " ".join(f"{error.code} {error.reason} {text}".split())[:300]


@dataclass(frozen=True)
class HttpJudge:
    """Judge on a server, which gets at most `batch_size` images in a request."""

    server: Server

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        """Return scores [N], float32, on the CPU; `t` is not sent.

        Raises:
            ValueError: the server does not reply in time, or its reply has no such scores.
        """

        def score(rows: slice) -> Tensor:
            content = {"images": [as_png(image) for image in images[rows]], "prompts": list(prompts[rows])}
            return self.server.scores(content, prompts[rows])

        return in_batches(score, len(prompts), self.server.options.batch_size)

    def score_responses(
        self, images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None
    ) -> Tensor:
        """Return scores [N] of responses, float32, on the CPU.

        Raises:
            ValueError: the server does not reply in time, or its reply has no such scores.
        """

        def score(rows: slice) -> Tensor:
            pngs = [[as_png(image) for image in shown] for shown in images[rows]]
            content = {"images": pngs, "prompts": list(prompts[rows]), "responses": list(responses[rows])}
            if truths is not None:
                content["truths"] = [list(texts) for texts in truths[rows]]
            return self.server.scores(content, prompts[rows])

        return in_batches(score, len(prompts), self.server.options.batch_size)


def as_png(image: Image.Image) -> str:
    """Return an image as PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def check(key: str, path: str) -> None:
    """Check that `path` is an address.

    Raises:
        ValueError: it is none, not of HTTP, not of printable ASCII, or has a user's name.
    """
    try:
        address = urlsplit(path)
        valid = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        valid = valid and path.isascii() and path.isprintable() and " " not in path
    except ValueError:  # such as a port that is no number
        valid = False
    if not valid:
        raise ValueError(f"{key}: {path[:200]!r} is no address; expected one such as http://localhost:8000/score")
    if "@" in address.netloc:
        raise ValueError(
            f"{key}: the address of {address.hostname} names a user, whom the log would show; leave it out"
        )


check_responses = check


def load_responses(path: str, device: torch.device, cfg: Config) -> ResponseJudge:
    """Return the judge of responses at the address `path`, once the server has replied to an empty request.

    Raises:
        ValueError: there is no such server.
    """
    return load(path, device, cfg).score_responses


def load(path: str, device: torch.device, cfg: Config) -> HttpJudge:
    """Return the judge at the address `path`, once the server has replied to an empty request.

    Raises:
        ValueError: there is no such server.
    """
    check("reward.path", path)
    logger.info(f"reward.path: images and texts are sent to {path}")
    server = Server(path, cfg)
    server.scores(EMPTY, [])
    return HttpJudge(server)
