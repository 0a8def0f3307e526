"""Sampling with vLLM on the local GPUs (the extra ``sampling``, installed in its own environment)."""

import os
from collections.abc import Sequence

from treg_megatron.distributed.launch import rank_info
from treg_megatron.errors import UserError
from treg_megatron.sampling import EngineSettings
from treg_megatron.sampling.decoding import Decoding
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Sampled


class VllmSampler:
    """A :class:`~treg_megatron.sampling.Sampler` for the model in the folder ``settings.model``.

    Of several processes on a machine, each gets a GPU of its own.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(self, settings: EngineSettings, tokenizer: ChatTokenizer):
        if (here := rank_info()).local_size > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu(visible, here.local_rank)
        try:
            import vllm
        except ImportError:
            raise UserError(
                "the engine vllm needs the package vllm: pip install treg-megatron[sampling], or start "
                "its server and use the engine server"
            ) from None
        self._vllm, self._tokenizer = vllm, tokenizer
        self._model = vllm.LLM(settings.model, dtype=settings.dtype, max_model_len=settings.context_length)

    def sample(self, prompts: Sequence[list[int]], seed: int, decoding: Decoding) -> list[Sampled]:
        """See :meth:`treg_megatron.sampling.Sampler.sample`."""
        parameters = self._vllm.SamplingParams(
            n=1,
            seed=seed,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=[self._tokenizer.end_of_turn, *decoding.stop_tokens],
            stop=list(decoding.stop_strings) or None,
            skip_special_tokens=False,
        )
        answers = self._model.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        return [decoding.response(self._tokenizer, list(answer.outputs[0].token_ids)) for answer in answers]


def own_gpu(visible: str, local_rank: int) -> str:
    """The one of the GPUs in ``visible``, a value of CUDA_VISIBLE_DEVICES, that a process takes; "" there: all are."""
    devices = [device.strip() for device in visible.split(",") if device.strip()]
    return devices[local_rank % len(devices)] if devices else str(local_rank)
