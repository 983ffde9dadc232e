"""Measures the cleaning rules of data.py on published rows with labels.

    python -m tests.measure_cleaning FOLDER

FOLDER holds `chatdoctor_raw_2000.jsonl`, the file that tests/labelled/cleaning.jsonl speaks of, and
`chatdoctor_damage_pairs_62.jsonl`, answers before and after ChatDoctor's anonymizer. Neither is part of this kit.
"""

import json
import sys
from pathlib import Path

from data import SYSTEM_PROMPT, Report, Row, clean_row

LABELS = Path(__file__).parent / "labelled" / "cleaning.jsonl"


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clean(question, answer):
    """The answer as cleaned, or None where the row is dropped."""
    messages = (("system", SYSTEM_PROMPT), ("user", question), ("assistant", answer))
    cleaned = clean_row(Row(messages, "conversational"), Report("rows", "chatdoctor"))
    return cleaned.answer if cleaned else None


def measure_labels(rows, labels):
    """`(caught, damaged, lost, worth keeping)`: rows dropped of the damaged ones, and of those that a reader would keep."""
    dropped = {label["line"]: clean(*(rows[label["line"] - 1][key] for key in ("input", "output"))) is None for label in labels}
    damaged = [label["line"] for label in labels if label["damaged"]]
    worth = [label["line"] for label in labels if label["keep"]]
    return sum(dropped[line] for line in damaged), len(damaged), sum(dropped[line] for line in worth), len(worth)


def measure_pairs(pairs):
    """`(caught, damaged, same, whole)`: a pair is damaged if its published answer, cleaned of what the site put around it,
    differs from the original cleaned alike. Of the whole ones, `same` come out word for word as the original does."""
    caught = damaged = same = whole = 0
    for pair in pairs:
        published, original = (clean(pair["input"], pair[key]) for key in ("chatdoctor", "original"))
        is_damaged = "chatdoctor." in pair["chatdoctor"].lower().replace("chat doctor", "chatdoctor") and published != original
        damaged += is_damaged
        caught += is_damaged and published is None
        whole += not is_damaged
        same += not is_damaged and published == original
    return caught, damaged, same, whole


def main(folder):
    rows, labels = read_lines(folder / "chatdoctor_raw_2000.jsonl"), read_lines(LABELS)
    for part in ("seen", "unseen"):
        caught, damaged, lost, worth = measure_labels(rows, [label for label in labels if label["part"] == part])
        print(
            f"{part + ' labels':<14} damaged rows dropped {caught} of {damaged} ({caught / damaged:.1%}), "
            f"rows worth keeping lost {lost} of {worth} ({lost / worth:.1%})"
        )
    caught, damaged, same, whole = measure_pairs(read_lines(folder / "chatdoctor_damage_pairs_62.jsonl"))
    print(f"{'pairs':<14} damaged rows dropped {caught} of {damaged}, whole rows equal to their originals {same} of {whole}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
