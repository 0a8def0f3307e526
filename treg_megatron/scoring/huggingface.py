"""A Hugging Face model on one device as a :class:`~treg_megatron.scoring.Scorer`.

Sequences are sorted by length and batched under a budget of padded tokens. Only the hidden states that predict a
response token go through the head, a chunk at a time, so that logits of a whole batch never exist.

Shapes: b sequences, s tokens of the longest, h hidden size, n response tokens of a batch, V vocabulary.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from treg_megatron.alignment import score_positions
from treg_megatron.errors import UserError
from treg_megatron.scoring import ScoredSequence

_LOGITS_AT_ONCE = 1 << 25            # elements: 128 MiB in fp32
_FINGERPRINT_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14


class HuggingFaceScorer:
    """The reference model of a local folder.

    Args:
        folder: config.json and safetensors weights; nothing is downloaded, no code of the folder is executed.
        dtype: float32 or bfloat16: precision of weights and hidden states; the softmax is always fp32.
        device: cpu, cuda, cuda:1, ..., or auto for cuda where there is one.
        batch_tokens: padded tokens in one forward pass; a longer sequence gets a pass of its own.

    Raises:
        UserError: the folder has no model that loads, the device does not exist, or the model turns hidden states into
            logits in a way that this scorer does not know.
    """

    def __init__(self, folder: str | Path, dtype: str = "bfloat16", device: str = "auto", batch_tokens: int = 8192):
        self.device = _device(device)
        self.batch_tokens = batch_tokens
        self._model = _load(_model_folder(folder), getattr(torch, dtype)).to(self.device)
        config = self._model.config.get_text_config()
        self.max_length = config.max_position_embeddings
        self.vocab_size = self._model.get_input_embeddings().weight.shape[0]
        self._head = self._model.get_output_embeddings()
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._require_known_head(folder)

    def score(self, sequences: Sequence[ScoredSequence],
              scored: Callable[[int, int], None] = lambda sequences, tokens: None) -> list[np.ndarray]:
        """See :meth:`treg_megatron.scoring.Scorer.score`."""
        results: list[np.ndarray | None] = [None] * len(sequences)
        for batch in self._batches(sequences):
            members = [sequences[i] for i in batch]
            for i, logps in zip(batch, self._score_batch(members)):
                results[i] = logps
            scored(len(batch), sum(member.length for member in members))
        return results

    def _batches(self, sequences: Sequence[ScoredSequence]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in sorted(range(len(sequences)), key=lambda i: -sequences[i].length):
            if batch and (len(batch) + 1) * sequences[batch[0]].length > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score_batch(self, members: list[ScoredSequence]) -> list[np.ndarray]:
        width = max(member.length for member in members)
        tokens_bs = torch.zeros(len(members), width, dtype=torch.int64)
        for row, member in enumerate(members):
            tokens_bs[row, :member.length] = torch.tensor([*member.prompt_ids, *member.response_ids])
        hidden_bsh = self._hidden_states(tokens_bs.to(self.device))
        hidden_nh = torch.cat([hidden_bsh[row, score_positions(len(member.prompt_ids), len(member.response_ids))]
                               for row, member in enumerate(members)])
        targets_n = torch.tensor([token for member in members for token in member.response_ids], device=self.device)
        logps_n = self._logps(hidden_nh, targets_n).cpu().numpy()
        ends = np.cumsum([len(member.response_ids) for member in members])
        return np.split(logps_n, ends[:-1])

    def _hidden_states(self, tokens_bs: torch.Tensor) -> torch.Tensor:
        # Padding stands on the right, where a causal model's real tokens never look: no mask is needed, and without one
        # attention takes its fast path.
        return self._model.base_model(input_ids=tokens_bs, use_cache=False).last_hidden_state

    def _logps(self, hidden_nh: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
        rows = max(1, _LOGITS_AT_ONCE // self._head.weight.shape[0])
        logps = []
        for hidden, targets in zip(hidden_nh.split(rows), targets_n.split(rows)):
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
    def _require_known_head(self, folder: str | Path) -> None:
        """Compare with the model's own logits once: some architectures scale them in ways of their own."""
        tokens_bs = torch.arange(8, device=self.device)[None] % self.vocab_size
        ours = self._logits(self._hidden_states(tokens_bs)[0])
        theirs = self._model(input_ids=tokens_bs, use_cache=False).logits[0].float()
        if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item()):
            raise UserError(f"{folder}: {type(self._model).__name__} turns hidden states into logits in a way that "
                            "this release does not know; its log-probs would be wrong")


def model_identity(folder: str | Path) -> dict[str, str]:
    """What a manifest says about a model folder: its name, and a hash that changes with its weights.

    The hash covers config.json and, of every weights file, the size and 64 samples spread over it: training moves
    nearly every weight, and hashing 140 GB whole would take longer than many labelling jobs.
    """
    folder = _model_folder(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with open(path, "rb") as stream:
            for sample in range(_FINGERPRINT_SAMPLES):
                stream.seek(size * sample // _FINGERPRINT_SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return {"name": folder.resolve().name, "sha256": digest.hexdigest()}


def _model_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} does not exist or has no config.json")
    return folder


def _load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True,
                                                     trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the model of {folder} does not load: {error}") from None
    return model.eval()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used: {error}") from None
    return device
