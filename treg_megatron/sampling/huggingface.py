"""Sampling with Hugging Face's ``generate`` on one device, for small models and machines without a GPU."""

from collections.abc import Sequence

import torch

from treg_megatron.config.schema import SampleSection
from treg_megatron.models.huggingface import device_of, load_causal_lm, set_attention
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Sampled
from treg_megatron.tokenizer.model_folder import model_folder


class HuggingFaceSampler:
    """A :class:`~treg_megatron.sampling.Sampler` for the model in the folder ``section.model``.

    Raises:
        UserError: the folder has no loadable model, or the device does not exist.
    """

    def __init__(self, section: SampleSection, tokenizer: ChatTokenizer):
        self._section, self._tokenizer = section, tokenizer
        self._device = device_of(section.device)
        self._model = load_causal_lm(model_folder(section.model), getattr(torch, section.dtype)).to(self._device)
        set_attention(self._model, "sdpa")

    @torch.inference_mode()
    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[Sampled]:
        """See :meth:`treg_megatron.sampling.Sampler.sample`."""
        section, end = self._section, self._tokenizer.end_of_turn
        width = max(map(len, prompts))
        tokens = torch.full((len(prompts), width), end)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):  # pad on the left, so that all responses start at the same index
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        torch.manual_seed(seed)
        # set every option: the folder's own generation settings would change the distribution
        distribution = (
            {"do_sample": True, "temperature": section.temperature, "top_p": section.top_p, "top_k": 0}
            if section.temperature
            else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        )
        output = self._model.generate(
            tokens.to(self._device),
            attention_mask=mask.to(self._device),
            **distribution,
            repetition_penalty=1.0,
            num_beams=1,
            max_new_tokens=section.max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
        )
        return [self._tokenizer.sampled(ids) for ids in output[:, width:].tolist()]
