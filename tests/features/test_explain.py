"""Labels by a language model, which is a server on this machine that checks what it is asked."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nnsight_transcoders import (
    FeatureBundle,
    TranscoderSet,
    collect_features,
    explain_features,
    openai_endpoint,
)
from nnsight_transcoders.errors import EndpointError, InputError
from nnsight_transcoders.features.statistics import StatisticsConfig

from .conftest import TEXTS

#: From a request's body to (status, headers, body).
Reply = Callable[[dict[str, Any]], tuple[int, dict[str, str], Any]]


class Server:
    """A chat-completions endpoint on the loopback interface."""

    def __init__(self, reply: Reply) -> None:
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, dict(self.headers), body))
                status, headers, answer = reply(body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def said(text: str) -> tuple[int, dict[str, str], Any]:
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], Server]]:
    servers: list[Server] = []

    def start(reply: Reply) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def task(body: dict[str, Any]) -> str:
    system = body["messages"][0]["content"]
    if "Say in at most twelve words" in system:
        return "explain"
    return "fuzz" if "marked by" in system else "detect"


def pieces(body: dict[str, Any]) -> dict[int, str]:
    text = body["messages"][1]["content"]
    found = re.findall(r"\[(\d+)\] (.*?)(?=\n\n\[\d+\] |\Z)", text, re.S)
    return {int(number): piece for number, piece in found}


def busy(bundle: FeatureBundle) -> tuple[int, int]:
    """A feature of which there are examples of many strengths, and windows without it."""
    for layer in bundle.layers:
        for feature in bundle.density(layer).argsort(descending=True).tolist():
            report = bundle[layer, feature]
            contexts = {e.context for group in report.groups for e in group.examples}
            if len(contexts) > 11 and len(bundle.inactive_examples(layer, feature)) > 5:
                return layer, feature
    raise AssertionError("no such feature")


# -- the endpoint --------------------------------------------------------------------------------


def test_the_request(serve: Callable[[Reply], Server]) -> None:
    server = serve(lambda _: said("hello"))
    ask = openai_endpoint(server.url + "/", "tiny", api_key="secret", temperature=0, max_tokens=9)
    messages = [{"role": "user", "content": "<\u00e9>"}]
    assert ask(messages) == "hello"
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    assert body == {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 9}


def test_the_key_comes_from_the_environment_or_is_not_sent(
    serve: Callable[[Reply], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda _: said("hello"))
    openai_endpoint(server.url, "tiny")([])
    assert "Authorization" not in server.seen[-1][1]
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    openai_endpoint(server.url, "tiny")([])
    assert server.seen[-1][1]["Authorization"] == "Bearer from-env"


def test_it_tries_again_when_it_is_told_to(serve: Callable[[Reply], Server]) -> None:
    replies = iter([(429, {"Retry-After": "0"}, {}), (503, {"Retry-After": "0"}, {}), said("ok")])
    server = serve(lambda _: next(replies))
    assert openai_endpoint(server.url, "tiny")([]) == "ok"
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("reply", "message", "asked"),
    [
        ((401, {}, {"error": "no such key"}), r"answered 401 .*no such key", 1),
        ((429, {"Retry-After": "0"}, {}), "answered 429", 2),
        ((200, {}, b"<html>"), "no chat completion", 1),
        ((200, {}, {"choices": []}), "no chat completion", 1),
        ((200, {}, {"choices": [{"message": {"content": None}}]}), "without text", 1),
        ((307, {"Location": "http://127.0.0.1:9/"}, {}), "answered 307", 1),
    ],
)
def test_answers_that_are_no_use(
    serve: Callable[[Reply], Server], reply: tuple, message: str, asked: int
) -> None:
    server = serve(lambda _: reply)
    ask = openai_endpoint(server.url, "tiny", api_key="secret", attempts=2)
    with pytest.raises(EndpointError, match=message) as caught:
        ask([])
    assert "secret" not in str(caught.value)
    assert len(server.seen) == asked


def test_nobody_answers() -> None:
    with pytest.raises(EndpointError, match="cannot reach"):
        openai_endpoint("http://127.0.0.1:9/v1", "tiny", attempts=1)([])


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("localhost:8000", {}, "http"),
        ("file:///etc/passwd", {}, "http"),
        ("http://example.org/v1", {"api_key": "secret"}, "unencrypted"),
        ("http://localhost/v1", {"attempts": 0}, "attempts"),
    ],
)
def test_addresses_that_are_refused(url: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        openai_endpoint(url, "tiny", **options)


# -- labels and scores ---------------------------------------------------------------------------


def test_a_label_from_the_strongest_examples(
    bundle: FeatureBundle, serve: Callable[[Reply], Server]
) -> None:
    server = serve(lambda _: said(' "Words before\n a <b>number</b>." \n'))
    key = busy(bundle)
    labels = explain_features(bundle, [key], openai_endpoint(server.url, "m"), n_examples=3)
    assert labels[key] == bundle.labels[key] == bundle[key].label
    assert labels[key].text == "Words before a <b>number</b>."
    assert labels[key].source == "llm"
    assert labels[key].scores == {}
    ((_, _, body),) = server.seen
    shown = pieces(body)
    assert list(shown.values()) == [str(e) for e in bundle[key].examples[:3]]
    assert all("<<" in piece for piece in shown.values())


def judge(bundle: FeatureBundle, key: tuple[int, int], knows: bool) -> Reply:
    """Answers as one who knows where the feature is active, or as one who says all."""
    every = [e for group in bundle[key].groups for e in group.examples]
    plain = {"".join(e.tokens) for e in every}
    marked = {str(e) for e in every}

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if task(body) == "explain":
            return said("a label")
        assert "a label" in body["messages"][0]["content"]
        right = plain if task(body) == "detect" else marked
        numbers = [n for n, piece in pieces(body).items() if not knows or piece in right]
        return said(f"Sure: {numbers}")

    return reply


@pytest.mark.parametrize(("knows", "score"), [(True, 1.0), (False, 0.5)])
def test_scores(
    bundle: FeatureBundle, serve: Callable[[Reply], Server], knows: bool, score: float
) -> None:
    key = busy(bundle)
    server = serve(judge(bundle, key, knows))
    ask = openai_endpoint(server.url, "m")
    labels = explain_features(bundle, [key], ask, scores=("detection", "fuzzing"), workers=2)
    assert labels[key].scores == {"detection": score, "fuzzing": score}
    used = set(pieces(server.seen[0][2]).values())
    for _, _, body in server.seen[1:]:
        kinds = pieces(body)
        assert len(kinds) >= 4
        assert not used & set(kinds.values()), "scored on what the label was made from"
        if task(body) == "fuzz":
            assert all("<<" in piece for piece in kinds.values())
        else:
            assert not any("<<" in piece for piece in kinds.values())


def test_repeated_text_is_not_scored_on_what_the_label_was_made_from(
    model: Any, transcoders: TranscoderSet, tmp_path: Path
) -> None:
    config = StatisticsConfig(n_top=4, per_band=8, before=8, after=3)
    texts = [*TEXTS[:30], *TEXTS[:30]]
    bundle = collect_features(model, transcoders, texts, tmp_path, layers=[2], config=config)
    key = busy(bundle)
    asked: list[list[str]] = []

    def ask(messages: Any) -> str:
        found = pieces({"messages": messages}).values()
        asked.append([re.sub("<<|>>", "", piece) for piece in found])
        return "[1]" if "JSON list" in messages[0]["content"] else "a label"

    explain_features(bundle, [key], ask, n_examples=4, scores=("detection",), workers=1)
    shown, scored = asked
    assert any(example.seen > 1 for example in bundle[key].examples)
    assert len(set(shown)) == len(shown) == 4
    assert not set(shown) & set(scored)


def test_features_that_are_never_active_are_not_asked_about(bundle: FeatureBundle) -> None:
    dead = int((bundle.density(1) == 0).nonzero()[0])

    def ask(_: Any) -> str:
        raise AssertionError("asked")

    assert explain_features(bundle, [(1, dead)], ask) == {}


def test_an_endpoint_that_fails_keeps_what_was_made(bundle: FeatureBundle) -> None:
    keys = [(1, int(i)) for i in bundle.density(1).topk(3).indices]
    answers = iter(["first", "", "third"])
    with pytest.raises(EndpointError, match="with no text"):
        explain_features(bundle, keys, lambda _: next(answers))
    assert bundle.labels[keys[0]].text == "first"
    assert keys[1] not in bundle.labels


@pytest.mark.parametrize("answer", ["none of them", "[99]", "[0]"])
def test_an_answer_without_numbers(bundle: FeatureBundle, answer: str) -> None:
    def ask(messages: Any) -> str:
        return "a label" if "twelve words" in messages[0]["content"] else answer

    with pytest.raises(EndpointError, match="list of numbers"):
        explain_features(bundle, [busy(bundle)], ask, scores=["detection"])


def test_options_that_are_refused(bundle: FeatureBundle) -> None:
    for options, message in (
        ({"scores": ["simulation"]}, "unknown scores"),
        ({"n_examples": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            explain_features(bundle, [], lambda _: "", **options)  # type: ignore[arg-type]
