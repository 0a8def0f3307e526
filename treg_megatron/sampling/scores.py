"""Scores of responses: a reward model, or a function of the user's own."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence

from treg_megatron.config.schema import RankSection
from treg_megatron.errors import UserError

#: (messages, response texts) -> one score per response
ScoreFunction = Callable[[list[dict[str, str]], list[str]], Sequence[float]]


def imported_function(name: str) -> ScoreFunction:
    module, separator, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        function = getattr(importlib.import_module(module), attribute) if separator else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"rank.function={name} cannot be imported: {error}") from None
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UserError(f"rank.function={name} must name a function as MODULE:NAME")
    return function


class RewardModel:
    """A Hugging Face sequence-classification model whose first output is the score of a conversation.

    Code in its folder (such as ArmoRM's) is executed only if ``allow_remote_code`` is set.

    Raises:
        UserError: the model does not load, has no chat template, or has code of its own that is not allowed.
    """

    def __init__(self, section: RankSection):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from treg_megatron.models.huggingface import device_of, dtype_option, transformers_config
        from treg_megatron.tokenizer.model_folder import model_folder

        folder = model_folder(section.reward_model)
        if (
            "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
            and not section.allow_remote_code
        ):
            raise UserError(
                f"{folder} contains Python code of its own; review it and allow it with "
                "rank.allow_remote_code=true, or use another reward model"
            )
        options = {"local_files_only": True, "trust_remote_code": section.allow_remote_code}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=transformers_config(folder, **options),
                **dtype_option(getattr(torch, section.dtype)),
                **options,
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the reward model in {folder} does not load: {error}") from None
        if not self._tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {folder} has no chat template; the reward model needs the one it was trained with"
            )
        self._torch, self._model = torch, model.to(device_of(section.device)).eval()

    def __call__(self, messages: list[dict[str, str]], responses: list[str]) -> list[float]:
        """One score per response, computed one at a time: architectures differ in the padding they expect."""
        scores = []
        for response in responses:
            ids = self._tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": response}], return_tensors="pt"
            ).to(self._model.device)
            with self._torch.inference_mode():
                output = self._model(ids)
            score = output.score if hasattr(output, "score") else output.logits
            scores.append(float(score.flatten()[0]))
        return scores
