"""JSON over HTTP: requests that are repeated while a server is busy or away."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

from treg_megatron.errors import UserError

FIRST_PAUSE = 1.0  # seconds; doubles with each retry
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}


def ask_json(address: str, content: Any = None, *, timeout: float, max_attempts: int, advice: str) -> Any:
    """The JSON answer of a server to a GET request, or to a POST request with ``content`` as JSON.

    Args:
        address: URL.
        timeout: seconds until an attempt is given up.
        max_attempts: attempts while the server cannot be reached, is silent or says that it is busy, with pauses that
            grow.
        advice: what the user is told to do when none succeeded.

    Raises:
        UserError: the server refused the request, or no attempt succeeded.
    """
    request = urllib.request.Request(
        address,
        headers={"Content-Type": "application/json"},
        data=None if content is None else json.dumps(content).encode(),
    )
    for attempt in range(max_attempts):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code not in _RETRIED:
                said = error.read(300).decode(errors="replace")
                raise UserError(f"{address} returned status {error.code}: {said}") from None
            problem: Any = f"status {error.code}"
        except (OSError, ValueError) as error:  # refused, reset, timed out, cut off
            problem = getattr(error, "reason", error)
    raise UserError(f"{address} gave no answer in {max_attempts} attempts (the last: {problem}); {advice}")
