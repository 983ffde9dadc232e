"""Measures how well the judge separates collapsed from sound answers, on labelled answers.

    python -m tests.calibrate                      the tables of docs/judge.md, from recorded surprisals
    python -m tests.calibrate --people ROWS ...    and how many answers by people it flags (columns input, output)
    python -m tests.calibrate --cases CASES        and which labelled cases it gets right, by text alone
    python -m tests.calibrate --record             let the small model read all answers again (3 minutes)

The answers to one question are in one half, by a digest of the question. docs/judge.md says what each half was used for. AUROC
is of collapsed against sound answers, by the score.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np

import data
import infer

FOLDER = Path(__file__).parent / "labelled"
SURPRISALS = FOLDER / "surprisals.json"


def read_labelled():
    """The labelled answers, each once: question, text, finish_reason, verdict, defects (None if they were not labelled)."""
    lines = [
        json.loads(line)
        for name in ("answers", "kit_answers")
        for line in (FOLDER / f"{name}.jsonl").open(encoding="utf-8")
    ]
    labelled = {(line["question"], line["text"]): {"defects": None} | line for line in lines if "verdict" in line}
    return list(labelled.values())


def is_held_back(question):
    """Whether the question's answers are in the held-back half."""
    return int(hashlib.sha256(question.encode()).hexdigest(), 16) % 2 == 1


def key_of(record):
    return hashlib.sha256(json.dumps([record["question"], record["text"]]).encode()).hexdigest()[:16]


def record_surprisals(labelled):
    """Reads all labelled answers with the small model; writes their largest surprisals and the reference."""
    from tqdm import tqdm

    infer.prepare_environment(data.PROFILES["cpu"])
    loaded = infer.load_for_inference(data.PROFILES["cpu"])
    found = {"reference": infer.surprisal_reference(loaded)}
    for record in tqdm(labelled, unit="answer"):
        found[key_of(record)] = round(read_surprisal(loaded, record), 4)
    SURPRISALS.write_text(json.dumps(found, indent=0) + "\n")


def read_surprisal(loaded, record):
    """The largest surprisal of a labelled answer, in nats per byte."""
    ids = data.encode_text(loaded.tokenizer, record["text"])
    ids += [loaded.tokenizer.eos_token_id] * (record["finish_reason"] == "stop")
    return infer.measure_surprisal(loaded, record["question"], ids)[0]


def judge_labelled(labelled):
    """`(record, measures)` of each answer, the measures in units of their thresholds, surprisals as recorded."""
    recorded = json.loads(SURPRISALS.read_text())
    pairs = []
    for record in labelled:
        surprisal = (recorded[key_of(record)] / recorded["reference"], (0, 0))
        judged = infer.judge(record["text"], record["question"], record["finish_reason"], surprisal)
        scores = {name: score / infer.THRESHOLDS[name] for name, (score, _) in judged.measures.items()}
        pairs.append((record, scores))
    return pairs


def auroc(positive, negative):
    """Chance that a random positive scores above a random negative, ties counting half (Mann and Whitney 1947)."""
    if not len(positive) or not len(negative):
        return math.nan
    positive, negative = np.asarray(positive, float), np.asarray(negative, float)
    above = (positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2
    return float(above)


def wilson(hits, total, z=1.96):
    """95% interval of a share (Wilson 1927)."""
    if not total:
        return math.nan, math.nan
    share, scale = hits / total, 1 + z**2 / total
    middle, half = share + z**2 / (2 * total), z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, (middle - half) / scale), (middle + half) / scale


def scores_of(pairs, names):
    """The score by these findings alone, of the answers of each verdict."""
    scores = {"sound": [], "borderline": [], "collapsed": []}
    for record, measures in pairs:
        scores[record["verdict"]].append(max(measures[name] for name in names))
    return scores


def format_row(title, scores):
    found = {verdict: f"{sum(score >= 1 for score in own)} of {len(own)}" for verdict, own in scores.items()}
    ranked = auroc(scores["collapsed"], scores["sound"])
    return f"| {title} | {ranked:.3f} | {found['collapsed']} | {found['borderline']} | {found['sound']} |"


HEADER = "| | AUROC | collapsed, flagged | borderline, flagged | sound, flagged |\n|---|---|---|---|---|"


def format_length_table(texts):
    """Counts the sound texts that text findings flag, by the number of words read."""
    lines = ["| first words | texts | flagged |", "|---|---|---|"]
    for size in (50, 100, 200, 300):
        cut = [(" ".join(text.split(" ")[:size]), question) for text, question in texts if len(text.split()) >= size]
        flagged = sum(not infer.judge(text, question, "length").sound for text, question in cut)
        lines.append(f"| {size} | {len(cut):,} | {flagged} ({flagged / max(1, len(cut)):.1%}) |")
    return "\n".join(lines)


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=Path, nargs="+", default=[], metavar="ROWS.jsonl")
    parser.add_argument("--cases", type=Path, metavar="CASES.jsonl")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    labelled = read_labelled()
    if options.record:
        record_surprisals(labelled)
    pairs = judge_labelled(labelled)
    tuning = [pair for pair in pairs if not is_held_back(pair[0]["question"])]
    held_back = [pair for pair in pairs if is_held_back(pair[0]["question"])]
    names = list(infer.CHECKS)
    text_only = [name for name in names if name != "surprisal"]
    print(f"The held-back half ({len(held_back)} answers):\n\n{HEADER}")
    print(format_row("all findings", scores_of(held_back, names)))
    print(format_row("text alone", scores_of(held_back, text_only)))
    print(f"\nThe tuning half ({len(tuning)} answers), and without one finding:\n\n{HEADER}")
    print(format_row("all findings", scores_of(tuning, names)))
    print(format_row("text alone", scores_of(tuning, text_only)))
    for name in names:
        print(format_row(f"without {name}", scores_of(tuning, [each for each in names if each != name])))
    for name in names:
        print(format_row(f"{name} alone", scores_of(tuning, [name])))
    people = [(row["output"], row["input"]) for path in options.people for row in map(json.loads, path.open(encoding="utf-8"))]
    if people:
        verdicts = [infer.judge(*pair) for pair in people]
        flagged = sum(not verdict.sound for verdict in verdicts)
        low, high = wilson(flagged, len(people))
        print(f"\nAnswers by people, by text alone: {flagged} of {len(people):,} flagged, {flagged / len(people):.2%} ", end="")
        print(f"({low:.2%} to {high:.2%})")
        for name in text_only:
            print(f"  {name:<20}{sum(name in verdict.verdict.split(', ') for verdict in verdicts)}")
        print(f"\n{format_length_table(people)}")
    if options.cases:
        cases = [json.loads(line) for line in options.cases.open(encoding="utf-8")]
        right = 0
        print()
        for case in cases:
            verdict = infer.judge(case["text"], case["question"], case["finish_reason"])
            is_right = verdict.sound == (case["label"] == "sound")
            right += is_right
            if not is_right:
                print(f"  wrong: {case['kind']} ({case['label']}): {verdict.verdict}")
        print(f"Cases, by text alone: {right} of {len(cases)} right")


if __name__ == "__main__":
    sys.exit(main())
