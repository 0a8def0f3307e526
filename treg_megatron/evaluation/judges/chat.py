"""A chat server as judge: every request is asked at most once, and its reply kept."""

import json
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from treg_megatron.config.schema import JudgeSection
from treg_megatron.errors import UserError
from treg_megatron.evaluation.judges.reply_cache import ReplyCache, request_key
from treg_megatron.utils.http import Refused, ask_json, key_from_environment

#: statuses by which a server turns one request down: too long, or against its rules; 200 with an error as its answer
UNACCEPTABLE = {200, 400, 413, 422}


class ChatServer:
    """The server ``judge.server``, behind a :class:`ReplyCache`; a context manager, for use by several threads.

    Raises:
        UserError: ``judge.server`` or ``judge.model`` has no value, or the variable of the API key is not set.
    """

    def __init__(self, section: JudgeSection):
        for name in ("server", "model"):
            if getattr(section, name) is None:
                raise UserError(f"judge.kind is {section.kind}, but judge.{name} has no value")
        self._section = section
        self._api_key = key_from_environment(section.api_key_env, "judge.api_key_env")
        self._cache = ReplyCache(Path(section.cache))
        self._asking: dict[str, Future] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "ChatServer":
        self._cache.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.__exit__()

    def reply(self, request: dict[str, Any], attempt: int) -> dict[str, Any]:
        """The server's reply to a chat completion request; from the cache, if it has been given before.

        Threads that want the same reply at the same time wait for the first one's.

        Args:
            request: the JSON body.
            attempt: 0, or how many replies to the same request were of no use.

        Raises:
            Refused: the server refused the request.
            UserError: the server gave no answer, or it cannot be kept.
        """
        key = request_key(request, attempt)
        with self._lock:
            reply = self._cache.find(key)
            if reply is not None:
                return reply
            asking = self._asking.get(key)
            mine = asking is None
            if asking is None:
                asking = self._asking[key] = Future()
        if mine:
            try:
                reply = self._ask(request)
                self._cache.add(key, request, attempt, reply)
                asking.set_result(reply)
            except BaseException as error:
                asking.set_exception(error)
            finally:
                with self._lock:
                    del self._asking[key]
        return asking.result()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        section = self._section
        address = f"{str(section.server).rstrip('/')}/chat/completions"
        reply = ask_json(
            address,
            request,
            timeout=section.timeout,
            max_attempts=section.max_attempts,
            advice="the replies so far are kept: restore the server and rerun the same command",
            api_key=self._api_key,
        )
        if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list) or not reply["choices"]:
            said = json.dumps(reply)[:200]
            raise Refused(f"{address} answered with something else than a chat completion: {said}", status=200)
        return reply


def text_of(reply: dict[str, Any]) -> str:
    """The text of a chat completion; empty if it has none, as after a call of a tool."""
    message = reply["choices"][0].get("message") or {}
    text = message.get("content")
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""
