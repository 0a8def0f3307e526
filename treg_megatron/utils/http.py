"""JSON over HTTP: requests that are repeated while a server is busy or away."""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from typing import Any

from treg_megatron.errors import UserError

FIRST_PAUSE = 1.0  # seconds; doubles with each retry
LONGEST_PAUSE = 60.0
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class Refused(UserError):
    """A server refused a request, and will refuse it again.

    Attributes:
        status: of the answer.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect counts as a refusal: followed, it would turn POST into GET, and send the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask_json(
    address: str,
    content: Any = None,
    *,
    timeout: float,
    max_attempts: int,
    advice: str,
    api_key: str | None = None,
) -> Any:
    """The JSON answer of a server to a GET request, or to a POST request with ``content`` as JSON.

    A text cut inside a character may hold half of a surrogate pair, which no file takes as UTF-8: it becomes U+FFFD.

    Args:
        address: URL.
        timeout: seconds until an attempt is given up.
        max_attempts: attempts while the server cannot be reached, is silent or says that it is busy. The pauses grow,
            are random within a factor of two, so that concurrent requests spread out, and are as long as the server
            asks for.
        advice: what the user is told to do when none succeeded.
        api_key: sent as a bearer token.

    Raises:
        Refused: the server refused the request.
        UserError: no attempt succeeded.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "treg-megatron"}  # some hosts block urllib's own
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(
        address, headers=headers, data=None if content is None else json.dumps(content).encode()
    )
    opener = urllib.request.build_opener(_NoRedirect)
    pause = 0.0
    for attempt in range(max_attempts):
        if attempt:
            growing = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)
            time.sleep(max(pause, growing * random.uniform(0.75, 1.5)))
        pause = 0.0
        try:
            with opener.open(request, timeout=timeout) as answer:
                return _well_formed(json.load(answer))
        except urllib.error.HTTPError as error:
            if error.code not in _RETRIED:
                said = error.read(300).decode(errors="replace")
                raise Refused(f"{address} returned status {error.code}: {said}", error.code) from None
            problem: Any = f"status {error.code}"
            pause = _asked_pause(error)
        except (OSError, ValueError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off
            problem = getattr(error, "reason", error)
    raise UserError(f"{address} gave no answer in {max_attempts} attempts (the last: {problem}); {advice}")


def _well_formed(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_well_formed(item) for item in value]
    if isinstance(value, dict):
        return {_well_formed(key): _well_formed(item) for key, item in value.items()}
    return value


def key_from_environment(variable: str | None, setting: str) -> str | None:
    """The API key that an environment variable holds; None if no variable is named.

    Raises:
        UserError: the variable is not set.
    """
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value:
        raise UserError(f"{setting} names the environment variable {variable}, which is not set; export the key in it")
    return value


def _asked_pause(error: urllib.error.HTTPError) -> float:
    """Seconds that a busy server asks to wait, at most :data:`LONGEST_PAUSE`; 0 if it does not say."""
    try:
        return min(float(error.headers.get("Retry-After", 0)), LONGEST_PAUSE)
    except ValueError:  # a date
        return 0.0
