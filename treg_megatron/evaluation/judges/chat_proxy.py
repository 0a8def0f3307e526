"""A chat server on this machine that passes requests on to the judge, for libraries that do the asking themselves.

Behind it a library gets what :class:`~treg_megatron.evaluation.judges.chat.ChatServer` gives: retries, and a cache that
survives kills. The judge's API key stays in this process; the library gets a token of its own, valid while it runs.
"""

import contextlib
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.evaluation.judges.chat import UNACCEPTABLE, ChatServer
from treg_megatron.utils.http import Refused


class ChatProxy:
    """``POST /ATTEMPT/v1/chat/completions`` on a free port of this machine; a context manager.

    Attributes:
        token: to be sent as the API key.
        failure: why the judge cannot go on, once that is so; every request is turned down from then on.
        refusal: what the judge said when it last turned a request down.
    """

    def __init__(self, server: ChatServer):
        self.token = secrets.token_hex(16)
        self.failure: BaseException | None = None
        self.refusal: str | None = None
        self._server = server

    def __enter__(self) -> "ChatProxy":
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Authorization") != f"Bearer {proxy.token}":
                    status, content = 401, {"error": {"message": "another process's judge"}}
                else:
                    status, content = proxy._answer(self.path, body)
                answer = json.dumps(content).encode()
                with contextlib.suppress(ConnectionError):  # the client has ended
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def address(self, attempt: int) -> str:
        """Base URL of an attempt, up to and including /v1."""
        return f"http://127.0.0.1:{self._http.server_port}/{attempt}/v1"

    def _answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        attempt, _, rest = path.lstrip("/").partition("/")
        if rest != "v1/chat/completions" or not attempt.isdecimal():
            return 404, {"error": {"message": f"{path}: only chat completions are passed on"}}
        if self.failure is None:
            try:
                return 200, self._server.reply(json.loads(body), int(attempt))
            except Refused as error:
                if error.status in UNACCEPTABLE:
                    self.refusal = str(error)
                    return 200, _without_verdict(json.loads(body))
                self.failure = error
            except (UserError, OSError, ValueError) as error:
                self.failure = error
        return 400, {"error": {"message": str(self.failure)}}


def _without_verdict(request: dict[str, Any]) -> dict[str, Any]:
    """An empty completion, for a request that the judge turned down: a library would give up on all others as well."""
    message = {"role": "assistant", "content": ""}
    return {
        "id": "refused",
        "object": "chat.completion",
        "created": 0,
        "model": request.get("model"),
        "choices": [{"index": 0, "finish_reason": "content_filter", "logprobs": None, "message": message}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
