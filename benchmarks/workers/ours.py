"""Our trainer, one step per line on stdin; each step prints a line of JSON on stdout."""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.preflight.costs import FORWARD_AND_BACKWARD, forward_flops
from treg_megatron.utils.imports import heavy_imports
from treg_megatron.utils.log import configure_logging

GEMM = 2048


class OnDemand(pl.Callback):
    """Waits for a line before each step, times the step, and measures the rate of a matrix product after it."""

    def __init__(self, fields: dict):
        self.fields, self.tokens, self.scored = fields, 0, 0
        self.a, self.b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
        if torch.cuda.is_available():
            self.a, self.b = self.a.cuda().bfloat16(), self.b.cuda().bfloat16()

    def on_train_start(self, trainer, module):
        """Report that the trainer is ready."""
        say({"ready": 1})

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Wait for a line on stdin, then start the clock; end the process at the end of stdin."""
        if not sys.stdin.readline():
            os._exit(0)
        synchronize()
        self.start, self.flops, self.tokens = time.perf_counter(), 0.0, 0

    def on_megatron_microbatch_start(self, step, batch, forward_callback):
        """Count the micro-batch's tokens and FLOPs; a prompt shared by both responses is computed once."""
        row = batch["tokens"].shape[1]
        again = []
        if "cu_seqlens" in batch:
            sequences = batch["cu_seqlens"].diff().tolist()
        elif "spans" in batch:
            spans = batch["spans"][: len(batch["lengths"])]  # what follows is padding
            again = [sum(tokens for _, tokens in span.prefix) for span in spans]
            sequences = [span.tokens + prefix for span, prefix in zip(spans, again, strict=True)]
        else:
            sequences = [row] * len(batch["tokens"])
        self.tokens += sum(sequences)
        self.flops += flops(self.fields, sequences, len(batch["targets"])) - flops(self.fields, again, 0)

    def on_megatron_step_end(self, step, **_):
        """Record the seconds of all forward and backward passes."""
        synchronize()
        self.forward_backward = time.perf_counter() - self.start

    def on_train_batch_end(self, trainer, module, *_):
        """Report the step: seconds, FLOPs, tokens, and the rate of a matrix product in FLOP/s."""
        synchronize()
        seconds = time.perf_counter() - self.start
        say(
            {
                "seconds": seconds,
                "forward_backward_seconds": self.forward_backward,
                "flops": self.flops,
                "tokens": self.tokens,
                "gemm_rate": self.gemm_rate(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            }
        )

    def gemm_rate(self) -> float:
        """FLOP/s of a square matrix product, the best of five."""
        best = min(self.timed_product() for _ in range(5))
        return 2 * GEMM**3 / best

    def timed_product(self) -> float:
        """Seconds of one square matrix product."""
        synchronize()
        start = time.perf_counter()
        self.a @ self.b
        synchronize()
        return time.perf_counter() - start


def flops(fields: dict, sequences: list[int], scored: int) -> float:
    """FLOPs of one micro-batch's forward and backward pass, with the head on scored positions only."""
    layers = (forward_flops(fields, tokens, 0).total for tokens in sequences)
    return FORWARD_AND_BACKWARD * (sum(layers) + forward_flops(fields, 0, scored).head)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def say(message: dict) -> None:
    """Print a line of JSON."""
    print(json.dumps(message), flush=True)


def kernels_without(disabled: dict[str, str]) -> "Kernels":  # noqa: F821
    """The kernels of this device, some of them replaced by torch's or Megatron's."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from treg_megatron.kernels.kernels import Kernels, cpu_kernels

    kernels = Kernels.reference() if torch.cuda.is_available() else cpu_kernels()
    if disabled.get("products") == "mkl":
        kernels = dataclasses.replace(kernels, linear=None)
    if disabled.get("attention") == "local":
        kernels = dataclasses.replace(kernels, core_attention=DotProductAttention)
    return kernels


def with_all_logits(config) -> None:
    """Make the policy compute the logits of every token of a row, over the full vocabulary at once."""
    from treg_megatron.models.policy import ResponseGPTModel, ResponseTokens

    class Everything(ResponseGPTModel):
        block_vocab = 1 << 30

        def _postprocess(self, hidden_states, input_ids, position_ids, labels, *args, **kwargs):
            rows = torch.arange(hidden_states.shape[0] * hidden_states.shape[1])
            targets = torch.zeros(len(rows), dtype=torch.int64)
            targets[labels.rows] = labels.targets
            every = super()._postprocess(
                hidden_states, input_ids, position_ids, ResponseTokens(rows, targets), *args, **kwargs
            )
            return every[labels.rows]

    config.megatron_model = Everything


def main() -> None:
    configure_logging()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name in ("--batch", "--micro-batch", "--steps", "--max-length"):
        parser.add_argument(name)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    disabled = dict(o.removeprefix("bench.").split("=") for o in arguments.overrides if o.startswith("bench."))
    torch.set_num_threads(int(os.environ["TREG_THREADS"]))
    if not torch.cuda.is_available():
        from treg_megatron.distributed.cpu_redirect import use_cpu

        use_cpu()
    with heavy_imports():
        from treg_megatron.models.build import build_policy, policy_config
        from treg_megatron.training import build
        from treg_megatron.training.data_module import PairData
    from treg_megatron.checkpoint.layout import read_metadata
    from treg_megatron.data.streams import open_streams
    from treg_megatron.distributed.launch import rank_info
    from treg_megatron.models.families import model_fields
    from treg_megatron.objective import Objective

    folder = arguments.folder
    recipe = load_recipe(
        "recipes/tiny.yaml",
        [
            f"run={folder}",
            f"model.hf={(folder / 'model.txt').read_text()}",
            f"data.global_batch_size={arguments.batch}",
            f"data.micro_batch_size={arguments.micro_batch}",
            f"data.seq_length={arguments.max_length}",
            "data.epochs=1000",
            "optimizer.lr=1e-7",
            f"train.precision={'bf16' if torch.cuda.is_available() else 'fp32'}",
            "data.share_prompts=false",
            *(o for o in arguments.overrides if not o.startswith("bench.")),
        ],
    )
    data, parallel, train = (section(recipe, name) for name in ("data", "parallel", "train"))
    identity = read_metadata(folder / "megatron")
    fields = model_fields(identity.hf_config)
    strategy = build.strategy(parallel, train, folder / "megatron")
    trainer = build.trainer(rank_info(), strategy, train, int(arguments.steps), [OnDemand(fields)])
    config = policy_config(identity.hf_config, parallel, train, kernels=kernels_without(disabled))
    if disabled.get("head") == "whole":
        with_all_logits(config)
    optimizer = build.optimizer(section(recipe, "optimizer"), train, int(arguments.steps))
    trainer.fit(
        build_policy(config, Objective.of(section(recipe, "objective")), optimizer),
        datamodule=PairData(data, open_streams(data.train), None, parallel),
    )


if __name__ == "__main__":
    main()
