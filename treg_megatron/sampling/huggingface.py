"""Sampling with Hugging Face's ``generate`` on one device, for small models and machines without a GPU."""

from collections.abc import Sequence
from typing import Any

import torch

from treg_megatron.models.huggingface import device_of, load_causal_lm, set_attention
from treg_megatron.sampling import EngineSettings
from treg_megatron.sampling.decoding import Decoding
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Sampled
from treg_megatron.tokenizer.model_folder import model_folder


class HuggingFaceSampler:
    """A :class:`~treg_megatron.sampling.Sampler` for the model in the folder ``settings.model``.

    Raises:
        UserError: the folder has no loadable model, or the device does not exist.
    """

    def __init__(self, settings: EngineSettings, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer
        self._device = device_of(settings.device)
        self._model: Any = load_causal_lm(model_folder(settings.model), getattr(torch, settings.dtype))
        self._model.to(self._device)
        set_attention(self._model, "sdpa")

    @torch.inference_mode()
    def sample(self, prompts: Sequence[list[int]], seed: int, decoding: Decoding) -> list[Sampled]:
        """See :meth:`treg_megatron.sampling.Sampler.sample`."""
        end = self._tokenizer.end_of_turn
        width = max(map(len, prompts))
        tokens = torch.full((len(prompts), width), end)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):  # pad on the left, so that all responses start at the same index
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        torch.manual_seed(seed)
        # set every option: the folder's own generation settings would change the distribution
        distribution = (
            {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
            if decoding.temperature
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        )
        stops = decoding.stop_strings
        text_stops = [_AfterText(stops, self._tokenizer, width)] if stops else []
        output = self._model.generate(
            tokens.to(self._device),
            attention_mask=mask.to(self._device),
            **distribution,
            repetition_penalty=1.0,
            num_beams=1,
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=[end, *decoding.stop_tokens],
            pad_token_id=end,
            stopping_criteria=text_stops,
        )
        return [decoding.response(self._tokenizer, ids) for ids in output[:, width:].tolist()]


class _AfterText:
    """A stopping criterion of ``generate``: a row ends when one of ``texts`` is in the text of its last tokens.

    Args:
        start: index of the first generated token.
    """

    def __init__(self, texts: Sequence[str], tokenizer: ChatTokenizer, start: int):
        self._texts, self._tokenizer, self._start = texts, tokenizer, start
        self._most_tokens = max(len(text.encode()) for text in texts)  # each holds a byte at least

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        first = max(self._start, input_ids.shape[1] - self._most_tokens)
        tails = [self._tokenizer.sampled(ids).text for ids in input_ids[:, first:].tolist()]
        return torch.tensor([any(text in tail for text in self._texts) for tail in tails], device=input_ids.device)
