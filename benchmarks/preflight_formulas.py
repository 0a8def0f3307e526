"""Preflight's memory estimate of the first pipeline stage, compared with Megatron-LM's closed-form formulas.

    python benchmarks/preflight_formulas.py

The formulas, which Megatron-LM evaluates at start-up, are ``compute_weight_and_optimizer_memory`` and
``compute_activation_memory`` in its megatron/training/theoretical_memory_usage.py (Apache-2.0), specialised to a dense
model with SwiGLU, grouped queries, untied embeddings, the distributed optimizer and sequence parallelism. A micro-batch
has two sequences per pair.
"""

from treg_megatron.config.recipe import load_recipe
from treg_megatron.utils import entry

#: the formulas know no interleaving
RECIPES = {"llama3_8b": [], "llama3_70b": ["parallel.tensor=8", "parallel.virtual_pipeline=null"]}


def formula_weights_and_optimizer(fields: dict, tensor: int, pipeline: int, data: int) -> float:
    """Bytes of weights, gradients and optimizer state per rank of the first stage."""
    hidden, layers = fields["hidden_size"], fields["num_layers"]
    attention = 2 * hidden * hidden * (1 + fields["num_query_groups"] / fields["num_attention_heads"])
    layer = 2 * hidden * (fields["ffn_hidden_size"] * 3 / 2 + 2) + attention
    embedding = hidden * fields["vocab_size"]
    parameters = ((layer * layers + 2 * hidden) / pipeline + embedding * (2 if pipeline == 1 else 1)) / tensor
    return parameters * (6 + 12 / data)


def formula_activations(fields: dict, tokens: int, tensor: int, pipeline: int, micro_batches: int) -> float:
    """Bytes of activations per rank of the first stage; ``tokens`` is the size of a micro-batch."""
    hidden = fields["hidden_size"]
    activations = tokens * hidden * (18 + 4 * fields["ffn_hidden_size"] / hidden) * fields["num_layers"]
    activations += 8 * tokens * pipeline + tokens * hidden * pipeline
    if pipeline > 1:
        activations *= min(1, micro_batches / pipeline)
    else:
        activations += tokens * hidden * 4 * (1 + fields["vocab_size"] / hidden)
    return activations / tensor


def main() -> None:
    from treg_megatron.cli.preflight import use_meta_machine

    use_meta_machine()
    from treg_megatron.preflight.plan import make_plan, sections_of

    print("| recipe | part | formula, GB | preflight, GB | difference |\n|---|---|---:|---:|---:|")
    for name, overrides in RECIPES.items():
        sections = sections_of(load_recipe(f"recipes/{name}.yaml", overrides))
        plan, parallel = make_plan(sections, stages=[0]), sections.parallel
        stage, tokens = plan.stages[0], 2 * sections.data.micro_batch_size * sections.data.seq_length
        rows = {
            "weights, gradients, optimizer": (
                formula_weights_and_optimizer(plan.fields, parallel.tensor, parallel.pipeline, plan.data_ranks),
                sum(stage.at_rest),
            ),
            "activations": (
                formula_activations(plan.fields, tokens, parallel.tensor, parallel.pipeline, plan.micro_batches),
                stage.peak.total,
            ),
        }
        for part, (formula, found) in rows.items():
            print(f"| {name} | {part} | {formula / 1e9:.2f} | {found / 1e9:.2f} | {found / formula - 1:+.1%} |")
        print(
            f"{name}: of preflight's activations {stage.peak.activations / 1e9:.2f} GB are kept, "
            f"{stage.peak.working / 1e9:.2f} temporary, {stage.peak.head / 1e9:.2f} the log-prob head's"
        )


if __name__ == "__main__":
    entry.run(main)
