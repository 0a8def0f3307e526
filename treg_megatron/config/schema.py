"""The keys of a recipe: a dataclass for each section gives every key its type and its help text, and holds no values.

A default value stands in ``recipes/base.yaml`` and nowhere else.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


def key(help: str, choices: tuple[str, ...] = ()) -> Any:
    """A recipe key: its meaning, and the values that it may take where they are few."""
    return dataclasses.field(metadata={"help": help, "choices": choices})


@dataclass
class ModelSection:
    """The model to align."""

    hf: str = key("Hugging Face folder of the model: config.json, tokenizer and, for import, safetensors weights")
    architecture: str | None = key(
        "name of a published config.json under treg_megatron/models/architectures, or the path of "
        "one: what preflight builds where hf is not on disk; null: hf must be"
    )
    checkpoint: str = key("Megatron checkpoint of the same model, as convert_checkpoint.py import writes it")


@dataclass
class SampleSection:
    """Responses of a model to prompts: the first half of on-policy pairs."""

    model: str = key("Hugging Face folder of the model that is sampled: tokenizer, and weights where it runs here")
    prompts: str = key("prompts to answer, a JSON or JSONL file; of preference pairs, their prompts")
    output: str = key("folder for the samples (JSONL) and their manifest")
    engine: str = key(
        "what generates: this process, a server that speaks OpenAI's completions protocol, or vLLM",
        choices=("huggingface", "server", "vllm"),
    )
    server: str | None = key("engine server: its address up to and with /v1")
    server_model: str | None = key("engine server: name of the model there; null asks the server for its first")
    timeout: float = key("engine server: seconds that an answer may take before it is asked for again")
    max_attempts: int = key(
        "engine server: how often an answer is asked for, with growing pauses, before the job stops"
    )
    seeds: list[int] = key("one response to each prompt for each seed")
    temperature: float = key("temperature of the distribution that is sampled; 0 takes the likeliest token each time")
    top_p: float = key("share of the probability that is sampled from, in (0, 1]")
    max_new_tokens: int = key("tokens of a response; one that is cut off there is marked")
    max_prompt_length: int = key("tokens that a prompt may have; longer ones are dropped and counted")
    batch_prompts: int = key("prompts that are answered at once")
    dtype: str = key("precision of the model", choices=("float32", "bfloat16"))
    device: str = key("engine huggingface: where the model runs: auto, cpu or cuda")
    shard_prompts: int = key("prompts in one output shard: what an interrupted job loses at most")


@dataclass
class RankSection:
    """Samples to preference pairs: the best and the worst response of each prompt."""

    samples: str = key("folder that sample_responses wrote")
    output: str = key("preference pairs to write, a JSONL file")
    scores: str = key(
        "where scores come from: a reward model, a key of each sampled response, or your own function",
        choices=("reward_model", "column", "function"),
    )
    reward_model: str | None = key("Hugging Face folder of a sequence-classification model")
    column: str | None = key("key of each response in the samples that holds its score")
    function: str | None = key("MODULE:NAME of a function (messages, responses) -> scores")
    allow_remote_code: bool = key("whether code in the reward model's folder (ArmoRM has some) may be executed")
    truncated: str = key("what becomes of responses that were cut off", choices=("keep", "drop"))
    dtype: str = key("precision of the reward model", choices=("float32", "bfloat16"))
    device: str = key("where the reward model runs: auto, cpu or cuda")


@dataclass
class LabelSection:
    """Token rewards by contrastive prompting, and reference log-probs (offline, no training)."""

    model: str = key("Hugging Face folder of the reference model")
    pairs: str = key("preference pairs to label: JSON, JSONL, Parquet, an Arrow folder, or hub:OWNER/NAME")
    format: str = key("kind of preference pairs: auto recognises it, tools/inspect_pairs.py --help lists the names")
    output: str = key("folder for the labelled pairs (Parquet) and their manifest")
    prompt_pair: str = key("name of a built-in better/worse prompt pair, or the path of your own YAML file")
    max_length: int = key("tokens that the prompt with its response may have: what training sees")
    max_revision_length: int | None = key(
        "tokens that a better or worse prompt with the response may have; "
        "null: as many as the reference model has positions"
    )
    engine: str = key(
        "what holds the reference model: each process whole, or Megatron split over ranks",
        choices=("huggingface", "megatron"),
    )
    checkpoint: str = key("engine megatron: Megatron checkpoint of the reference model")
    tensor: int = key("engine megatron: tensor-parallel size")
    pipeline: int = key("engine megatron: pipeline-parallel size")
    batch_tokens: int = key("tokens in one forward pass of the reference model")
    dtype: str = key("precision of the reference model", choices=("float32", "bfloat16"))
    device: str = key("where the reference model runs: auto, cpu or cuda")
    reward_eot: bool = key("whether the end-of-turn token gets a token reward like the others")
    shard_pairs: int = key("pairs in one output shard: what an interrupted job loses at most")


@dataclass
class IndexSection:
    """Labelled pairs to aligned Megatron indexed datasets."""

    labelled: str = key("folder or Parquet file of labelled pairs, or a text file of pairs with token rewards")
    output: str = key("PREFIX of the streams: PREFIX_tokens.bin, PREFIX_tokens.idx, ...")
    tokenizer: str = key("Hugging Face folder of the tokenizer that the training model uses")
    workers: int = key("processes that write a shard each; the streams are the same whatever their number")
    validation_fraction: float = key(
        "share of the pairs, chosen by a hash of pair_id, that goes to PREFIX_validation instead; 0 makes none"
    )


@dataclass
class ObjectiveSection:
    """What is minimised: docs/METHOD.md has the formulas."""

    loss_type: str = key(
        "preference loss; dpo_norm is DPO with rewards averaged over a response's tokens, sft maximum "
        "likelihood of the chosen responses",
        choices=("dpo", "dpo_norm", "ipo", "simpo", "sft"),
    )
    beta: float = key("KL strength of DPO and IPO, reward scale of SimPO; > 0")
    gamma: float = key("SimPO's target margin, in units of the reward (the paper states gamma / beta); >= 0")
    label_smoothing: float = key("cDPO: share of pairs whose preference is assumed to be flipped, in [0, 0.5)")
    alpha: float = key("strength of the token-level regulariser, in [0, 2]; 0 is the plain preference loss")
    weight: str = key("weight of the regulariser: sg(sigma(-margin)), or 1", choices=("dynamic", "static"))
    weight_margin: bool = key("SimPO: whether the dynamic weight includes gamma, as SimPO's own gradient weight does")
    token_rewards: str = key(
        "where r_t comes from: the streams, the policy's own detached log-ratio, or nowhere",
        choices=("contrastive", "implicit", "none"),
    )
    sft_loss_weight: float = key("strength of a full-token SFT term on the chosen response; >= 0")


@dataclass
class DataSection:
    """What is trained on, and in what portions."""

    train: str = key("PREFIX of the training streams, or several with weights: 0.3 PREFIX_A 0.7 PREFIX_B")
    validation: str | None = key("PREFIX of the held-out streams; null trains without validation")
    seq_length: int = key("longest sequence (prompt + response) in tokens; longer pairs are refused")
    micro_batch_size: int = key("pairs in one forward pass of one data-parallel rank")
    global_batch_size: int = key("pairs in one optimizer step over all ranks")
    layout: str = key(
        "sequences of a micro-batch: one after the other in one row, or one a row, padded; bins: packed, "
        "and as many pairs as fit bin_size instead of micro_batch_size",
        choices=("packed", "padded", "bins"),
    )
    bin_size: int | None = key(
        "layout bins: tokens of a micro-batch, both sequences of its pairs; null: 2 x seq_length, which holds any pair"
    )
    share_prompts: bool | None = key(
        "whether the two sequences of a pair share the computation of their prompt: the same loss and gradients of fewer "
        "tokens; layouts packed and bins, without Transformer Engine, context parallelism or experts; null: on a CPU, "
        "where these allow it"
    )
    pad_to_multiple_of: int = key("rows are padded to a multiple of this many tokens")
    epochs: int = key("passes over the training pairs")
    seed: int = key("seed of the order of the pairs")

    @property
    def tokens_of_a_bin(self) -> int:
        return self.bin_size or 2 * self.seq_length


@dataclass
class ParallelSection:
    """How one model is spread over ranks; data parallelism takes the ranks that are left."""

    tensor: int = key("tensor-parallel size")
    pipeline: int = key("pipeline-parallel size")
    sequence: bool = key("sequence parallelism inside the tensor-parallel group")
    expert: int = key("expert-parallel size of a mixture-of-experts model")
    virtual_pipeline: int | None = key("interleaved schedule: model chunks of each pipeline stage; null: one")
    context: int = key("context-parallel size: ranks that share each sequence; layouts packed and bins")


@dataclass
class LoraSection:
    """Low-rank adapters instead of training every weight; the reference stays the cached one."""

    rank: int | None = key("rank of the adapters; null trains every weight")
    alpha: float = key("adapters are scaled by alpha / rank")
    dropout: float = key("dropout before the adapters, in [0, 1)")
    targets: list[str] = key("Megatron's names of the linear layers that get an adapter")


@dataclass
class OptimizerSection:
    """AdamW on the distributed optimizer, cosine schedule with linear warm-up."""

    lr: float = key("peak learning rate")
    min_lr: float = key("learning rate at the end of the cosine")
    warmup_fraction: float = key("share of all steps spent warming up")
    weight_decay: float = key("decoupled weight decay")
    beta1: float = key("Adam beta1")
    beta2: float = key("Adam beta2")
    eps: float = key("Adam epsilon")
    router_aux_loss: float = key(
        "mixture of experts: coefficient of the load-balancing loss, a mean over micro-batches "
        "beside the mean over pairs; 0 leaves it out"
    )
    clip_grad: float = key("largest global gradient norm; 0 turns clipping off")


@dataclass
class TrainSection:
    """The run itself."""

    output: str = key("folder of the run: checkpoints, metrics.jsonl, TensorBoard events, the resolved recipe")
    precision: str = key("bf16 keeps fp32 main parameters and gradients", choices=("fp32", "bf16"))
    max_steps: int | None = key("stop after this many optimizer steps; null runs all epochs")
    save_every: int = key("optimizer steps between checkpoints")
    save_total_limit: int = key("how many of the newest checkpoints stay on disk")
    save_in_background: bool = key("whether training goes on while a checkpoint is written from a copy in memory")
    validate_every: int = key("optimizer steps between validations; also run before the first step and after the last")
    recompute: str = key("activation recompute", choices=("none", "selective", "full"))
    seed: int = key("seed of everything random in the model (dropout; initialisation where no checkpoint is given)")
    hang_timeout_s: float = key(
        "seconds without a step (or a micro-batch of validation, or a checkpoint) after which every "
        "rank prints its stack and ends"
    )
    record_pairs: bool = key("whether RUN/pairs/ records the pairs that each step trained on")
    first_loss_tolerance: float = key(
        "how far the first preference loss may be from its known value, e.g. ln 2 for DPO"
    )


@dataclass
class ExportSection:
    """A checkpoint as a Hugging Face folder."""

    checkpoint: str = key("training checkpoint, or a run's folder for its newest one")
    base: str = key("Hugging Face folder that gives config.json and the tokenizer")
    output: str = key("Hugging Face folder to write")
    dtype: str = key(
        "precision of the written weights; auto keeps the base model's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    lora: str = key(
        "what a run with adapters becomes: the base model with them merged in, or a folder that peft loads",
        choices=("merged", "adapter"),
    )
    shard_size: float = key("largest weight file in GB (10^9 bytes); larger models are split and get an index")


@dataclass
class ClusterSection:
    """The machines that the recipe is meant for: what preflight compares with. No other station reads it."""

    device: str = key("what computes: gpus with fused kernels, or processes on a CPU", choices=("gpu", "cpu"))
    nodes: int = key("machines")
    gpus_per_node: int = key("ranks of a node: its GPUs, or the processes on a CPU")
    gpu_memory: float = key("memory of one rank, in GB (10^9 bytes)")
    peak_tflops: float = key("arithmetic peak of one rank in the training precision, in 10^12 operations a second")
    mfu: float = key("model FLOPs utilisation that times are stated at, in (0, 1]")
    node_bandwidth: float = key("what one rank sends to others of its node, in GB (10^9 bytes) a second")
    network_bandwidth: float = key("what one rank sends to other nodes, in GB a second")
    storage_bandwidth: float = key("what the file system takes from the whole job, in GB a second")
    pairs: int | None = key("training pairs, where the streams do not exist yet to be counted")


@dataclass
class Recipe:
    """A whole run, station by station."""

    name: str
    run: str
    model: ModelSection
    sample: SampleSection
    rank: RankSection
    label: LabelSection
    index: IndexSection
    objective: ObjectiveSection
    data: DataSection
    parallel: ParallelSection
    lora: LoraSection
    optimizer: OptimizerSection
    train: TrainSection
    export: ExportSection
    cluster: ClusterSection


SECTIONS: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(f.type)}
