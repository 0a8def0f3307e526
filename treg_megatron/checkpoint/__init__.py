"""Checkpoints to and from Hugging Face folders: exact, streaming, without a GPU, NeMo or a Megatron process group."""
