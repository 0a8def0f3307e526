"""Recipe schema: one dataclass per section, with the type and help text of every key.

It holds no values: defaults are in ``recipes/base.yaml`` only.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


def key(help: str, choices: tuple[str, ...] = ()) -> Any:
    """A recipe key with its help text and, for an enumeration, the permitted values."""
    return dataclasses.field(metadata={"help": help, "choices": choices})


@dataclass
class ModelSection:
    """The model to align."""

    hf: str = key("Hugging Face folder of the model: config.json, tokenizer and, for import, safetensors weights")
    architecture: str | None = key(
        "name of a published config.json under treg_megatron/models/architectures, or the path of "
        "one: what preflight builds when hf is not on disk; null: hf must be on disk"
    )
    checkpoint: str = key("Megatron checkpoint of the same model, as convert_checkpoint.py import writes it")


@dataclass
class SampleSection:
    """Responses of a model to prompts: the first half of on-policy pairs."""

    model: str = key(
        "Hugging Face folder of the model to sample from: tokenizer, and weights when it runs in this process"
    )
    template: str | None = key("name of the chat template, for a tokenizer with several; null: the one named default")
    prompts: str = key(
        "prompts to answer: a file, folder, pattern, list with commas, or hub:OWNER/NAME; preference pairs are "
        "accepted for their prompts"
    )
    output: str = key("folder for the samples (JSONL) and their manifest")
    engine: str = key(
        "what generates: this process, a server that speaks OpenAI's completions protocol, or vLLM",
        choices=("huggingface", "server", "vllm"),
    )
    server: str | None = key("engine server: its base URL, up to and including /v1")
    server_model: str | None = key("engine server: model name on the server; null takes the first that it lists")
    timeout: float = key("engine server: request timeout in seconds, after which the request is retried")
    max_attempts: int = key("engine server: attempts per request, with increasing pauses, before the job stops")
    seeds: list[int] = key("random seeds; each gives one response per prompt")
    temperature: float = key("sampling temperature; 0 is greedy decoding")
    top_p: float = key("nucleus sampling: probability mass to sample from, in (0, 1]")
    max_new_tokens: int = key("maximum tokens per response; a response cut off there is marked as truncated")
    max_prompt_length: int = key("maximum tokens per prompt; longer prompts are dropped and counted")
    batch_prompts: int = key("prompts per generation batch")
    dtype: str = key("precision of the model", choices=("float32", "bfloat16"))
    device: str = key("engine huggingface: where the model runs: auto, cpu or cuda")
    shard_prompts: int = key("prompts per output shard: the most work that an interrupted job loses")

    @property
    def context_length(self) -> int:
        """Tokens of the longest prompt and its response together."""
        return self.max_prompt_length + self.max_new_tokens


@dataclass
class RankSection:
    """Samples to preference pairs: the best and the worst response of each prompt."""

    samples: str = key("folder that sample_responses wrote")
    output: str = key("preference pairs to write, a JSONL file")
    scores: str = key(
        "source of the scores: a reward model, a key of each sampled response, or your own function",
        choices=("reward_model", "column", "function"),
    )
    reward_model: str | None = key("Hugging Face folder of a sequence-classification model")
    column: str | None = key("key of each response in the samples that holds its score")
    function: str | None = key("MODULE:NAME of a function (messages, responses) -> scores")
    allow_remote_code: bool = key("whether code in the reward model's folder may be executed (ArmoRM needs it)")
    truncated: str = key("what to do with truncated responses", choices=("keep", "drop"))
    dtype: str = key("precision of the reward model", choices=("float32", "bfloat16"))
    device: str = key("where the reward model runs: auto, cpu or cuda")


#: keys of the section ``label`` that say where token rewards come from: what an entry of ``label.values`` may change
SOURCE_KEYS = (
    *("source", "prompt_pair", "better_model", "worse_model", "better_checkpoint", "worse_checkpoint"),
    *("ratio_scale", "squash"),
)


@dataclass
class LabelSection:
    """Token rewards by contrastive prompting, and reference log-probs (offline, no training)."""

    model: str = key("Hugging Face folder of the reference model")
    template: str | None = key("name of the chat template, for a tokenizer with several; null: the one named default")
    pairs: str = key("preference pairs to label: a file, folder, pattern, list with commas, or hub:OWNER/NAME")
    format: str = key("preference format; auto detects it, treg inspect --help lists the names")
    columns: dict[str, str] = key(
        "which column of your records is what, instead of a format: prompt=question chosen=good rejected=bad; "
        "also system, history, tools, id, chosen_score, rejected_score, pair_weight, or responses and scores for lists"
    )
    ignore: list[str] = key("columns that carry meaning and are left out on purpose; id: pairs are named by content")
    output: str = key("folder for the labelled pairs (Parquet) and their manifest")
    source: str = key(
        "where token rewards come from: the reference model after a better and a worse prompt, the log-ratio of two "
        "models, or your own values in the pairs",
        choices=("contrastive_prompts", "model_ratio", "own"),
    )
    prompt_pair: str = key("name of a built-in better/worse prompt pair, or the path of your own YAML file")
    better_model: str | None = key(
        "source model_ratio: Hugging Face folder of the model whose log-probs count in favour of a token, such as one "
        "trained by DPO"
    )
    worse_model: str | None = key("source model_ratio: the model whose log-probs count against it; null: the reference")
    ratio_scale: float = key("source model_ratio: factor of the log-ratio before it is squashed, such as DPO's beta")
    squash: str = key(
        "how values become token rewards in [-0.5, 0.5]; auto: sigmoid for a log-ratio, while your own must lie there",
        choices=("auto", "sigmoid", "tanh", "clip", "rank"),
    )
    values: dict[str, dict[str, Any]] = key(
        "further token rewards beside the main ones, by name: for each, the keys of this section that differ "
        f"({', '.join(SOURCE_KEYS)}); objective.values chooses one"
    )
    max_length: int = key("maximum tokens of prompt + response, the sequence that training sees")
    max_revision_length: int | None = key(
        "maximum tokens of a better or worse prompt + response; null: the reference model's maximum sequence length"
    )
    engine: str = key(
        "how the reference model runs: whole in each process, or in Megatron, split over ranks",
        choices=("huggingface", "megatron"),
    )
    checkpoint: str = key("engine megatron: Megatron checkpoint of the reference model")
    better_checkpoint: str | None = key("engine megatron and source model_ratio: checkpoint of better_model")
    worse_checkpoint: str | None = key("engine megatron and source model_ratio: checkpoint of worse_model")
    tensor: int = key("engine megatron: tensor-parallel size")
    pipeline: int = key("engine megatron: pipeline-parallel size")
    batch_tokens: int = key("tokens per forward pass of the reference model")
    dtype: str = key("precision of the reference model", choices=("float32", "bfloat16"))
    device: str = key("where the reference model runs: auto, cpu or cuda")
    reward_eot: bool = key("whether the end-of-turn token gets a token reward too")
    shard_pairs: int = key("pairs per output shard: the most work that an interrupted job loses")


@dataclass
class IndexSection:
    """Labelled pairs to aligned Megatron indexed datasets."""

    labelled: str = key("folder or Parquet file of labelled pairs, or a text file of pairs with token rewards")
    output: str = key("PREFIX of the aligned dataset: PREFIX_tokens.bin, PREFIX_tokens.idx, ...")
    tokenizer: str = key("Hugging Face folder of the training model's tokenizer")
    workers: int = key("processes, each writing one shard; the output does not depend on their number")
    validation_fraction: float = key(
        "fraction of the pairs, chosen by a hash of their prompt, written to PREFIX_validation instead; 0: none"
    )


@dataclass
class ObjectiveSection:
    """The training objective; docs/METHOD.md has the formulas."""

    loss_type: str = key(
        "preference loss; dpo_norm is DPO with rewards averaged over a response's tokens, sft maximum "
        "likelihood of the chosen responses",
        choices=("dpo", "dpo_norm", "simpo", "ipo", "robust", "hinge", "exo", "nca", "apo_zero", "apo_down", "sft"),
    )
    beta: float = key("KL strength of DPO and IPO, reward scale of SimPO; > 0")
    gamma: float = key("SimPO's target margin, in units of the reward (the paper states gamma / beta); >= 0")
    label_smoothing: float = key(
        "fraction of preferences assumed to be flipped, in [0, 0.5): of dpo, dpo_norm and simpo (cDPO), robust and exo"
    )
    alpha: float = key("strength of the token rewards, in [0, 2]; 0 is the plain preference loss")
    token_values: str = key(
        "what the token rewards do: T-REG's regulariser beside the preference loss, or a weight of each token inside "
        "the margin",
        choices=("regularizer", "margin"),
    )
    token_weight: str = key(
        "token_values margin: the weight of a token, by its reward (linear TGDPO, importance TIS-DPO, select SePO), "
        "its position (decay, D2PO) or the policy's confidence (confident, ConfPO)",
        choices=("linear", "importance", "select", "decay", "confident"),
    )
    token_weight_range: list[float] = key("token_weight importance: least and greatest weight")
    token_share: float = key(
        "token_weight select: fraction of the tokens that count, those of highest reward in the chosen and of lowest "
        "in the rejected response, in (0, 1]"
    )
    token_decay: float = key("token_weight decay: weight of a token relative to the one before it, in (0, 1]")
    weight: str = key("weight of the regulariser: sg(sigma(-margin)), or 1", choices=("dynamic", "static"))
    weight_margin: bool = key("SimPO: whether the dynamic weight includes gamma, as SimPO's own gradient weight does")
    token_rewards: str = key(
        "source of r_t: the aligned dataset, the policy's own detached log-ratio, or none",
        choices=("contrastive", "implicit", "none"),
    )
    values: str | None = key(
        "name of the dataset's token rewards, of those that label.values named; null: the main ones"
    )
    sft_loss_weight: float = key("strength of a full-token SFT term on the chosen response; >= 0")


@dataclass
class DataSection:
    """Training data and batching."""

    train: str = key(
        "PREFIX of the aligned training dataset, or a weighted blend of several: 0.3 PREFIX_A 0.7 PREFIX_B"
    )
    validation: str | None = key("PREFIX of the aligned validation dataset; null trains without validation")
    seq_length: int = key("maximum sequence length (prompt + response) in tokens; longer pairs are an error")
    micro_batch_size: int = key("pairs per forward pass and data-parallel rank")
    global_batch_size: int = key("pairs per optimizer step, over all ranks")
    layout: str = key(
        "how a micro-batch holds its sequences: packed into one sequence, or padded, one per row; bins: packed, "
        "with as many pairs as fit bin_size instead of micro_batch_size",
        choices=("packed", "padded", "bins"),
    )
    bin_size: int | None = key(
        "layout bins: maximum tokens per micro-batch, counting both sequences of a pair; "
        "null: 2 x seq_length, which fits any pair"
    )
    share_prompts: bool | None = key(
        "whether the prompt of a pair is computed once for both sequences: the same loss and gradients from fewer "
        "tokens; layouts packed and bins, without Transformer Engine, context parallelism or experts; null: on "
        "CPU, when these allow it"
    )
    pad_to_multiple_of: int = key("padded lengths are a multiple of this many tokens")
    epochs: int = key("passes over the training pairs")
    seed: int = key("seed of the shuffling of the pairs")

    @property
    def tokens_of_a_bin(self) -> int:
        """Tokens per bin: ``bin_size``, or 2 x ``seq_length`` where that is null."""
        return self.bin_size or 2 * self.seq_length


@dataclass
class ParallelSection:
    """Model-parallel sizes; the remaining ranks form the data-parallel group."""

    tensor: int = key("tensor-parallel size")
    pipeline: int = key("pipeline-parallel size")
    sequence: bool = key("sequence parallelism inside the tensor-parallel group")
    expert: int = key("expert-parallel size of a mixture-of-experts model")
    virtual_pipeline: int | None = key("interleaved schedule: model chunks per pipeline stage; null: no interleaving")
    context: int = key("context-parallel size: ranks that each sequence is split over; layouts packed and bins")
    overlap_grad_reduce: bool | None = key(
        "whether gradients are reduced over the data-parallel ranks while the backward pass still runs; null: on GPUs"
    )
    overlap_param_gather: bool | None = key(
        "whether updated weights are gathered from the data-parallel ranks while the next forward pass runs; only "
        "together with overlap_grad_reduce, and null: whenever that is on"
    )
    tensor_overlap: bool = key(
        "whether the communication of sequence parallelism overlaps with the matrix products beside it; with "
        "Transformer Engine's layers and data.layout=bins, whose rows are then all padded to the bin's size"
    )


@dataclass
class LoraSection:
    """Low-rank adapters (LoRA); reference log-probs are still the cached ones."""

    rank: int | None = key("rank of the adapters; null trains every weight")
    alpha: float = key("adapters are scaled by alpha / rank")
    dropout: float = key("dropout before the adapters, in [0, 1)")
    targets: list[str] = key("linear layers that get an adapter, by their names in Megatron")


@dataclass
class OptimizerSection:
    """AdamW on the distributed optimizer, cosine schedule with linear warm-up."""

    lr: float = key("peak learning rate")
    min_lr: float = key("learning rate at the end of the cosine schedule")
    warmup_fraction: float = key("fraction of all steps spent in linear warm-up")
    weight_decay: float = key("decoupled weight decay")
    beta1: float = key("Adam beta1")
    beta2: float = key("Adam beta2")
    eps: float = key("Adam epsilon")
    router_aux_loss: float = key(
        "mixture of experts: coefficient of the load-balancing loss, averaged over micro-batches "
        "(the preference loss is averaged over pairs); 0 disables it"
    )
    clip_grad: float = key("maximum global gradient norm; 0 disables clipping")
    offload: float = key(
        "fraction of the parameters whose fp32 copies and moments the host holds and updates, 0 to 1; saves memory of "
        "the GPU for time"
    )


@dataclass
class TrainSection:
    """The run itself."""

    output: str = key("folder of the run: checkpoints, metrics.jsonl, TensorBoard events, the resolved recipe")
    precision: str = key("bf16 keeps fp32 main parameters and gradients", choices=("fp32", "bf16"))
    max_steps: int | None = key("stop after this many optimizer steps; null runs all epochs")
    save_every: int = key("optimizer steps between checkpoints")
    save_total_limit: int = key("how many of the newest checkpoints stay on disk")
    save_in_background: bool = key("whether training continues while a checkpoint is written from a copy in memory")
    validate_every: int = key("optimizer steps between validations; also run before the first step and after the last")
    recompute: str = key("activation recomputation", choices=("none", "selective", "full"))
    seed: int = key("seed of the model's randomness (dropout; initialisation where no checkpoint is given)")
    hang_timeout_s: float = key(
        "seconds without a step (or a micro-batch of validation, or a checkpoint) after which every "
        "rank prints its stack trace and exits"
    )
    record_pairs: bool = key("whether to record the pairs that each step trained on in RUN/pairs/")
    first_loss_tolerance: float = key(
        "maximum deviation of the first preference loss from its known value, e.g. ln 2 for DPO"
    )


@dataclass
class ExportSection:
    """Export of a checkpoint to a Hugging Face folder."""

    checkpoint: str = key("training checkpoint, or a run's folder for its newest one")
    base: str = key("Hugging Face folder to take config.json and the tokenizer from")
    output: str = key("Hugging Face folder to write")
    dtype: str = key(
        "precision of the written weights; auto keeps the base model's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    lora: str = key(
        "export of a LoRA run: the base model with the adapters merged, or an adapter folder for peft",
        choices=("merged", "adapter"),
    )
    shard_size: float = key("largest weight file in GB (10^9 bytes); larger models are sharded, with an index")


@dataclass
class EvaluateSection:
    """Answers of a model to the prompts of a benchmark."""

    model: str = key(
        "model that answers: a Hugging Face folder, or a run's folder for what it exported; engine server: for its "
        "tokenizer"
    )
    name: str | None = key("the model's name in the benchmark's files; null: the run's, or the folder's")
    benchmark: str = key(
        "benchmark that the prompts are of, and in whose form the answers are written; prompts: any others",
        choices=("alpaca_eval", "arena_hard_v0.1", "arena_hard_v2", "mt_bench", "prompts"),
    )
    prompts: str = key(
        "the benchmark's prompts: AlpacaEval's JSON list, Arena-Hard's or MT-Bench's question.jsonl; or any source of "
        "prompts, as for treg sample"
    )
    output: str = key("folder for the answers and their manifest")
    preset: str = key(
        "published settings to take what is null below from: a model family of treg_megatron/evaluation/answering/"
        "presets.yaml; auto: the one that the model is of"
    )
    temperature: float | None = key("sampling temperature; 0 is greedy decoding; null: the preset's")
    top_p: float | None = key("nucleus sampling: probability mass to sample from, in (0, 1]; null: the preset's")
    max_new_tokens: int | None = key(
        "maximum tokens per answer; one cut off there is marked and counted; null: the preset's"
    )
    stop_tokens: list[str] | None = key(
        "special tokens that end an answer besides the end-of-turn token; null: the preset's"
    )
    stop_strings: list[str] = key("texts that end an answer, and are no part of it")
    seed: int = key("random seed of sampled answers")
    engine: str = key(
        "what generates: this process, a server that speaks OpenAI's completions protocol, or vLLM",
        choices=("huggingface", "server", "vllm"),
    )
    server: str | None = key("engine server: its base URL, up to and including /v1")
    server_model: str | None = key("engine server: model name on the server; null takes the first that it lists")
    timeout: float = key("engine server: request timeout in seconds, after which the request is retried")
    max_attempts: int = key("engine server: attempts per request, with increasing pauses, before the job stops")
    batch_prompts: int = key("prompts per generation batch")
    dtype: str = key("precision of the model", choices=("float32", "bfloat16"))
    device: str = key("engine huggingface: where the model runs: auto, cpu or cuda")
    shard_prompts: int = key("prompts per output shard: the most work that an interrupted job loses")

    @property
    def context_length(self) -> None:
        """As many tokens of prompt and answer together as the model takes."""
        return None


@dataclass
class JudgeSection:
    """A judge's preferences between the answers of an arm (the model under evaluation) and of a baseline."""

    arm: str = key("answers to judge: a folder that treg answers wrote, or a file in the benchmark's own format")
    baseline: str = key("answers to the same prompts that they are compared with, in either form")
    output: str = key("folder for the judgments (JSONL) and their manifest")
    kind: str = key(
        "what judges: a reward model, your own function, a chat server by one of alpaca_eval's annotators or by "
        "Arena-Hard's prompt; files: nothing here, print the commands that judge the files elsewhere",
        choices=("reward_model", "function", "alpaca_eval", "arena_hard", "files"),
    )
    reward_model: str | None = key("kind reward_model: Hugging Face folder of a sequence-classification model")
    allow_remote_code: bool = key("kind reward_model: whether code in its folder may be executed (ArmoRM needs it)")
    dtype: str = key("kind reward_model: its precision", choices=("float32", "bfloat16"))
    device: str = key("kind reward_model: where it runs: auto, cpu or cuda")
    function: str | None = key("kind function: MODULE:NAME of a function (messages, responses) -> scores")
    server: str | None = key("base URL of a server that speaks OpenAI's chat protocol, up to and including /v1")
    model: str | None = key("name of the judge on the server; every result depends on it, so there is no default")
    api_key_env: str | None = key("name of the environment variable that holds the server's API key; null: no key")
    annotator: str = key(
        "kind alpaca_eval: name of its annotator, whose prompt and parser are used with the judge above; those called "
        "weighted_* need a server that returns log-probs"
    )
    alpaca_eval_python: str | None = key(
        "kind alpaca_eval: Python of the environment with the package alpaca_eval; null: the one that runs this"
    )
    orders: str = key(
        "kind alpaca_eval: judge each pair in both orders, or in one that the prompt decides, as its leaderboard does",
        choices=("both", "one"),
    )
    temperature: float = key("kind arena_hard: sampling temperature of the judge")
    max_tokens: int | None = key("kind arena_hard: maximum tokens of a judgment; null: as many as the benchmark allows")
    verdict_attempts: int = key("replies that are asked for until one holds a verdict; after that the judge has failed")
    concurrency: int = key("requests to the server at the same time")
    timeout: float = key("request timeout in seconds, after which the request is retried")
    max_attempts: int = key("attempts per request, with increasing pauses, before the job stops")
    cache: str = key("folder of the server's replies, each on disk before it counts: no reply is paid for twice")
    shard_prompts: int = key("prompts per output shard: the most work that a reward model or function loses")


@dataclass
class AccuracySection:
    """Preference accuracy of a policy, and its divergence from the reference, without a judge."""

    model: str = key("the policy: a Hugging Face folder, or a run's folder for what it exported")
    reference: str = key(
        "Hugging Face folder of the reference model; not needed for labelled pairs, which hold its log-probs"
    )
    pairs: str = key(
        "preference pairs: a file, folder, pattern, list with commas, or hub:OWNER/NAME; or labelled pairs, whose "
        "reference log-probs are taken"
    )
    format: str = key("preference format; auto detects it, treg inspect --help lists the names")
    columns: dict[str, str] = key("which column of your records is what, instead of a format, as for treg label")
    ignore: list[str] = key("columns that carry meaning and are left out on purpose; id: pairs are named by content")
    subset: str | None = key("column that names the subset of a pair, where the records have it; null: no subsets")
    answers: str | None = key("folder of answers that the policy sampled, for the KL divergence; null: none")
    output: str = key("folder for the figures, accuracy.json, and for the policy's log-probs")
    reference_cache: str = key("folder for the reference's log-probs; policies on the same pairs may share it")
    beta: float = key("beta of the implicit reward; > 0")
    max_length: int = key("maximum tokens of prompt + response; longer pairs are dropped and counted")
    batch_tokens: int = key("tokens per forward pass")
    dtype: str = key("precision of both models", choices=("float32", "bfloat16"))
    device: str = key("where the models run: auto, cpu or cuda")
    shard_pairs: int = key("pairs, or prompts, per shard of log-probs: the most work that an interrupted job loses")


@dataclass
class ClusterSection:
    """The cluster that the recipe is meant for. Preflight reads this section; training and the node check require its
    device."""

    device: str = key("device: gpu with fused kernels, or cpu processes", choices=("gpu", "cpu"))
    nodes: int = key("number of nodes")
    gpus_per_node: int = key("ranks per node: its GPUs, or its processes when device is cpu")
    gpu: str | None = key(
        "GPU of the nodes, which gives every key of this section that is null; null: those keys must have values",
        choices=("h100", "h200", "a100_80", "a100_40", "b200"),
    )
    gpu_memory: float | None = key("memory per rank, in GB (10^9 bytes); null: the GPU's")
    host_memory: float | None = key("memory of a node's host, in GB, for what saving needs there; null: unknown")
    peak_tflops: float | None = key(
        "peak throughput per rank in the training precision, in TFLOP/s (10^12 operations per second); null: the "
        "GPU's, dense, in bf16"
    )
    mfu: float | None = key(
        "model FLOPs utilisation assumed for time estimates, in (0, 1]; null: what was measured on such GPUs with "
        "models of this size (docs/PREFLIGHT.md)"
    )
    node_bandwidth: float | None = key(
        "bandwidth per rank within a node, in GB/s (10^9 bytes per second); null: NVLink's"
    )
    network_bandwidth: float = key("bandwidth per rank between nodes, in GB/s")
    storage_bandwidth: float = key("file-system write bandwidth for the whole job, in GB/s")
    pairs: int | None = key("number of training pairs, for when the aligned dataset does not exist yet")


@dataclass
class Recipe:
    """A complete recipe: one section per pipeline step or concern."""

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
    evaluate: EvaluateSection
    judge: JudgeSection
    accuracy: AccuracySection
    cluster: ClusterSection


SECTIONS: dict[str, type] = {
    f.name: f.type for f in dataclasses.fields(Recipe) if isinstance(f.type, type) and dataclasses.is_dataclass(f.type)
}
