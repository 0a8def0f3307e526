"""A local server of OpenAI's completions protocol, whose answers a function of the request decides."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class CompletionsServer(ThreadingHTTPServer):
    """The server; ``asked`` are the requests so far.

    Args:
        answer: gives the one choice of a request.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.asked = answer, []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextlib.contextmanager
def serving(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[CompletionsServer]:
    """A running server, in a thread of this process."""
    with CompletionsServer(answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: CompletionsServer

    def do_GET(self):
        self.respond({"data": [{"id": "served"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.respond({"choices": [self.server.answer(asked)]})

    def respond(self, content: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the client was killed
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass
