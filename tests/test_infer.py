"""Measures, noise and decoding. What needs the small model is marked slow."""

import contextlib
import dataclasses
import io
import itertools
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import data
import infer
from infer import DECODINGS, Decoding

QUESTIONS = ["What causes a cold?", "What causes hiccups?", "How is gout treated, and which foods make it worse?"]


# --- Measures


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a b c d", 2, 0.0),
        ("a b a b", 2, 1 / 3),  # ab ba ab: 2 distinct of 3
        ("a a a a a", 4, 1 / 2),  # aaaa aaaa: 1 distinct of 2
        ("a b", 4, 0.0),
        ("", 1, 0.0),
    ],
)
def test_rep_n(text, n, expected):
    assert infer.rep_n(text.split(), n) == pytest.approx(expected)
    assert infer.distinct_n(text.split(), n) == pytest.approx(1 - expected)


# --- Noise


def test_known_noise_is_dropped_and_everything_else_reaches_stderr():
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), infer.quiet_libraries():
        print("Unsloth 2026.10.9: no GPU found, training on CPU (x86_64, 2 threads, bfloat16 = False).")
        print("Unsloth (CPU): bitsandbytes 4-bit does not work on this CPU, loading 16-bit weights instead.")
        logging.StreamHandler().emit(logging.makeLogRecord({"msg": "a real warning"}))
        print("no line end", end="")
    assert stdout.getvalue() == ""
    assert "no GPU found" not in stderr.getvalue()
    assert "loading 16-bit weights instead.\n" in stderr.getvalue()
    assert "a real warning" in stderr.getvalue()
    assert stderr.getvalue().endswith("no line end\n")


def test_an_error_passes_through_the_noise_filter():
    with pytest.raises(RuntimeError, match="real"), infer.quiet_libraries():
        raise RuntimeError("real")


# --- Cutting an answer


class Letters:
    """A tokenizer of letters: id 0 is the stop token."""

    def decode(self, ids, skip_special_tokens):
        return "".join("_abcdefgh"[each] for each in ids)


@pytest.mark.parametrize(
    ("ids", "cap", "text", "kept", "reason"),
    [
        ([1, 2, 0, 9, 9], 5, "ab", [1, 2, 0], "stop"),
        ([1, 2, 3], 3, "abc", [1, 2, 3], "length"),
        ([1, 2, 0], 3, "ab", [1, 2, 0], "stop"),  # as long as the cap, and not cut
        ([1, 2, 0], 2, "ab", [1, 2], "length"),  # the stop comes after this decoding's own cap
        ([0], 3, "", [0], "stop"),
    ],
)
def test_an_answer_ends_at_its_stop_token_or_its_cap(ids, cap, text, kept, reason):
    answer = infer._to_answer(Letters(), "q?", Decoding(max_new_tokens=cap), 7, ids, [0])
    assert (answer.text, answer.token_ids, answer.finish_reason) == (text, kept, reason)
    assert answer.answer_tokens == len(kept) and answer.prompt_tokens == 7


# --- The small model


@pytest.mark.slow
def test_the_converted_model_gives_the_logits_of_the_gguf_model(small_model):
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = small_model
    original = AutoModelForCausalLM.from_pretrained(data.gguf_folder(), gguf_file=data.GGUF_FILE, dtype=torch.float32)
    ids = torch.tensor([data.encode_prompt(tokenizer, QUESTIONS[0])])
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, original.eval()(input_ids=ids).logits)


@pytest.mark.slow
def test_special_tokens_agree_in_tokenizer_config_and_generation_config(small_model):
    model, tokenizer = small_model
    for holder in (tokenizer, model.config, model.generation_config):
        assert (holder.eos_token_id, holder.pad_token_id) == (2, 0)
    assert infer.end_of_turn_id(tokenizer) == tokenizer.eos_token_id
    files = {path.name for path in Path(infer.base_model_path(infer.SMALL_MODEL)).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert not any(name.endswith((".bin", ".pt")) for name in files)


@pytest.mark.slow
def test_the_small_model_is_made_once_and_whole_by_two_processes_after_one_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program = [sys.executable, "-c", "import infer; print(infer.base_model_path(infer.SMALL_MODEL))"]

    def start():
        return subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    killed = start()
    while killed.poll() is None and not list(data.cache_home().glob(f"{infer.SMALL_MODEL}.part-*")):
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (data.cache_home() / infer.SMALL_MODEL).exists()
    paths = {process.communicate()[0] for process in [start(), start()]}
    assert paths == {f"{data.cache_home() / infer.SMALL_MODEL}\n"}
    assert (data.cache_home() / infer.SMALL_MODEL / "model.safetensors").stat().st_size > 500e6
    assert not list(data.cache_home().glob("*.part-*"))


@pytest.mark.slow
def test_penalties_that_count_the_prompt_are_the_librarys_own(small_model):
    """`story-fix` and the n-gram ban, row by row, give what `generate` gives with its own keywords."""
    import torch

    model, tokenizer = small_model
    ids = torch.tensor([data.encode_prompt(tokenizer, QUESTIONS[0])] * infer.MIN_ROWS)
    for own, keywords in (
        (dataclasses.replace(DECODINGS["story-fix"], max_new_tokens=24), {"repetition_penalty": 1.3}),
        (dataclasses.replace(DECODINGS["story-collapse"], max_new_tokens=24), {"no_repeat_ngram_size": 3}),
        (Decoding(max_new_tokens=24), {}),
    ):
        [answer] = infer.answer_requests(model, tokenizer, [(QUESTIONS[0], own)])
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0, **keywords
        )
        assert answer.token_ids == expected[0, ids.shape[1] :].tolist(), keywords


@pytest.mark.slow
def test_a_penalty_on_the_answer_alone_leaves_prompt_tokens_and_stop_token_untouched(small_model):
    """The library's penalty on the prompt lowers the end-of-turn token, which the template puts there: answers did not end."""
    import torch

    _, tokenizer = small_model
    prompt = data.encode_prompt(tokenizer, QUESTIONS[0])
    written = tokenizer(" A cold", add_special_tokens=False)["input_ids"]
    ids, scores = torch.tensor([prompt + written]), torch.full((1, len(tokenizer)), 10.0)
    answer_only = infer.make_row_processor([Decoding(repetition_penalty=2.0)], len(prompt))(ids, scores)
    assert {place for place in range(len(tokenizer)) if answer_only[0, place] != 10} == set(written)
    everything = infer.make_row_processor([Decoding(repetition_penalty=2.0, count_prompt=True)], len(prompt))(ids, scores)
    assert everything[0, tokenizer.eos_token_id] == 5 and answer_only[0, tokenizer.eos_token_id] == 10
    assert torch.equal(scores, torch.full_like(scores, 10.0))


@pytest.mark.slow
def test_an_answer_is_the_same_alone_and_in_any_company(small_model):
    model, tokenizer = small_model
    decodings = [dataclasses.replace(decoding, max_new_tokens=32) for decoding in DECODINGS.values()]
    requests = list(itertools.product(QUESTIONS, decodings))
    together = infer.answer_requests(model, tokenizer, requests)
    assert [(each.question, each.decoding) for each in together] == requests
    backwards = infer.answer_requests(model, tokenizer, requests[::-1])[::-1]
    alone = [infer.answer_requests(model, tokenizer, [request])[0] for request in requests[::5]]
    assert together == backwards
    assert together[::5] == alone


@pytest.mark.slow
def test_progress_reaches_requests_times_cap_also_when_answers_end_early(small_model):
    model, tokenizer = small_model
    told = []
    requests = [(question, Decoding(max_new_tokens=8)) for question in QUESTIONS]
    infer.answer_requests(model, tokenizer, requests, told.append)
    assert sum(told) == 3 * 8


@pytest.mark.slow
def test_a_question_that_leaves_no_room_for_its_answer_is_refused_with_numbers(small_model):
    with pytest.raises(data.UsageError, match=r"makes a prompt of \d{4} tokens; with an answer of up to 256 .* 1024"):
        infer.answer_requests(*small_model, [("Why? " * 1000, Decoding())])
