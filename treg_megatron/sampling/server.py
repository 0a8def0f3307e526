"""Sampling from a server with an OpenAI-compatible completions API (vLLM, SGLang, llama.cpp, ...).

Prompts are sent as token ids. vLLM returns the sampled ids on request; other servers return text, which labelling
tokenises.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.sampling import EngineSettings
from treg_megatron.sampling.decoding import Decoding
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Sampled
from treg_megatron.utils.http import ask_json


class ServerSampler:
    """A :class:`~treg_megatron.sampling.Sampler` for ``settings.server_model`` on the server at ``address``.

    Raises:
        UserError: the server does not answer.
    """

    def __init__(self, settings: EngineSettings, address: str, tokenizer: ChatTokenizer):
        self._settings, self._tokenizer = settings, tokenizer
        self._address = address.rstrip("/")
        self._model = settings.server_model or self._ask("models")["data"][0]["id"]

    def sample(self, prompts: Sequence[list[int]], seed: int, decoding: Decoding) -> list[Sampled]:
        """See :meth:`treg_megatron.sampling.Sampler.sample`; all prompts are sent concurrently."""
        with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._sample(prompt, seed, decoding), prompts))

    def _sample(self, prompt: list[int], seed: int, decoding: Decoding) -> Sampled:
        stops: dict[str, Any] = {"stop": list(decoding.stop_strings)} if decoding.stop_strings else {}
        if decoding.stop_tokens:  # of vLLM and SGLang; other servers know the model's own only
            stops["stop_token_ids"] = list(decoding.stop_tokens)
        answer = self._ask(
            "completions",
            {
                "model": self._model,
                "prompt": prompt,
                "seed": seed,
                "temperature": decoding.temperature,
                "top_p": decoding.top_p,
                "max_tokens": decoding.max_new_tokens,
                "return_token_ids": True,
                **stops,
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
        sampled = decoding.response(self._tokenizer, ids)
        if finished and not sampled.finished:  # the server left out the token that ended the response
            sampled = decoding.response(self._tokenizer, [*ids, self._tokenizer.end_of_turn])
        return sampled

    def _ask(self, path: str, content: dict[str, Any] | None = None) -> Any:
        return ask_json(
            f"{self._address}/{path}",
            content,
            timeout=self._settings.timeout,
            max_attempts=self._settings.max_attempts,
            advice="what was sampled so far is kept: restore the server and rerun the same command",
        )
