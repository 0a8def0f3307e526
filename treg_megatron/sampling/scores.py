"""Scores of responses: a reward model, or a function of the user's own."""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from treg_megatron.config.schema import JudgeSection, RankSection
from treg_megatron.errors import UserError

#: (messages, response texts) -> one score per response
ScoreFunction = Callable[[list[dict[str, str]], list[str]], Sequence[float]]


def finite_scores(prompt_id: str, scores: Any, count: int) -> list[float]:
    """``scores`` of ``count`` responses to a prompt as floats.

    Raises:
        UserError: they are not numbers, not finite, too few or too many.
    """
    try:
        values = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(f"prompt {prompt_id!r}: its scores are not numbers: {error}") from None
    if len(values) != count or not all(map(math.isfinite, values)):
        raise UserError(f"prompt {prompt_id!r}: {count} responses got the scores {values}; each needs one finite score")
    return values


def imported_function(name: str, key: str) -> ScoreFunction:
    """The function that a recipe's ``key`` names as MODULE:NAME; the working directory is searched first.

    Raises:
        UserError: it cannot be imported, or is not a function.
    """
    module, separator, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        function = getattr(importlib.import_module(module), attribute) if separator else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}={name} cannot be imported: {error}") from None
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UserError(f"{key}={name} must name a function as MODULE:NAME")
    return function


class RewardModel:
    """A Hugging Face sequence-classification model whose first output is the score of a conversation.

    Code in its folder (such as ArmoRM's) is executed only if ``allow_remote_code`` is set.

    Args:
        section: of the recipe, with the model's folder, precision and device.
        name: of that section.

    Raises:
        UserError: the model does not load, has no chat template, or has code of its own that is not allowed.
    """

    def __init__(self, section: RankSection | JudgeSection, name: str):
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
                f"{name}.allow_remote_code=true, or use another reward model"
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
