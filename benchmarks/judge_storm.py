"""Kill storm for judging: is a reply paid for twice, or lost, when the judge's client is killed at random moments?

    python benchmarks/judge_storm.py
    python benchmarks/judge_storm.py --kind alpaca_eval --alpaca-eval-python .venv-eval/bin/python

The server is one of this machine that judges by a rule and counts requests. What it was answering when the client was
killed must be asked for again, and is counted apart.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.judge_storm import CONCURRENCY, storm  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills, as long as there is something to judge (20)")
    parser.add_argument("--prompts", type=int, default=200, help="prompts, each judged in both orders (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--kind", choices=("arena_hard", "alpaca_eval"), default="arena_hard", help="judge.kind")
    parser.add_argument("--alpaca-eval-python", help="judge.alpaca_eval_python")
    arguments = parser.parse_args()
    options = {"kind": arguments.kind}
    if arguments.alpaca_eval_python:
        options["alpaca_eval_python"] = arguments.alpaca_eval_python
    with tempfile.TemporaryDirectory() as folder:
        counts = storm(Path(folder), arguments.kills, arguments.prompts, arguments.seed, options)
    print(f"at most {CONCURRENCY} requests at the same time")
    print(f"figure judge_kills {counts['kills']} kills")
    print(f"figure paid_twice {counts['paid_twice']} replies")
    print(f"figure judge_lost {counts['lost']} replies or judgments")
    print(f"figure asked_again {counts['asked_again']} requests under way when killed")


if __name__ == "__main__":
    main()
