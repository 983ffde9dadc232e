"""Times the text findings of the judge: 1,000 answers of about 256 tokens on one core.

    python -m tests.bench judge

Against the alternative in the same run: looking up the words of each answer with the library that names medicines, which finds
known ones and nothing else. Five rounds by turns; medians are printed. The answers are those of tests/labelled that were cut at
256 tokens or came near.
"""

import itertools
import statistics
import time

import infer
from tests import calibrate

ROUNDS = 5
ANSWERS = 1_000


def time_of(work, pairs):
    started = time.perf_counter()
    for text, question in pairs:
        work(text, question)
    return time.perf_counter() - started


def main(arguments):
    from drug_named_entity_recognition import find_drugs

    def look_up(text, question):
        return find_drugs(text.split())

    near = [each for each in calibrate.read_labelled() if 200 <= each["answer_tokens"] <= 256]
    pairs = [(each["text"], each["question"]) for each in itertools.islice(itertools.cycle(near), ANSWERS)]
    infer.load_medicines()
    look_up(*pairs[0])  # loads what the library loads at first use
    rounds = [(time_of(infer.judge, pairs), time_of(look_up, pairs)) for _ in range(ROUNDS)]
    judged, looked_up = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(one / other for one, other in rounds)
    tokens = sum(each["answer_tokens"] for each in near) / len(near)
    print(f"{ANSWERS:,} answers of {tokens:.0f} tokens on average, medians of {ROUNDS} rounds")
    print(f"judged in                {judged:.2f} s")
    print(f"medicines looked up in   {looked_up:.2f} s; judging takes {ratio:.2f} times that")
