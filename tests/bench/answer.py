"""How fast answers are written: the ablation's grid through the kit, against one `generate` call after the other.

    python -m tests.bench answer [--questions N] [--max-new-tokens N] [--rounds N]

The grid is that of `ablate.py`: probe questions under all twelve decodings, caps scaled from 256 to --max-new-tokens. The usual
loop asks transformers' own model, loaded without Unsloth, one question and one `generate` call at a time, under the same
decodings (by the kit's processors, for the library's penalty cannot leave the prompt out). Both answer in float32 in the same
process, by turns; medians are printed. That all answers are the same tokens is checked. Seconds count no loading.

Then the kit alone, once each: more questions, longer answers (none of which ends before its cap), fewer threads. The picture is
docs/bench-answer.png.
"""

import argparse
import dataclasses
import statistics
import time

import ablate
import infer
from tests.bench import Panel, draw

ROUNDS, CAP = 3, 64


def make_requests(questions, cap):
    """The grid's requests of the base model; caps of 256 and 128 become `cap` and half of it."""
    grid = ablate.make_grid(ablate.AblateConfig(profile="cpu"))
    model = grid.models[0]
    return [
        dataclasses.replace(
            request,
            decoding=dataclasses.replace(request.decoding, max_new_tokens=request.decoding.max_new_tokens * cap // 256),
        )
        for request in ablate.make_requests(model, model.decodings, grid.questions[:questions])
    ]


def answer_one_by_one(plain, loaded, requests):
    """Token ids of each request's answer, by a `generate` call of its own."""
    import torch

    answers = []
    for request in requests:
        prompt = infer.check_room(loaded, request)
        stop = infer.stop_ids(request.decoding, loaded.model, loaded.tokenizer)
        input_ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = plain.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=infer.make_generation_config(
                    request.decoding.max_new_tokens, stop, loaded.tokenizer.pad_token_id
                ),
                logits_processor=[infer.make_row_processor([request.decoding], len(prompt))],
            )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def load_both():
    """The kit's base model, and transformers' own of the same weights."""
    infer.prepare_environment("cpu", offline=True)
    loaded = infer.load_for_asking("cpu", None)
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
    """Tokens a second of the kit's answers, those that the caller is given."""
    seconds, answers = timed(lambda: infer.answer_requests(loaded, requests))
    return sum(answer.answer_tokens for answer in answers) / seconds


def compare(loaded, plain, requests, rounds):
    """Asks both ways by turns, checks that the answers are the same, and prints the medians."""
    seconds = []
    for _ in range(rounds):
        alone_seconds, alone = timed(lambda: answer_one_by_one(plain, loaded, requests))
        grid_seconds, answers = timed(lambda: infer.answer_requests(loaded, requests))
        differ = [place for place, answer in enumerate(answers) if answer.token_ids != alone[place]]
        assert not differ, [(requests[place].question, requests[place].decoding) for place in differ]
        seconds.append((alone_seconds, grid_seconds))
    one, grid = (statistics.median(each[part] for each in seconds) for part in (0, 1))
    ratio = statistics.median(alone / kit for alone, kit in seconds)
    tokens, rows = sum(map(len, alone)), len(infer.merge_requests(requests))
    print(f"{len(requests)} answers of {tokens:,} tokens in all, in {rows} different rows; medians of {rounds} rounds")
    print(f"one by one {one:6.1f} s, {tokens / one:4.0f} tokens/s")
    print(f"kit        {grid:6.1f} s, {tokens / grid:4.0f} tokens/s: {ratio:.1f} times as fast, the same answers", flush=True)


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
            Panel("questions, each under 12 decodings", "kit (tokens/s)", {"kit": by_questions}),
            Panel(f"tokens an answer, {len(probes)} questions", "kit (tokens/s)", {"kit": by_length}),
            Panel("threads", "kit (tokens/s)", {"kit": by_threads}),
        ],
    )
