"""Chooses the preset `kit`: candidate decodings on all probe questions, base model and adapter, judged by readers.

    python -m tests.choose_kit                          the table, from tests/labelled/kit_answers.jsonl
    python -m tests.choose_kit ADAPTER ANSWERS.jsonl    ask again (half an hour on two cores); the verdicts are then to be given

Readers judged their form, blind to model and decoding: see tests/labelled/README.md.
"""

import contextlib
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import data
import infer
from infer import DECODINGS, Decoding, Request

LABELLED = Path(__file__).parent / "labelled" / "kit_answers.jsonl"

CANDIDATES = {name: DECODINGS[name] for name in ("plain", "story-collapse", "story-fix", "week3")} | {
    **{f"penalty {value}": Decoding(repetition_penalty=value) for value in (1.05, 1.1, 1.15, 1.2, 1.3)},
    "penalty 1.1, prompt counted": Decoding(repetition_penalty=1.1, count_prompt=True),
    "no 8-gram twice": Decoding(no_repeat_ngram_size=8),
}


def ask(adapter, output):
    """Writes every candidate's answers, base model first, without verdicts."""
    from tqdm import tqdm

    infer.prepare_environment(data.PROFILES["cpu"])
    loaded = infer.load_for_inference(data.PROFILES["cpu"], adapter and infer.check_adapter(adapter))
    questions = [probe.question for probe in infer.read_probes()[: infer.REFERENCE_PROBES]]
    named = [(name, Request(question, decoding)) for name, decoding in CANDIDATES.items() for question in questions]
    total = 2 * sum(request.decoding.max_new_tokens for _, request in named)
    with tqdm(total=total, unit="token") as bar, output.open("w", encoding="utf-8") as lines:
        for model, context in (("base", loaded.without_adapter()), ("adapter", contextlib.nullcontext(loaded))):
            with context as asked:
                answers = infer.answer_requests(asked, [request for _, request in named], bar.update)
            for (name, _), answer in zip(named, answers, strict=True):
                record = {"model": model, "candidate": name, "question": answer.question, "sha256": answer.sha256}
                record |= {"finish_reason": answer.finish_reason, "answer_tokens": answer.answer_tokens, "text": answer.text}
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def make_table(records):
    """Markdown: how many answers of each candidate ended by the stop token, and how many of these were sound."""
    counts = defaultdict(Counter)
    for record in records:
        counts[record["candidate"]][record["model"], "all"] += 1
        if record["finish_reason"] == "stop":
            counts[record["candidate"]][record["model"], "ended"] += 1
            counts[record["candidate"]][record["model"], record["verdict"]] += 1
    lines = ["| decoding | base: ended | sound and ended | adapter: ended | sound and ended | both: sound and ended |"]
    lines.append("|---|---|---|---|---|---|")
    for name in CANDIDATES:
        of = counts[name]
        cells = [f"{of[model, kind]} of {of[model, 'all']}" for model in ("base", "adapter") for kind in ("ended", "sound")]
        both = f"{of['base', 'sound'] + of['adapter', 'sound']} of {of['base', 'all'] + of['adapter', 'all']}"
        lines.append(f"| {name} | {' | '.join(cells)} | {both} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        ask(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        print(make_table([json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]))
