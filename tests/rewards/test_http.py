"""A judge on a server: the example in docs/, and dead, slow, busy and wrong servers on the loopback."""

import base64
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

import mmalign
from mmalign.config import RewardConfig
from mmalign.modalities.loading import build_reward_model, check_reward_model
from mmalign.rewards import RewardModel, load_response_judge, load_reward_model

EXAMPLE = Path(mmalign.__file__).parents[1] / "docs" / "judge_server.py"
GREY, WHITE = Image.new("RGB", (8, 8), (51, 51, 51)), Image.new("RGB", (8, 8), "white")
Reply = tuple[int, object]


class Scripted:
    """Server on the loopback that answers by a function of the request, and keeps the requests with images."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.described: dict[str, str] = {}  # in the reply to an empty request
        self.reply: Callable[[Any], Reply] = lambda request: (200, {"scores": [0.5] * len(request["prompts"])})
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content = 200, {"scores": [], **server.described}
                if request["prompts"]:
                    server.requests.append(request)
                    status, content = server.reply(request)
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    if status == 302:
                        self.send_header("Location", server.url)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # a client that no longer waits
                    pass

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/score"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def judge(self, **options: object) -> RewardModel:
        return load_reward_model("http", self.url, **{"wait": 0.0, **options})

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    scripted = Scripted()
    yield scripted
    scripted.stop()


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="no checkout: the installed package is under test")
def test_the_example_server_judges(monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with subprocess.Popen([sys.executable, str(EXAMPLE), "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            judge = load_reward_model("http", url, retries=0)
            assert log_lines == [f"reward.path: images and texts are sent to {url}"]
            torch.testing.assert_close(judge([GREY, WHITE], ["a", "b"]), torch.tensor([0.2, 1.0]))
        finally:
            process.kill()


def test_images_and_prompts_arrive_as_they_are(server: Scripted, images: list[Image.Image]) -> None:
    prompts = ["a", "", "ä \N{SNOWMAN}", "line\nbreak", "e" * 10_000]
    server.reply = lambda request: (200, {"scores": [len(prompt) for prompt in request["prompts"]]})
    scores = server.judge(batch_size=2)(images, prompts)
    assert scores.tolist() == [len(prompt) for prompt in prompts] and scores.dtype == torch.float32
    assert [len(request["prompts"]) for request in server.requests] == [2, 2, 1]
    sent = [png for request in server.requests for png in request["images"]]
    for png, image in zip(sent, images, strict=True):
        received = Image.open(io.BytesIO(base64.b64decode(png)))
        assert received.mode == image.mode and ImageChops.difference(received, image).getbbox() is None


def test_responses_are_sent_with_their_images(server: Scripted) -> None:
    server.reply = lambda request: (200, {"scores": [len(text) for text in request["responses"]]})
    judge = load_response_judge("http", server.url, batch_size=2)
    assert judge([[GREY, WHITE], [], [WHITE]], ["a", "b", "c"], ["one", "four", ""]).tolist() == [3, 4, 0]
    assert [len(shown) for request in server.requests for shown in request["images"]] == [2, 0, 1]
    assert [request["prompts"] for request in server.requests] == [["a", "b"], ["c"]]
    judge([[WHITE]], ["a"], ["one"], [("yes", "no")])
    assert "truths" not in server.requests[0] and server.requests[-1]["truths"] == [["yes", "no"]]


def test_a_busy_server_is_asked_again(server: Scripted, log_lines: list[str]) -> None:
    def busy_twice(request: Any) -> Reply:
        return (503, {"error": "loading"}) if len(server.requests) < 3 else (200, {"scores": [1.0]})

    server.reply = busy_twice
    assert server.judge()([GREY], ["a"]).tolist() == [1] and len(server.requests) == 3
    assert sum("no reply (503 Service Unavailable loading); repeating" in line for line in log_lines) == 2


def test_a_busy_server_is_asked_no_more_than_it_should(server: Scripted) -> None:
    server.reply = lambda request: (503, b"")
    judge = server.judge(retries=1)
    with pytest.raises(ValueError, match=r"gave no reply in 2 attempts \(503 Service Unavailable\)"):
        judge([GREY], ["a"])
    assert len(server.requests) == 2


def test_a_dead_server_is_found_when_it_loads(server: Scripted) -> None:
    server.stop()
    expected = r"^reward http: http://127\S+/score gave no reply in 2 attempts \(.*refused\); start the server, "
    with pytest.raises(ValueError, match=expected):
        server.judge(retries=1)


def test_a_slow_server_is_named(server: Scripted) -> None:
    def slow(request: Any) -> Reply:
        time.sleep(0.3)
        return 200, {"scores": [1.0]}

    judge = server.judge(timeout=0.1, retries=0)
    server.reply = slow
    with pytest.raises(ValueError, match=r"in 1 attempts \(nothing within 0.1 s\); .* raise options.timeout"):
        judge([GREY], ["a"])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, b"<html>"), "replied 404 Not Found; correct the server"),
        ((400, {"error": "no such model\nhere"}), "replied 400 Bad Request no such model here; correct the server"),
        ((200, b"<html> hello"), "replied '<html> hello'; expected JSON"),
        ((200, {"score": [1.0]}), "replied .*score.*; expected JSON"),
        ((200, [1.0]), r"replied '\[1.0\]'; expected JSON"),
        ((200, b"[" * 100_000), "replied '.*; expected JSON"),
        ((200, {"scores": [1.0, 2.0]}), "returned 2 scores for 1 prompts"),
        ((200, {"scores": "x"}), "returned str; expected a list of 1 numbers"),
        ((200, {"scores": [10**400]}), "returned inf for the prompt 'a dog'"),
        ((302, b""), "replied 302 Found; correct the server"),
        ((200, {"scores": [None]}), "returned None for the prompt 'a dog'"),
        ((200, {"scores": [float("nan")]}), "returned nan for the prompt 'a dog'"),
    ],
)
def test_a_wrong_server_ends_in_a_sentence(server: Scripted, reply: Reply, message: str) -> None:
    server.reply = lambda request: reply
    with pytest.raises(ValueError, match=f"^reward http: http://127.* {message}") as error:
        server.judge()([GREY], ["a dog"])
    assert len(server.requests) == 1 and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_what_is_judged_is_not_sent_again(server: Scripted, tmp_path: Path) -> None:
    """The server fails in the third request; the next run sends only the images that have no score."""
    prompts = [f"prompt {number}" for number in range(6)]

    def scores() -> torch.Tensor:
        config = RewardConfig(name="http", path=server.url, options={"batch_size": 2, "retries": 0})
        judge = build_reward_model(config, torch.device("cpu"), allow_pickle=False, scores=tmp_path)
        return judge([GREY] * 6, prompts)

    server.reply = lambda request: (200, {"scores": [0.5, 0.5]}) if len(server.requests) < 3 else (500, b"")
    with pytest.raises(ValueError, match="run the same command again"):
        scores()
    server.reply = lambda request: (200, {"scores": [0.25, 0.25]})
    assert scores().tolist() == [0.5] * 4 + [0.25] * 2
    assert [request["prompts"] for request in server.requests] == [
        prompts[:2], prompts[2:4], prompts[4:], prompts[4:],
    ]  # fmt: skip


def test_another_model_on_the_server_judges_again(server: Scripted, tmp_path: Path, log_lines: list[str]) -> None:
    config = RewardConfig(name="http", path=server.url)
    for name, num_requests in (("", 1), ("a", 2), ("b", 3), ("a", 3)):
        server.described = {"model": name} if name else {}
        build_reward_model(config, torch.device("cpu"), allow_pickle=False, scores=tmp_path)([GREY], ["a dog"])
        assert len(server.requests) == num_requests
    assert [line for line in log_lines if "1 of 1 scores are stored there and used again" in line] == log_lines[-1:]


@pytest.mark.parametrize(
    "path",
    [
        *("localhost:8000", "file:///etc/passwd", "ftp://host/x", "http://", "http://a:b/", ""),
        *("http://host/a b", " http://host", "http://host/\n", "http://h\u00f6st/"),
    ],
)
def test_what_is_no_address_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.reward\.path: .* is no address; expected one such as http://"):
        check_reward_model("evaluate.reward", RewardConfig(name="http", path=path))


def test_an_address_with_a_password_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match=r"the address of host names a user") as error:
        check_reward_model("evaluate.reward", RewardConfig(name="http", path="http://name:secret@host/"))
    assert "secret" not in str(error.value)
