"""Compares generation speed of the kit and of transformers' `generate`, on the ablation's grid.

    python -m tests.bench answer [--questions N] [--max-new-tokens N] [--rounds N]

The grid is that of `ablate.py`: probe questions under all its decodings, caps scaled from 256 to --max-new-tokens.
transformers' own model, loaded without Unsloth, answers one question per `generate` call, and then all questions of a decoding
per call (padded on the left), under the same decodings: by the kit's processors, since the library's penalty cannot ignore the
prompt and the end-of-turn token. All compute in float32 in the same process, by turns; medians are printed. Answers of single
calls have to be the same tokens; in a batch of another shape the last bits differ, and a few answers may. Loading is not timed.

Then the kit alone, once each: the verdicts on one answer and on the grid, in which the base model reads every answer for its
surprisal; more questions, longer answers (none of which ends before its cap), fewer threads. The picture is
docs/bench-answer.png.
"""

import argparse
import dataclasses
import statistics
import time

import ablate
import data
import infer
from tests.bench import Panel, draw

ROUNDS, CAP = 3, 64


def make_requests(questions, cap):
    """The grid's requests of the base model; caps of 256 and 128 become `cap` and half of it."""
    study = ablate.make_study(ablate.AblateConfig(profile="cpu"))
    return [
        infer.Request(probe.question, dataclasses.replace(decoding, max_new_tokens=decoding.max_new_tokens * cap // 256))
        for decoding in ablate.DECODING_ARMS.values()
        for probe in study.probes[:questions]
    ]


def answer_plainly(plain, loaded, requests, questions_per_call):
    """Token ids of each answer; each call answers several questions under one decoding."""
    import torch

    pad, answers = loaded.tokenizer.pad_token_id, {}
    by_decoding = {}
    for place, request in enumerate(requests):
        by_decoding.setdefault(request.decoding, []).append(place)
    for decoding, places in by_decoding.items():
        for start in range(0, len(places), questions_per_call):
            batch = places[start : start + questions_per_call]
            prompts = [infer.encode_request(loaded, requests[place]) for place in batch]
            width = max(map(len, prompts))
            padding = [width - len(prompt) for prompt in prompts]
            ids = [[pad] * missing + prompt for missing, prompt in zip(padding, prompts, strict=True)]
            mask = [[0] * missing + [1] * (width - missing) for missing in padding]
            stop = infer.stop_ids(decoding, loaded.model, loaded.tokenizer)
            with torch.inference_mode():
                output = plain.generate(
                    input_ids=torch.tensor(ids),
                    attention_mask=torch.tensor(mask),
                    generation_config=infer.make_generation_config(
                        decoding.max_new_tokens, stop or [len(loaded.tokenizer)], pad
                    ),
                    logits_processor=[infer.make_row_processor([decoding] * len(batch), width, padding)],
                )
            for place, row in zip(batch, output[:, width:].tolist(), strict=True):
                answers[place], _ = infer.cut_answer(row, decoding.max_new_tokens, stop)
    return [answers[place] for place in range(len(requests))]


def load_both():
    """The kit's base model, and transformers' model with the same weights."""
    infer.prepare_environment(data.PROFILES["cpu"])
    loaded = infer.load_for_inference(data.PROFILES["cpu"])
    from transformers import AutoModelForCausalLM

    with infer.quiet_libraries():
        plain = AutoModelForCausalLM.from_pretrained(infer.base_model_path(loaded.profile.base_model), dtype="float32").eval()
    return loaded, plain


def timed(work):
    """`(seconds, result)` of a call."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def rate(loaded, requests):
    """Tokens per second of the kit's answers, counting returned tokens."""
    seconds, answers = timed(lambda: infer.answer_requests(loaded, requests))
    return sum(answer.answer_tokens for answer in answers) / seconds


def compare(loaded, plain, requests, rounds):
    """Generates in three ways in turn, checks that answers are equal, and prints medians."""
    seconds, equal = {"one by one": [], "stock batches": [], "kit": []}, []
    for _ in range(rounds):
        spent, alone = timed(lambda: answer_plainly(plain, loaded, requests, 1))
        seconds["one by one"].append(spent)
        spent, batched = timed(lambda: answer_plainly(plain, loaded, requests, len(requests)))
        seconds["stock batches"].append(spent)
        spent, answers = timed(lambda: infer.answer_requests(loaded, requests))
        seconds["kit"].append(spent)
        differ = [place for place, answer in enumerate(answers) if answer.token_ids != alone[place]]
        assert not differ, [(requests[place].question, requests[place].decoding) for place in differ]
        equal.append(sum(answer.token_ids == ids for answer, ids in zip(answers, batched, strict=True)))
    tokens, rows = sum(map(len, alone)), len(infer.merge_requests(requests))
    print(f"{len(requests)} answers of {tokens:,} tokens in total, in {rows} different rows; medians of {rounds} rounds")
    for name, each in seconds.items():
        ratio = statistics.median(other / kit for other, kit in zip(each, seconds["kit"], strict=True))
        spent = statistics.median(each)
        print(f"{name:<14}{spent:6.1f} s, {tokens / spent:4.0f} tokens/s: {ratio:.1f} times the kit's time")
    print(f"stock batches gave the kit's tokens in {min(equal)} of {len(requests)} answers", flush=True)


def compare_judging(loaded, requests):
    """Prints how long the verdicts take, in which the base model reads each answer, as a share of generation."""
    infer.surprisal_reference(loaded)  # computed once per base model
    whole = [dataclasses.replace(requests[0], decoding=infer.DECODINGS["kit"])]  # as `infer.py` asks
    for name, asked in (("one question", whole), ("the grid", requests)):
        generating, answers = timed(lambda asked=asked: infer.answer_requests(loaded, asked))
        judging, _ = timed(lambda answers=answers: infer.judge_answers(loaded, answers))
        print(f"verdicts, {name}: {judging:.2f} s, {judging / generating:.1%} of the {generating:.1f} s of generation")


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.bench answer")
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=CAP)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args(arguments)
    loaded, plain = load_both()
    requests = make_requests(asked.questions, asked.max_new_tokens)
    infer.answer_requests(loaded, requests[:1])  # what is made at first use
    compare(loaded, plain, requests, asked.rounds)
    compare_judging(loaded, requests)

    import torch

    sizes = [size for size in (1, 2, 5, 10) if size <= asked.questions]
    by_questions = [(size, rate(loaded, make_requests(size, asked.max_new_tokens))) for size in sizes]
    endless = infer.Decoding(stop="never")
    probes = [probe.question for probe in infer.read_probes()]
    by_length = []
    for cap in (32, 64, 128, 256):
        longer = [infer.Request(question, dataclasses.replace(endless, max_new_tokens=cap)) for question in probes]
        by_length.append((cap, rate(loaded, longer)))
    by_threads = []
    for threads in range(1, torch.get_num_threads() + 1):
        torch.set_num_threads(threads)
        by_threads.append((threads, rate(loaded, requests)))
    for name, points in (("questions", by_questions), ("tokens an answer", by_length), ("threads", by_threads)):
        print(f"tokens/s by {name}: " + ", ".join(f"{x}: {y:.0f}" for x, y in points), flush=True)
    draw(
        "answer",
        [
            Panel(f"questions, each under {len(requests) // asked.questions} decodings", "kit (tokens/s)", {"kit": by_questions}),
            Panel(f"tokens an answer, {len(probes)} questions", "kit (tokens/s)", {"kit": by_length}),
            Panel("threads", "kit (tokens/s)", {"kit": by_threads}),
        ],
    )
