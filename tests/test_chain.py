"""The scripts in sequence on one small adapter, as a user runs them."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call_script, hear_ctrl_c, read_lines, run_script, write_rows

import data
import infer
import train
from tests import calibrate, tiny_train

pytestmark = pytest.mark.slow

QUESTION = "What are the warning signs of a heart attack?"


def test_training_leaves_exactly_its_files(trained):
    assert trained.process.returncode == 0, trained.process.stderr
    assert {path.name for path in trained.folder.iterdir()} == {
        *("run.json", "metrics.jsonl", "samples", "curves.png", "adapter")
    }
    assert {path.name for path in (trained.folder / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "kit.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in trained.cwd.iterdir()} == {"conversational.jsonl", "encyclopedic.jsonl", "runs"}


def test_training_learns_and_prints_both_losses(trained):
    numbers = json.loads((trained.folder / "run.json").read_text())["numbers"]
    before, last = numbers["before"]["eval_loss"], numbers["last"]["eval_loss"]
    assert last < before
    assert f"loss      {before:.4f} before, {last:.4f} after\nsteps     4 of 4 in " in trained.process.stdout
    assert "python infer.py" in trained.process.stdout
    lines = read_lines(trained.folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    assert all(math.isfinite(line["grad_norm"]) for line in lines if "loss" in line)


def test_the_gate_judges_the_answers_of_every_evaluation_beside_the_loss(trained):
    lines = [line for line in read_lines(trained.folder / "metrics.jsonl") if "eval_loss" in line]
    questions = [probe.question for probe in infer.read_probes()[:2]]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert sorted(path.name for path in (trained.folder / "samples").iterdir()) == ["0.jsonl", "2.jsonl", "4.jsonl"]
    samples = {line["step"]: read_lines(trained.folder / "samples" / f"{line['step']}.jsonl") for line in lines}
    for before, line in zip([None, *lines], lines, strict=False):
        own = samples[line["step"]]
        assert [sample["question"] for sample in own] == questions and line["eval_answers"] == 2
        assert line["eval_sound"] == sum(sample["verdict"] == "sound" for sample in own)
        assert line["eval_ended"] == sum(sample["finish_reason"] == "stop" for sample in own)
        assert line["eval_points"] == sum(len(sample["facts"]["named"]) for sample in own)
        assert 0 < line["eval_rouge_l"] < 0.5
        assert train.describe_evaluation(line, before) in trained.process.stderr
    # What is judged is what is written: the same findings come out of the text again.
    for sample in (sample for own in samples.values() for sample in own):
        judged = infer.judge(sample["text"], sample["question"], sample["finish_reason"])
        assert [each.name for each in judged.findings] == [
            each["name"] for each in sample["findings"] if each["name"] != "surprisal"
        ]
    reference = json.loads((trained.folder / "adapter" / "kit.json").read_text())["surprisal_reference"]
    # As `infer.py` computes it, whoever needed it first: in training, the base model has another precision.
    assert reference == pytest.approx(json.loads(calibrate.SURPRISALS.read_text())["reference"], rel=0.02)
    numbers = json.loads((trained.folder / "run.json").read_text())["numbers"]
    assert (numbers["before"], numbers["chosen"], numbers["last"]) == (lines[0], lines[2], lines[2])
    best = {name: max(lines[1:], key=lambda line: (line[key], -line["step"]))["step"] for name, key in train.METRICS.items()}
    best["eval_loss"] = 4
    assert numbers["selected"] == best
    choices = ", ".join(f"{name} step {best[name]}" for name in ("answers", "eval_loss", "rouge_l"))
    assert trained.process.stdout.endswith(f"selected  step 4 by eval_loss; {choices}\n")


def test_only_lora_tensors_are_saved_as_many_bytes_as_planned_and_they_have_moved(trained):
    from safetensors import safe_open

    weights = trained.folder / "adapter" / "adapter_model.safetensors"
    assert f"{'adapter file':<30}{weights.stat().st_size:,} bytes" in trained.process.stdout
    with safe_open(weights, "pt") as tensors:
        names = list(tensors.keys())
        assert all(".lora_A." in name or ".lora_B." in name for name in names)
        # 30 layers, 7 modules, A and B. B begins at zero, so any other value was learned.
        assert len(names) == 30 * 7 * 2
        assert all(tensors.get_tensor(name).abs().max() > 0 for name in names if ".lora_B." in name)


def test_curves_are_grey(trained):
    """Lines differ without colours, so the picture is readable in black and white."""
    from matplotlib.image import imread

    pixels = imread(trained.folder / "curves.png")[..., :3]
    assert pixels.shape[0] > 500 and float((pixels.max(axis=2) - pixels.min(axis=2)).max()) == 0
    assert float(pixels.min()) < 0.1


def test_the_planned_steps_and_parameters_came_true(trained):
    numbers = json.loads((trained.folder / "run.json").read_text())["numbers"]
    assert numbers["steps"] == numbers["planned_steps"] == 4
    assert f"{'trainable parameters':<30}4,884,480\n" in trained.process.stdout
    assert 1 < numbers["peak_memory_bytes"] / data.GIB < 6


def test_the_card_tells_recipe_data_and_loss(trained):
    card = (trained.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    record = json.loads((trained.folder / "run.json").read_text())
    assert "Not medical advice" in card and "license: apache-2.0" in card and "- r: 16\n" in card
    before, chosen = record["numbers"]["before"]["eval_loss"], record["numbers"]["chosen"]["eval_loss"]
    assert f"{before:.5g} before, {chosen:.5g} at that step" in card
    assert "of step 4, selected by eval_loss" in card
    assert "- source of conversational: conversational.jsonl\n" in card
    assert f"- unsloth: {record['versions']['unsloth']}\n" in card
    everything = "".join(path.read_text() for path in (trained.folder / "adapter").glob("*.json"))
    assert str(trained.cwd) not in card and str(ROOT) not in everything and str(Path.home()) not in everything


def test_no_library_noise_reaches_the_user(trained):
    lines = trained.process.stderr.replace("\r", "\n").split("\n")
    unexpected = [
        line
        for line in lines
        if line.strip() and not line.startswith(("training:", "answers:", "step ", "  the loss improved", "preparing"))
    ]
    assert unexpected == []


def test_the_same_run_again_is_told_to_be_done_and_another_is_refused(trained):
    before = (trained.folder / "run.json").read_bytes()
    again = call_script("train.py", *trained.flags, cwd=trained.cwd)
    assert again.returncode == 0 and "already trained" in again.stdout
    other = call_script("train.py", *trained.flags, "--r", "8", cwd=trained.cwd)
    assert other.returncode == 3
    assert "r: 16 there, 8 now" in other.stderr and "remove the folder" in other.stderr
    rows = trained.cwd / "conversational.jsonl"
    whole = rows.read_text(encoding="utf-8")
    try:
        rows.write_text(whole[: whole.index("\n", len(whole) // 2) + 1], encoding="utf-8")
        edited = call_script("train.py", *trained.flags, cwd=trained.cwd)
    finally:
        rows.write_text(whole, encoding="utf-8")
    assert edited.returncode == 3 and "data_fingerprint: " in edited.stderr
    assert (trained.folder / "run.json").read_bytes() == before


def test_infer_answers_from_the_latest_adapter_with_the_answer_alone_on_stdout(trained):
    flags = ["--max-new-tokens", "24"]
    ran = run_script("infer.py", QUESTION, *flags, cwd=trained.cwd)
    assert ran.returncode == 0, ran.stderr
    shown = call_script("infer.py", QUESTION, *flags, "--json", cwd=trained.cwd)
    answer = json.loads(shown.stdout)
    assert ran.stdout == answer["text"] + "\n"
    assert answer["question"] == QUESTION and answer["finish_reason"] == "length" and len(answer["token_ids"]) == 24
    told = ran.stderr.splitlines()
    assert "adapter" in told[0] and told[-1].startswith("Not medical advice")
    assert told[1] in ("sound", "not sound") and "  cut off at 24 tokens (--max-new-tokens)" in told
    assert told[-2].startswith("  points ") and told[-2].endswith("by the probe's lists of phrases")
    assert answer["sound"] == (answer["verdict"] == "sound") == (answer["score"] < 1) == (not answer["findings"])


def test_the_decoding_travels_with_the_adapter(trained, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained.folder / "adapter", adapter)
    record = json.loads((adapter / "kit.json").read_text())
    assert record["decoding"] == dataclasses.asdict(infer.DECODINGS["kit"])
    record["decoding"] |= {"max_new_tokens": 5, "repetition_penalty": 1.5}
    (adapter / "kit.json").write_text(json.dumps(record))
    ran = call_script("infer.py", QUESTION, "--adapter", adapter, "--json", cwd=tmp_path)
    assert len(json.loads(ran.stdout)["token_ids"]) == 5
    assert "max_new_tokens=5, repetition_penalty=1.5" in ran.stderr


def test_verify_finds_the_same_bytes_in_fresh_processes_and_in_company(trained):
    ran = call_script("infer.py", QUESTION, "--verify", "--max-new-tokens", "8", cwd=trained.cwd)
    assert ran.returncode == 0, ran.stderr
    *lines, verdict = ran.stdout.splitlines()
    assert verdict == "the same bytes"
    assert [line.split("  ")[1] for line in lines] == ["a new process", "another new process", "in a batch", "alone"]
    assert len({line.split()[0] for line in lines}) == 1


def test_a_file_of_questions_is_gone_on_with_where_it_was_cut(trained, tmp_path):
    questions = ["What is a stye?", "What is croup?", "What is a stye?", "I cough. " * 400, "How long does a cold last?"]
    (tmp_path / "q.csv").write_text("ID,question\n" + "".join(f"{n},{each}\n" for n, each in enumerate(questions)))
    flags = ["infer.py", "--questions", tmp_path / "q.csv", "--max-new-tokens", "8"]
    first = call_script(*flags, cwd=trained.cwd)
    assert first.returncode == 1 and "5 rows now, 0 before" in first.stderr and first.stdout == ""
    assert "q.csv:5 is skipped: The question" in first.stderr and "1 of 5 questions were skipped" in first.stderr
    output = tmp_path / "q.answers.jsonl"
    records = read_lines(output)
    assert [record["ID"] for record in records] == list("01234")
    assert [record["question"] for record in records] == [each.strip() for each in questions]
    assert ["error" in record for record in records] == [False, False, False, True, False]
    assert records[0]["sha256"] == records[2]["sha256"] != records[1]["sha256"]
    whole = output.read_text()
    output.write_text(whole[: whole.index("\n") + 1])  # killed after the first line
    again = call_script(*flags, cwd=trained.cwd)
    assert "4 rows now, 1 before" in again.stderr and "sound and ended: 0 of 4" in again.stderr
    kept = [{**record, "seconds": 0} for record in read_lines(output)]
    assert kept == [{**record, "seconds": 0} for record in records]


def test_questions_come_one_a_line_from_a_pipe(trained):
    ran = call_script("infer.py", "-", "--base", "--max-new-tokens", "6", "--json", cwd=trained.cwd, stdin="\ufeffOne?\n\nTwo?\n")
    assert [json.loads(line)["question"] for line in ran.stdout.splitlines()] == ["One?", "Two?"]


def test_compare_shows_base_and_adapter(trained):
    ran = call_script("infer.py", QUESTION, "--compare", "models", "--max-new-tokens", "6", "--json", cwd=trained.cwd)
    base, adapter = map(json.loads, ran.stdout.splitlines())
    assert (base["name"], base["adapter"]) == ("base", None)
    assert adapter["name"] == "adapter" and len(adapter["adapter"]) == 64
    [alone] = map(
        json.loads,
        call_script("infer.py", QUESTION, "--base", "--max-new-tokens", "6", "--json", cwd=trained.cwd).stdout.splitlines(),
    )
    assert alone["token_ids"] == base["token_ids"]
    shown = call_script("infer.py", QUESTION, "--compare", "models", "--max-new-tokens", "6", cwd=trained.cwd)
    assert re.search("(?s)base: 6 tokens.*adapter: 6 tokens", shown.stdout) and base["text"].split()[0] in shown.stdout


def test_a_chat_on_a_terminal(trained):
    """In a real terminal: editing a question, an answer, Ctrl-C during another, and /quit."""
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, str(ROOT / "infer.py"), "--max-new-tokens", "6"]
    terminal = {"stdin": follower, "stdout": follower, "stderr": follower}
    process = subprocess.Popen(command, cwd=trained.cwd, preexec_fn=hear_ctrl_c, **terminal)
    os.close(follower)
    os.write(leader, b"What is a stye?\nAnd croup?\n/decoding plain\nWhat else is there to say of it?\n")
    shown = b""
    stopped = False
    with contextlib.suppress(OSError):  # the terminal is gone when the process is
        while piece := os.read(leader, 4096):
            shown += piece
            last_question = shown.partition(b"Decoding plain.")[2]
            its_answer = last_question.partition(b"to say of it?")[2]
            if len(its_answer.strip()) > 10 and not stopped:
                process.send_signal(signal.SIGINT)
                os.write(leader, b"/quit\n")
                stopped = True
    assert process.wait() == 0
    text = shown.decode()
    assert "Type a question, or /decoding NAME" in text
    assert text.count("cut off at 6 tokens") == 2 and "Traceback" not in text
    assert "Stopped. This answer is not part of the conversation." in text


def test_an_adapter_of_another_prompt_is_refused(trained, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained.folder / "adapter", adapter)
    record = json.loads((adapter / "kit.json").read_text())
    (adapter / "kit.json").write_text(json.dumps(record | {"prompt_fingerprint": "0" * 12}))
    ran = call_script("infer.py", QUESTION, "--adapter", adapter, cwd=tmp_path)
    assert ran.returncode == 2
    assert "trained with the prompt 000000000000" in ran.stderr and "Traceback" not in ran.stderr


def test_rows_of_ones_own_are_trained_alone_and_asked_under_their_system_prompt(tmp_path, monkeypatch):
    monkeypatch.setitem(data.PROFILES, "cpu", tiny_train.PROFILE)
    system = "You are the telephone service of an animal clinic. Answer in one sentence."
    turns = ("My dog coughs.", "Since when?", "Since Sunday.", "Please bring her in today.")
    roles = ("user", "assistant") * 2
    records = [
        {"messages": [{"role": "system", "content": system}]
         + [{"role": role, "content": f"{text} ({n})"} for role, text in zip(roles, turns, strict=True)]}
        for n in range(20)
    ]
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "null\n")
    points = [{"name": "rest", "phrases": ["rest"]}, {"name": "vet", "phrases": ["vet", "clinic"]}]
    probes = [{"question": "My cat sneezes."}, {"question": "My dog limps.", "points": points}]
    write_rows(tmp_path / "mine.jsonl", probes)
    own = ["--rows", "my rows.jsonl", "--probes", "mine.jsonl"]
    flags = [*own, "--max-steps", "1", "--profile", "cpu"]
    trained = call_script("train.py", *flags, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs" / "train" / "cpu-my-rows-all-linear"
    record = json.loads((run / "run.json").read_text())
    assert record["system_prompt"] == system and record["recipe"]["mix"] == "rows"
    assert (record["numbers"]["train_rows"], record["numbers"]["eval_rows"]) == (18, 2)
    assert re.search(r"(?m)^formats +messages: 20 rows, 40 answers$", trained.stdout)
    assert re.search(r"(?m)^read +21\ndropped +1\nheld out +2\n", trained.stdout)
    samples = read_lines(run / "samples" / "1.jsonl")
    assert [each["question"] for each in samples] == [probe["question"] for probe in probes]
    assert record["numbers"]["chosen"]["eval_max_points"] == 2
    assert re.search(r"dropped +1 +unreadable record +21\n", trained.stdout)
    card = (run / "adapter" / "README.md").read_text()
    assert "my rows.jsonl" in card and system in card
    asked = call_script("infer.py", "My cat sneezes.", "--max-new-tokens", "4", "--json", cwd=tmp_path)
    assert json.loads(asked.stdout)["system_prompt"] == system
    other = call_script(
        "infer.py", "My cat sneezes.", "--max-new-tokens", "4", "--json", "--system-prompt", "Be brief.", cwd=tmp_path
    )
    assert json.loads(other.stdout)["system_prompt"] == "Be brief."
    assert json.loads(asked.stdout)["prompt_tokens"] > json.loads(other.stdout)["prompt_tokens"]
    plan = call_script("ablate.py", *own, "--profile", "cpu", "--dry-run", cwd=tmp_path)
    assert plan.returncode == 0 and "runs/ablate/story-my-rows-mine" in plan.stdout
    lines = [line for line in plan.stdout.splitlines() if line.startswith("python train.py")]
    names = [line.rpartition(" --name=")[2] for line in lines]
    assert names == ["week3", "week4", "fixed", "kit", "week4-1-epoch", "week4-all-linear", "week4-wide-attention"]
    assert all("'--rows=my rows.jsonl'" in line and "--mix" not in line for line in lines)
    assert plan.stderr == ""
