"""The engine that a recipe's section names."""

from treg_megatron.errors import UserError
from treg_megatron.sampling import EngineSettings, Sampler
from treg_megatron.tokenizer.chat import ChatTokenizer


def load_sampler(settings: EngineSettings, tokenizer: ChatTokenizer, section: str) -> Sampler:
    """Load the model behind ``settings.engine``, or find its server.

    Args:
        section: name of the recipe's section, for messages.

    Raises:
        UserError: the engine is not installed, has no loadable model, or its server is not named or does not answer.
    """
    if settings.engine == "server":
        from treg_megatron.sampling.server import ServerSampler

        if not settings.server:
            raise UserError(
                f"{section}.server has no value; give the server's address, such as http://localhost:8000/v1"
            )
        return ServerSampler(settings, settings.server, tokenizer)
    if settings.engine == "vllm":
        from treg_megatron.sampling.vllm import VllmSampler

        return VllmSampler(settings, tokenizer)
    from treg_megatron.sampling.huggingface import HuggingFaceSampler

    return HuggingFaceSampler(settings, tokenizer)
