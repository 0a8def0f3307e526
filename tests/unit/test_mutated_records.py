"""Ten thousand harmed records of all formats: each is a pair, a counted drop or a refusal that names its row."""

import copy
import json
import random
from collections import Counter

import pytest

from tests.support.pair_formats import EXAMPLES
from treg_megatron.data.pairs import Reading, read_pairs
from treg_megatron.errors import UserError

MUTATIONS = 400  # of each of 25 formats and three further records
ODD = (
    *(
        None,
        "",
        " ",
        0,
        -1,
        1.5,
        float("nan"),
        float("inf"),
        True,
        [],
        {},
        [[]],
        [{}],
        [None],
        {"role": "user"},
        "\ud800",
    ),
    *(
        "[",
        "[{",
        '[{"role": "user", "content": "x"}]',
        "\x00",
        "Human:",
        "\n\nHuman: a\n\nAssistant:",
        "</s>",
        "a" * 5000,
    ),
    *(10**400, {"role": ["user"], "content": ["a"]}, {"from": "gpt", "value": 3}, [["a", "b"]], [{"type": "image"}]),
)


BESIDE = ("system", "tools", "history", "images", "id", "chosen_score")


def places(value, path=()):
    """Every place in a record, by the keys and positions that lead to it."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from places(child, (*path, name))


def mutated(record: dict, chance: random.Random) -> dict:
    record = json.loads(json.dumps(record))  # nothing in it twice as one object
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if not record:
            break
        *above, last = chance.choice([path for path in places(record) if path])
        parent = record
        for name in above:
            parent = parent[name]
        match chance.randrange(5):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[last]))
            case 2:
                other = chance.choice([path for path in places(record) if path])
                value = record
                for name in other:
                    value = value[name]
                parent[last] = copy.deepcopy(value)
            case 3 if isinstance(parent, dict):
                parent[chance.choice(BESIDE)] = copy.deepcopy(chance.choice(ODD))
            case _:
                parent[last] = copy.deepcopy(chance.choice(ODD))
    return record


_TURNS = [{"role": role, "content": role} for role in ("assistant", "user", "assistant")]
_IDS = {"chosen_ids": [1, 2], "rejected_ids": [3], "tokenizer": "f00d"}
_TEXTS = {"prompt": "Name a bird.", "chosen": "Robin.", "rejected": "Bat.", "score_chosen": 2, "score_rejected": 1}
RECORDS = {
    **{name: (name, record) for name, (record, _) in EXAMPLES.items()},
    "several turns": ("trl", {**_TEXTS, "chosen": _TURNS}),
    "sampled ids": ("trl", {**_TEXTS, **_IDS}),
    "several turns and sampled ids": ("trl", {**_TEXTS, "rejected": _TURNS, **_IDS}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_no_harmed_record_is_lost_or_ends_in_a_traceback(tmp_path, name):
    chance = random.Random(name)
    path = tmp_path / "pairs.jsonl"
    format, record = RECORDS[name]
    records = [mutated(record, chance) for _ in range(MUTATIONS)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    drops, unusable = Counter(), []
    try:
        pairs = list(read_pairs(path, drops, Reading(format), unusable.append))
    except UserError:
        pytest.fail("a record was refused without the chance to go on")
    assert len(pairs) + drops.total() + len(unusable) == MUTATIONS
    assert all(message.startswith("row ") and "\n" not in message for message in unusable)
    assert pairs and unusable
    assert all(pair.chosen_ids is None or not (pair.chosen_turns or pair.rejected_turns) for pair in pairs)
    for pair in pairs:
        assert pair.chosen.strip() and pair.rejected.strip() and pair.messages
