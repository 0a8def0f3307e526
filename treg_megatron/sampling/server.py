"""Sampling from a server with an OpenAI-compatible completions API (vLLM, SGLang, llama.cpp, ...).

Prompts are sent as token ids. vLLM returns the sampled ids on request; other servers return text, which labelling
tokenises.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from treg_megatron.config.schema import SampleSection
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Sampled

_FIRST_PAUSE = 1.0  # seconds; doubles with each retry
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}


class ServerSampler:
    """A :class:`~treg_megatron.sampling.Sampler` for ``section.server_model`` on the server ``section.server``.

    Raises:
        UserError: no address is given, or the server does not answer.
    """

    def __init__(self, section: SampleSection, tokenizer: ChatTokenizer):
        if not section.server:
            raise UserError("sample.server has no value; give the server's address, such as http://localhost:8000/v1")
        self._section, self._tokenizer = section, tokenizer
        self._address = section.server.rstrip("/")
        self._model = section.server_model or self._ask("models")["data"][0]["id"]

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[Sampled]:
        """See :meth:`treg_megatron.sampling.Sampler.sample`; all prompts are sent concurrently."""
        with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._sample(prompt, seed), prompts))

    def _sample(self, prompt: list[int], seed: int) -> Sampled:
        section = self._section
        answer = self._ask(
            "completions",
            {
                "model": self._model,
                "prompt": prompt,
                "seed": seed,
                "temperature": section.temperature,
                "top_p": section.top_p,
                "max_tokens": section.max_new_tokens,
                "return_token_ids": True,
            },
        )
        try:
            (choice,) = answer["choices"]
            text, finished, ids = choice["text"], choice["finish_reason"] == "stop", choice.get("token_ids")
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self._address}/completions returned an unexpected response: {json.dumps(answer)[:200]}"
            ) from None
        if ids is None:
            return Sampled(text, None, finished)
        end = self._tokenizer.end_of_turn
        return self._tokenizer.sampled(ids if not finished or ids[-1:] == [end] else [*ids, end])

    def _ask(self, path: str, content: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self._address}/{path}",
            headers={"Content-Type": "application/json"},
            data=None if content is None else json.dumps(content).encode(),
        )
        for attempt in range(self._section.max_attempts):
            if attempt:
                time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self._section.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code not in _RETRIED:
                    said = error.read(300).decode(errors="replace")
                    raise UserError(f"{self._address}/{path} returned status {error.code}: {said}") from None
                problem: Any = f"status {error.code}"
            except (OSError, ValueError) as error:  # refused, reset, timed out, cut off
                problem = getattr(error, "reason", error)
        raise UserError(
            f"{self._address}/{path} gave no answer in {self._section.max_attempts} attempts (the last: {problem}); "
            "what was sampled so far is kept: restore the server and rerun the same command"
        )
