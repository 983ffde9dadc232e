"""Blind comparisons of the answers at the steps that different metrics select.

    python -m tests.blind_pairs sheet STUDY              writes STUDY/blind/sheet.jsonl, for readers, and key.jsonl
    python -m tests.blind_pairs collect STUDY VOTES ...  readings.csv from the readers' files
    python -m tests.blind_pairs count STUDY              how often readers preferred the answers' step, by metric

A line of the sheet has an id, a question and two answers, A and B, in an order drawn by a digest; neither arm, step nor
metric. A reader's file holds lines of id and vote: A, B, or "neither" where none is better.
"""

import csv
import hashlib
import json
import sys
import types
from pathlib import Path

import pandas

import ablate
import data


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path, records):
    path.parent.mkdir(exist_ok=True)
    data.write_atomic(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records))


def make_sheet(study):
    """The lines for the readers, and the key: for each id the arm, the metric, the question, and which one answers select."""
    sheet, key = [], []
    for path in sorted(study.glob("runs/*/run.json")):
        selected = json.loads(path.read_text(encoding="utf-8"))["numbers"]["selected"]
        for metric in ("eval_loss", "rouge_l"):
            steps = [selected.get(name) for name in ("answers", metric)]
            if None in steps or steps[0] == steps[1]:
                continue
            pairs = zip(*(read_lines(path.parent / "samples" / f"{step}.jsonl") for step in steps), strict=True)
            for one, other in pairs:
                assert one["question"] == other["question"]
                digest = hashlib.sha256(f"{path.parent.name} {metric} {one['question']}".encode()).hexdigest()
                is_first = int(digest, 16) % 2 == 0
                first, second = (one, other) if is_first else (other, one)
                sheet.append({"id": digest[:12], "question": one["question"], "A": first["text"], "B": second["text"]})
                own = {"arm": path.parent.name, "metric": metric, "question": one["question"]}
                key.append({"id": digest[:12], **own, "answers": "A" if is_first else "B"})
    # Sorted by digest, so that neighbours are of different runs.
    return sorted(sheet, key=lambda each: each["id"]), key


def collect(study, files):
    """One row per reader and pair: 1 for the answer at the step that answers select, -1 for the other, 0 for neither."""
    key, rows = read_lines(study / "blind" / "key.jsonl"), []
    for number, path in enumerate(files, 1):
        votes = {each["id"]: each["vote"] for each in read_lines(Path(path))}
        if votes.keys() != {each["id"] for each in key} or not set(votes.values()) <= {"A", "B", "neither"}:
            raise SystemExit(f"{path}: expected a vote (A, B or neither) for each id of the sheet.")
        for each in key:
            vote = votes[each["id"]]
            value = 0 if vote == "neither" else 1 if vote == each["answers"] else -1
            rows.append([f"reader {number}", each["arm"], each["metric"], each["question"], value])
    with (study / "readings.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["reader", "arm", "metric", "question", "vote"], *rows])


def count(study):
    """By metric, how often readers preferred the step that answers select; a question of a run counts once, by its votes."""
    counts = {}
    for metric, own in pandas.read_csv(study / "readings.csv").groupby("metric"):
        votes = own.groupby(["arm", "question"]).vote.sum().to_numpy()
        cells = {("run", name): pandas.DataFrame({"sound": votes * sign > 0}) for name, sign in (("answers", 1), (metric, -1))}
        found = ablate.Query("answers", metric, "sound", within=["run"]).run(types.SimpleNamespace(cells=cells))
        better, worse, equal = (votes > 0).sum(), (votes < 0).sum(), (votes == 0).sum()
        counts[metric] = f"{', '.join(own.arm.unique())}: {better} better, {worse} worse, {equal} equal, net {found.text.partition('net ')[2][:-1]}"
    return counts


def main(action, study, *files):
    study = Path(study)
    if action == "count":
        return print("\n".join(f"{metric} in {text}" for metric, text in count(study).items()))
    if action == "collect":
        return collect(study, files)
    sheet, key = make_sheet(study)
    write_lines(study / "blind" / "sheet.jsonl", sheet)
    write_lines(study / "blind" / "key.jsonl", key)
    print(f"{len(sheet)} pairs in {study / 'blind' / 'sheet.jsonl'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
