"""One record of each preference format, shaped like its public datasets, and the pair that it is."""

from typing import Any

USER = [{"role": "user", "content": "Name a bird."}]
GOOD, BAD = ([*USER, {"role": "assistant", "content": text}] for text in ("Robin.", "Bat."))
TURNS = "\n\nHuman: Name a bird.\n\nAssistant:"

#: By the format's name: a record, and the scores of its pair (Name a bird. Robin. Bat.) or None.
EXAMPLES: dict[str, tuple[dict[str, Any], tuple[float, float] | None]] = {
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Name a bird."}],
            "chosen": {"from": "gpt", "value": "Robin."},
            "rejected": {"from": "gpt", "value": "Bat."},
        },
        None,
    ),
    "simpo": (
        {
            "prompt_id": "1",
            "prompt": "Name a bird.",
            "all_generated_responses": ["Wren?", "Robin.", "Bat."],
            "all_rm_scores": [0.2, 0.5, 0.1],
            "chosen": GOOD,
            "rejected": BAD,
        },
        (0.5, 0.1),
    ),
    "nemo_rl": (
        {
            "context": USER,
            "completions": [
                {"rank": 1, "completion": BAD[1:]},
                {"rank": 0, "completion": GOOD[1:]},
            ],
            "task_name": "b",
        },
        None,
    ),
    "nemo_aligner": (
        {
            "prompt": "Name a bird.",
            "chosen_response": "Robin.",
            "rejected_response": "Bat.",
            "chosen_reward": 2,
            "rejected_reward": 1,
        },
        (2, 1),
    ),
    "argilla": (
        {
            "source": "s",
            "instruction": "Name a bird.",
            "chosen_response": "Robin.",
            "rejected_response": "Bat.",
            "chosen_avg_rating": 5.0,
            "rejected_avg_rating": 3.0,
            "chosen_model": "m",
        },
        (5, 3),
    ),
    "swift": ({"messages": GOOD, "rejected_response": "Bat."}, None),
    "helpsteer3": (
        {
            "domain": "general",
            "language": "english",
            "context": USER,
            "response1": "Bat.",
            "response2": "Robin.",
            "overall_preference": 3,
            "individual_preference": [{"score": 3, "reasoning": "@Response 1 is no bird.", "feedback_1": "wrong"}],
        },
        (3, 0),
    ),
    "helpsteer2": (
        {
            "split": "train",
            "prompt": "Name a bird.",
            "response_1": "Robin.",
            "response_2": "Bat.",
            "preference_strength": -2,
            "preference_statement": "Response 1 is better",
            "preference_elaboration": "A bat is no bird.",
        },
        (2, 0),
    ),
    "pku_better": (
        {
            "prompt": "Name a bird.",
            "prompt_source": "A",
            "response_0": "Bat.",
            "response_1": "Robin.",
            "response_0_sha256": "0",
            "is_response_0_safe": True,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        None,
    ),
    "pku_safer": (
        {
            "prompt": "Name a bird.",
            "response_0": "Robin.",
            "response_1": "Bat.",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        None,
    ),
    "shp": (
        {
            "post_id": "p",
            "domain": "askscience_train",
            "history": "Name a bird.",
            "c_root_id_A": "a",
            "human_ref_A": "Bat.",
            "human_ref_B": "Robin.",
            "score_A": 2,
            "score_B": 9,
            "labels": 0,
            "seconds_difference": 10.0,
        },
        (9, 2),
    ),
    "openai": (
        {
            "input": {"messages": USER, "tools": [], "parallel_tool_calls": True},
            "preferred_output": GOOD[1:],
            "non_preferred_output": BAD[1:],
        },
        None,
    ),
    "nectar": (
        {
            "prompt": f"{TURNS} ",
            "answers": [
                {"answer": "Bat.", "model": "m", "rank": 7.0},
                {"answer": "Robin.", "model": "n", "rank": 1.0},
                {"answer": "Wren?", "model": "o", "rank": 2.0},
            ],
            "turns": 1,
            "num_responses": 3,
            "source": ["s"],
            "good_natured": True,
        },
        None,
    ),
    "ultrafeedback_published": (
        {
            "source": "s",
            "instruction": "Name a bird.",
            "models": ["m", "n"],
            "completions": [
                {"response": "Robin.", "overall_score": 1.0, "fine-grained_score": 4.5, "critique": "good"},
                {"response": "Bat.", "overall_score": 10.0, "fine-grained_score": 1.5, "critique": "bad"},
            ],
            "correct_answers": ["None"],
        },
        (4.5, 1.5),
    ),
    "distilabel": (
        {
            "instruction": "Name a bird.",
            "generations": ["Bat.", "Robin.", None],
            "ratings": [2, 5, None],
            "generation_models": ["m", "n", "o"],
            "generation_prompt": [[{"role": "system", "content": "You write answers."}]],
        },
        (5, 2),
    ),
    "ultrafeedback": (
        {
            "prompt": "Name a bird.",
            "prompt_id": "x",
            "messages": GOOD,
            "chosen": GOOD,
            "rejected": BAD,
            "score_chosen": 8,
            "score_rejected": 4,
        },
        (8, 4),
    ),
    "trl": ({"prompt": "Name a bird.", "chosen": "Robin.", "rejected": "Bat."}, None),
    "axolotl": ({"messages": USER, "chosen": GOOD[1], "rejected": BAD[1]}, None),
    "alpaca": ({"instruction": "Name a bird.", "input": "", "chosen": "Robin.", "rejected": "Bat."}, None),
    "alpaca_output": ({"instruction": "Name a bird.", "input": "", "output": ["Robin.", "Bat."]}, None),
    "orca": ({"system": "", "question": "Name a bird.", "chosen": "Robin.", "rejected": "Bat."}, None),
    "orca_argilla": (
        {
            "system": "",
            "input": "Name a bird.",
            "chosen": "Robin.",
            "rejected": "Bat.",
            "generations": ["Robin.", "Bat."],
            "labelling_prompt": [{"role": "system", "content": "You compare answers."}],
            "raw_labelling_response": "9 2",
            "rating": [9.0, 2.0],
            "status": "unchanged",
            "chosen_score": 9.0,
            "rejected_score": 2.0,
        },
        (9, 2),
    ),
    "trl_implicit": (
        {"uuid": "1", "instruction": "Name a bird.", "chosen": GOOD, "rejected": BAD, "task_category": "facts"},
        None,
    ),
    "hh": ({"chosen": f"{TURNS} Robin.", "rejected": f"{TURNS} Bat."}, None),
    "trl_implicit_text": ({"chosen": "Name a bird. Robin.", "rejected": "Name a bird. Bat."}, None),
}
