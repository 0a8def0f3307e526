"""TRL's DPOTrainer, one step per line on stdin; each step prints a line of JSON on stdout."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class OnDemand(TrainerCallback):
    """Waits for a line before each step, and reports the step's duration."""

    def on_train_begin(self, *args, **kwargs):
        """Report that the trainer is ready."""
        print(json.dumps({"ready": 1}), flush=True)

    def on_step_begin(self, *args, **kwargs):
        """Wait for a line on stdin, then start the clock; end the process at the end of stdin."""
        if not sys.stdin.readline():
            os._exit(0)
        synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        """Report the seconds since the step began."""
        synchronize()
        print(json.dumps({"seconds": time.perf_counter() - self.start}), flush=True)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--precompute", action="store_true")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(int(os.environ["TREG_THREADS"]))
    hf = (arguments.folder / "model.txt").read_text()
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16 if cuda else torch.float32)
    trainer = DPOTrainer(
        model=model,
        ref_model=None,
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=arguments.micro_batch,
            learning_rate=1e-7,
            beta=0.1,
            gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
            max_steps=arguments.steps,
            precompute_ref_log_probs=arguments.precompute,
            max_length=arguments.max_length,
            optim="adamw_torch_fused",
            gradient_checkpointing=False,
            bf16=cuda,
            use_cpu=not cuda,
            report_to=[],
            logging_steps=1000,
            save_strategy="no",
            dataloader_num_workers=0,
            disable_tqdm=True,
            seed=1,
        ),
        train_dataset=load_dataset(
            "json", data_files=str(arguments.folder / "pairs.jsonl"), split="train"
        ).remove_columns(["pair_id"]),
        processing_class=AutoTokenizer.from_pretrained(hf),
        callbacks=[OnDemand()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
