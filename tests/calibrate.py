"""How well the findings tell collapsed answers from sound ones, on answers that were labelled by reading.

    python -m tests.calibrate                          every finding and the verdict, on both halves of tests/labelled
    python -m tests.calibrate --people ROWS.jsonl ...  and false alarms on people's own answers (columns input, output)
    python -m tests.calibrate --fit --people ...       weights of drift, fitted on the setting half and half the people

Answers to one question are in one half, by a digest of the question: thresholds and weights were set on one half alone. What to
measure was chosen with an eye on both; the answers marked `late` were labelled when nothing was changed any more.
AUROC is of collapsed against sound answers for the verdict; for a finding, of answers labelled with its defect against sound
ones. Precision and recall are at the threshold; false alarms are sound answers that are accused, with a 95% Wilson interval.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np

import infer

FOLDER = Path(__file__).parent / "labelled"

# The labels of tests/labelled/README.md that a finding should meet.
DEFECTS = {
    "loop": {"loop"},
    "repetition": {"repetition", "loop"},
    "repeated-items": {"loop", "run-on-list"},
    "similar-items": {"repetition", "run-on-list", "shared-beginning"},
    "run-on-list": {"run-on-list"},
    "shared-beginning": {"shared-beginning"},
    "invented-word": {"invented-word", "invented-medicine"},
    "invented-medicine": {"invented-medicine"},
    "drift": {"drift"},
    "symbols": {"symbols"},
    "other-speaker": {"other-speaker"},
    "empty": {"empty"},
}


def read_labelled():
    """The labelled answers, each once: question, text, finish_reason, verdict, defects (None where they were not labelled)."""
    lines = [
        json.loads(line) for name in ("answers", "kit_answers") for line in (FOLDER / f"{name}.jsonl").open(encoding="utf-8")
    ]
    labelled = {(line["question"], line["text"]): {"defects": None} | line for line in lines if "verdict" in line}
    return list(labelled.values())


def is_held_back(question):
    """Whether the question's answers are in the half that decided nothing."""
    return int(hashlib.sha256(question.encode()).hexdigest(), 16) % 2 == 1


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


def format_row(name, positive, negative, threshold):
    """One line of the table: scores of answers with the defect and of sound ones, at a threshold."""
    found, accused = sum(score >= threshold for score in positive), sum(score >= threshold for score in negative)
    low, high = wilson(accused, len(negative))
    precision = f"{found / (found + accused):.2f}" if found + accused else "-"
    recall = f"{found / len(positive):.2f}" if positive else "-"
    return (
        f"| {name} | {len(positive)} | {auroc(positive, negative):.3f} | {precision} | {recall} | {accused} of {len(negative)} "
        f"({low:.1%} to {high:.1%}) |"
    )


def format_half(title, judged):
    """The table of one half."""
    lines = [
        f"\n{title}",
        "",
        "| | n | AUROC | precision | recall | false alarms among sound answers |",
        "|---|---|---|---|---|---|",
    ]
    sound = [judgement for record, judgement in judged if record["verdict"] == "sound"]
    for name, defects in DEFECTS.items():
        having = [judgement for record, judgement in judged if defects & set(record["defects"] or ())]
        scores = [[judgement.scores[name] for judgement in group] for group in (having, sound)]
        lines.append(format_row(name, *scores, infer.CHECKS[name].threshold))
    for kind in ("collapsed", "borderline"):
        of_kind = [judgement.evidence for record, judgement in judged if record["verdict"] == kind]
        lines.append(format_row(f"**verdict**, {kind}", of_kind, [each.evidence for each in sound], 1))
    return "\n".join(lines)


def read_people(paths):
    """(answer, question) of rows that people wrote."""
    return [(row["output"], row["input"]) for path in paths for row in map(json.loads, path.open(encoding="utf-8"))]


def fit_logistic(features, labels, weights, ridge=0.3):
    """Coefficients, the constant last, of a weighted ridge logistic regression (Newton's method)."""
    design = np.c_[features, np.ones(len(features))]
    penalty = ridge * np.diag([1.0] * features.shape[1] + [0.0])
    beta = np.zeros(design.shape[1])
    for _ in range(100):
        chance = 1 / (1 + np.exp(-design @ beta))
        gradient = design.T @ (weights * (chance - labels)) + penalty @ beta
        step = np.linalg.solve((design.T * (weights * chance * (1 - chance))) @ design + penalty, gradient)
        beta -= step
        if abs(step).max() < 1e-8:
            break
    return beta


def fit_drift(labelled, people, false_alarms=0.018):
    """The weights of drift, from the setting half and every other of the people's answers.

    Positives are collapsed answers that no other finding accuses. The people's count a tenth each. The constant is moved so
    that the odds are 1 where `false_alarms` of the people's answers lie above.
    """
    positives, negatives = [], []
    for record in labelled:
        if is_held_back(record["question"]) or record["verdict"] == "borderline":
            continue
        judgement = infer.judge(record["text"], record["question"])
        others = any(finding.against for finding in judgement.findings if finding.name != "drift")
        if record["verdict"] == "sound" or not others:
            (positives if record["verdict"] == "collapsed" else negatives).append((record["text"], record["question"]))
    groups = [positives, negatives, people[::2]]
    cues = []
    for group in groups:
        readings = [infer.Reading(*pair) for pair in group]
        cues.append([infer.drift_cues(reading, len(infer.find_unexplained(reading))) for reading in readings])
    names = list(cues[0][0])
    features = [np.array([[each[name] for name in names] for each in group]) for group in cues]
    labels = np.repeat([1.0, 0.0, 0.0], [len(group) for group in groups])
    weights = np.repeat([1.0, 1.0, 0.1], [len(group) for group in groups])
    beta = fit_logistic(np.concatenate(features), labels, weights)
    scores = features[2] @ beta[:-1]
    constant = -float(np.quantile(scores, 1 - false_alarms))
    return {"constant": constant, **dict(zip(names, beta[:-1].tolist(), strict=True))}


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=Path, nargs="+", default=[], metavar="ROWS.jsonl")
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    labelled, people = read_labelled(), read_people(options.people)
    if options.fit:
        print({name: round(value, 2) for name, value in fit_drift(labelled, people).items()})
        return
    judged = [(each, infer.judge(each["text"], each["question"], each["finish_reason"])) for each in labelled]
    for title, held_back in (("The half that thresholds and weights were set on:", False), ("The half not used:", True)):
        print(format_half(title, [pair for pair in judged if is_held_back(pair[0]["question"]) == held_back]))
    print(format_half("Labelled after all was set (of both halves):", [pair for pair in judged if pair[0].get("late")]))
    if people:
        verdicts = [infer.judge(*pair) for pair in people]
        accused = sum(not verdict.sound for verdict in verdicts)
        low, high = wilson(accused, len(people))
        print(
            f"\nPeople's own answers: {accused} of {len(people)} accused, {accused / len(people):.2%} ({low:.2%} to {high:.2%})"
        )
        for name in DEFECTS:
            print(f"  {name:<20}{sum(verdict.scores[name] >= infer.CHECKS[name].threshold for verdict in verdicts)}")


if __name__ == "__main__":
    sys.exit(main())
