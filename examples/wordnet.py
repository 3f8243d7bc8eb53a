"""A worked example: dictionary definitions to be sorted into eight categories.

    apt-get install wordnet-base
    python examples/wordnet.py /usr/share/wordnet --out definitions
    lomo-kernels finetune --train definitions/train.jsonl --held-out definitions/held_out.jsonl

Reads WordNet's data.noun (format: WordNet's wndb(5) manual page), whose second field is the
lexicographer's file a noun belongs to, and writes questions in the format of `--train`.
"""

import argparse
import json
import random
import sys
from pathlib import Path

CATEGORIES = {
    "05": "animal",
    "08": "body",
    "12": "feeling",
    "13": "food",
    "15": "place",
    "18": "person",
    "20": "plant",
    "28": "time",
}


def definitions(path):
    """(definition, category) of every noun in one of the categories."""
    with open(path, encoding="latin-1") as lines:
        for line in lines:
            fields, bar, gloss = line.partition(" | ")
            if not bar or line.startswith(" "):  # the licence at the top
                continue
            category = CATEGORIES.get(fields.split()[1])
            if category is not None:
                yield gloss.split('; "')[0].strip(), category


def questions(path, train, held_out, seed):
    """Two lists of questions with equally many of each category, and no definition in both."""
    by_category = {category: [] for category in CATEGORIES.values()}
    for definition, category in sorted(set(definitions(path))):
        by_category[category].append(definition)
    order = random.Random(seed)
    parts = [], []
    each = (train + held_out) // len(by_category)
    for category, found in by_category.items():
        if len(found) < each:
            raise ValueError(f"{path} has {len(found)} definitions of {category!r}, wanted {each}")
        for i, definition in enumerate(order.sample(found, each)):
            row = {
                "prompt": f"Definition: {definition}\nCategory:",
                "completion": f" {category}",
            }
            parts[i < held_out // len(by_category)].append(row)
    for part in parts:
        order.shuffle(part)
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("wordnet", type=Path, help="folder with data.noun")
    parser.add_argument("--out", type=Path, default=Path("definitions"), help="folder to write to")
    parser.add_argument("--train", type=int, default=512, help="questions to train on")
    parser.add_argument("--held-out", type=int, default=256, help="questions for the score")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = options.wordnet / "data.noun"
    if not source.is_file():
        print(f"there is no file {source}: apt-get install wordnet-base", file=sys.stderr)
        return 2
    parts = questions(source, options.train, options.held_out, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "held_out"), parts):
        path = options.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{path}: {len(part)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
