"""Requests that are repeated: which, after which pauses, and what a server is told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from treg_megatron.errors import UserError
from treg_megatron.utils import http
from treg_megatron.utils.http import Refused, ask_json, key_from_environment


@pytest.fixture
def server(monkeypatch):
    """A server that gives the answers in ``answers``, one after the other: (status, headers, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.server.headers.append(dict(self.headers))
            status, headers, body = self.server.answers.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    running.asked, running.headers, running.answers, running.pauses = [], [], [], []
    running.address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(http.time, "sleep", running.pauses.append)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def ask(server, **options):
    settings = {"timeout": 10, "max_attempts": 4, "advice": "start it"} | options
    return ask_json(server.address, {"a": 1}, **settings)


OK = (200, {}, b'{"fine": true}')
BUSY = (503, {}, b"")


def test_pauses_grow_and_are_random(server):
    server.answers = [BUSY] * 3 + [OK] + [BUSY] * 3 + [OK]
    assert ask(server) == ask(server) == {"fine": True}
    assert server.asked == [{"a": 1}] * 8
    first, second = server.pauses[:3], server.pauses[3:]
    assert first != second
    for pauses in (first, second):
        assert all(0.75 * base <= pause <= 1.5 * base for pause, base in zip(pauses, (1, 2, 4), strict=True))


def test_a_character_cut_in_half_can_be_written(server):
    server.answers = [(200, {}, rb'{"choices": [{"text": "so \ud83d\ude00 and \ud83d", "\udc00": 1}]}')]
    assert ask(server) == {"choices": [{"text": "so \N{GRINNING FACE} and \ufffd", "\ufffd": 1}]}


def test_a_server_may_say_how_long_to_wait(server):
    server.answers = [(429, {"Retry-After": "7"}, b""), (429, {"Retry-After": "9999"}, b""), BUSY, OK]
    ask(server)
    assert server.pauses[0] == 7 and server.pauses[1] == http.LONGEST_PAUSE and server.pauses[2] <= 6
    server.answers = [(429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b""), OK]
    ask(server)
    assert server.pauses[3] <= 1.5


def test_an_answer_that_breaks_off_is_asked_for_again(server):
    server.answers = [(200, {"Content-Length": "100"}, b'{"fine"'), (200, {}, b"<html>"), OK]
    assert ask(server) == {"fine": True}


def test_what_is_refused_is_not_repeated(server):
    server.answers = [(401, {}, b"no such key"), OK]
    with pytest.raises(Refused, match="returned status 401: no such key") as caught:
        ask(server)
    assert caught.value.status == 401 and len(server.asked) == 1


def test_a_redirect_gets_neither_request_nor_key(server):
    server.answers = [(302, {"Location": f"{server.address}/elsewhere"}, b""), OK]
    with pytest.raises(Refused, match="status 302"):
        ask(server, api_key="secret")
    assert len(server.asked) == 1


def test_the_last_problem_and_the_advice_end_the_message(server):
    server.answers = [BUSY] * 4
    with pytest.raises(UserError, match=r"gave no answer in 4 attempts \(the last: status 503\); start it"):
        ask(server)
    assert len(server.pauses) == 3


def test_a_key_comes_from_the_environment_alone(server, monkeypatch):
    assert key_from_environment(None, "judge.api_key_env") is None
    with pytest.raises(UserError, match="judge.api_key_env names the environment variable MY_KEY, which is not set"):
        key_from_environment("MY_KEY", "judge.api_key_env")
    monkeypatch.setenv("MY_KEY", " secret\n")
    server.answers = [OK, OK]
    ask(server, api_key=key_from_environment("MY_KEY", "judge.api_key_env"))
    ask(server)
    assert server.headers[0]["Authorization"] == "Bearer secret" and "Authorization" not in server.headers[1]
