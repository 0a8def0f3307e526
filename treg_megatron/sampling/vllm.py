"""Sampling with vLLM on the local GPUs (the extra ``sampling``, installed in its own environment)."""

from collections.abc import Sequence

from treg_megatron.config.schema import SampleSection
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Sampled


class VllmSampler:
    """A :class:`~treg_megatron.sampling.Sampler` for the model in the folder ``section.model``.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(self, section: SampleSection, tokenizer: ChatTokenizer):
        try:
            import vllm
        except ImportError:
            raise UserError(
                "sample.engine=vllm needs the package vllm: pip install treg-megatron[sampling], or start "
                "its server and use sample.engine=server"
            ) from None
        self._vllm, self._section, self._tokenizer = vllm, section, tokenizer
        self._model = vllm.LLM(
            section.model, dtype=section.dtype, max_model_len=section.max_prompt_length + section.max_new_tokens
        )

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[Sampled]:
        """See :meth:`treg_megatron.sampling.Sampler.sample`."""
        section, end = self._section, self._tokenizer.end_of_turn
        parameters = self._vllm.SamplingParams(
            n=1,
            seed=seed,
            temperature=section.temperature,
            top_p=section.top_p,
            max_tokens=section.max_new_tokens,
            stop_token_ids=[end],
            skip_special_tokens=False,
        )
        answers = self._model.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        return [self._tokenizer.sampled(list(answer.outputs[0].token_ids)) for answer in answers]
