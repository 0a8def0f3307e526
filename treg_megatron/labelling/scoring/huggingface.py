"""A Hugging Face model on one device as a :class:`~treg_megatron.labelling.scoring.Scorer`.

Sequences with a common prefix are scored together, and the prefix is computed once (``shared_prefixes``): chosen and
rejected share their prompt, the better and the worse prompt share what precedes their difference, and all pairs share
the demonstrations of a prompt pair. Only hidden states that predict a response token go through the head, chunk by
chunk, so that the logits of a whole batch never exist at once.

Shapes: t tokens of a packed sequence, h hidden size, n response tokens of a batch, v vocabulary.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from treg_megatron.data.alignment import score_positions
from treg_megatron.errors import UserError
from treg_megatron.kernels.kernels import cpu_set
from treg_megatron.kernels.memory import keep_memory
from treg_megatron.kernels.onednn import ProductsByOneDNN
from treg_megatron.labelling.scoring import ScoredSequence
from treg_megatron.labelling.scoring.shared_prefixes import ATTENTION, attention, one_row, portions
from treg_megatron.models.huggingface import device_of, load_causal_lm, set_attention
from treg_megatron.tokenizer.model_folder import model_folder

_LOGITS_AT_ONCE = 1 << 25  # elements: 128 MiB in fp32
_PROBE_TOKENS = 10
# relative to the spread of the logits; wrong attention or logits are off by about the spread itself
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}


class HuggingFaceScorer:
    """The reference model of a local folder.

    Args:
        folder: config.json and safetensors weights; nothing is downloaded, no code of the folder is executed.
        dtype: float32 or bfloat16: precision of weights and hidden states; the softmax is always fp32.
        device: cpu, cuda, cuda:1, ..., or auto for cuda where there is one.
        batch_tokens: tokens in one forward pass; a longer sequence gets a pass of its own.

    Raises:
        UserError: the folder has no loadable model, the device does not exist, or the model computes attention or
            logits in a way that this scorer does not support.
    """

    def __init__(self, folder: str | Path, dtype: str = "bfloat16", device: str = "auto", batch_tokens: int = 8192):
        self.device = device_of(device)
        self.batch_tokens = batch_tokens
        if self.device.type == "cpu":
            keep_memory()
        self._model = load_causal_lm(model_folder(folder), getattr(torch, dtype)).to(self.device)
        config = self._model.config.get_text_config()
        self.max_length = config.max_position_embeddings
        self.vocab_size = self._model.get_input_embeddings().weight.shape[0]
        self._head = self._model.get_output_embeddings()
        base = self._model.base_model
        self._body = base if base is not self._model else self._model.get_decoder()  # Gemma 3 misnames its own
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._take_over_attention(folder)

    def score(
        self, sequences: Sequence[ScoredSequence], scored: Callable[[int, int], None] = lambda sequences, tokens: None
    ) -> list[np.ndarray]:
        """See :meth:`treg_megatron.labelling.scoring.Scorer.score`."""
        results: list[np.ndarray | None] = [None] * len(sequences)
        read = [sequence.read for sequence in sequences]
        by_onednn = self.device.type == "cpu" and cpu_set() == "fast"
        with ProductsByOneDNN() if by_onednn else contextlib.nullcontext():
            for portion in portions(read, self.batch_tokens):
                members = [sequences[i] for i in portion]
                for i, logps in zip(portion, self._score_together(members, [read[i] for i in portion]), strict=True):
                    results[i] = logps
                scored(len(members), sum(member.length for member in members))
        return results

    @torch.inference_mode()
    def _score_together(self, members: list[ScoredSequence], read: list[np.ndarray]) -> list[np.ndarray]:
        hidden_th, rows = self._hidden_states(read)
        predicting = [
            row[score_positions(len(member.prompt_ids), len(member.response_ids))]
            for row, member in zip(rows, members, strict=True)
        ]
        hidden_nh = hidden_th[torch.from_numpy(np.concatenate(predicting)).to(self.device)]
        targets_n = torch.tensor([token for member in members for token in member.response_ids], device=self.device)
        logps_n = self._logps(hidden_nh, targets_n).cpu().numpy()
        ends = np.cumsum([len(member.response_ids) for member in members])
        return np.split(logps_n, ends[:-1])

    def _hidden_states(self, sequences: list[np.ndarray]) -> tuple[torch.Tensor, list[np.ndarray]]:
        """[t, h] of all tokens, and for each sequence the indices of its tokens in them."""
        row = one_row(sequences, self.device)
        output = self._body(input_ids=row.tokens[None], position_ids=row.positions[None], use_cache=False, row=row)
        return output.last_hidden_state[0], row.rows

    def _logps(self, hidden_nh: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
        rows = max(1, _LOGITS_AT_ONCE // self._head.weight.shape[0])
        logps = []
        for hidden, targets in zip(hidden_nh.split(rows), targets_n.split(rows), strict=True):
            logits = self._logits(hidden)
            logits -= logits.amax(-1, keepdim=True)
            chosen = logits.gather(-1, targets[:, None])[:, 0]
            logps.append(chosen - logits.exp_().sum(-1).log_())
        return torch.cat(logps)

    def _logits(self, hidden_nh: torch.Tensor) -> torch.Tensor:
        logits_nv = self._head(hidden_nh).float()
        if self._softcap is not None:
            logits_nv = torch.tanh(logits_nv / self._softcap) * self._softcap
        return logits_nv

    @torch.inference_mode()
    def _take_over_attention(self, folder: str | Path) -> None:
        """Give the model our attention and compare the logits once with its own: some architectures differ."""
        from transformers import AttentionInterface

        count = 2 * _PROBE_TOKENS
        # spread over the vocabulary except its ends: on sequences of special tokens a bf16 model yields noise
        first = np.arange(1, count + 1) * self.vocab_size // (count + 1)
        second = np.concatenate([first[:_PROBE_TOKENS], first[:_PROBE_TOKENS]])
        tokens_bs = torch.from_numpy(np.stack([first, second])).to(self.device)
        theirs = self._model(input_ids=tokens_bs, use_cache=False).logits.float()
        AttentionInterface.register(ATTENTION, attention)
        try:
            set_attention(self._model, ATTENTION)
            hidden_th, rows = self._hidden_states([second, first])
            ours = torch.stack([self._logits(hidden_th[torch.from_numpy(row)]) for row in reversed(rows)])
            spread = theirs - theirs.mean(-1, keepdim=True)
            known = bool((ours - theirs).norm() < _PROBE_TOLERANCE[self._model.dtype] * spread.norm())
        except (TypeError, ValueError, AttributeError):
            known = False
        if not known:
            raise UserError(
                f"{folder}: {type(self._model).__name__} computes attention or logits in a way that this "
                "release does not support; its log-probs would be wrong"
            )
