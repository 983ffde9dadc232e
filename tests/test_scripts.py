"""The four scripts as programs: import order, start-up time, rejected input."""

import ast
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, call_script, run_script

import data

CHAIN = ["data", "infer", "train", "ablate"]
HEAVY = {"torch", "unsloth", "transformers", "trl", "peft", "datasets", "bitsandbytes", "xformers", "matplotlib", "numpy"}
HEAVY |= {"pandas", "pyarrow", "ftfy"}


@pytest.mark.parametrize("script", CHAIN)
def test_a_script_imports_only_what_stands_to_its_left(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & set(CHAIN) <= set(CHAIN[: CHAIN.index(script)])


@pytest.mark.parametrize("script", CHAIN)
def test_help_and_import_load_nothing_heavy(script):
    program = f"""
import contextlib, io, json, runpy, sys
out = io.StringIO()
sys.argv = ["{script}.py", "--help"]
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    runpy.run_path("{script}.py", run_name="__main__")
print(json.dumps([out.getvalue(), sorted({{name.split(".")[0] for name in sys.modules}})]))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    shown, modules = json.loads(ran.stdout)
    assert not HEAVY & set(modules)
    assert f"python {script}.py" in shown and "--" in shown


@pytest.mark.parametrize("script", CHAIN)
def test_help_into_a_pipe_that_is_closed_says_nothing(script):
    command = f"{sys.executable} {script}.py --help | true; exec 2>&-; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.stderr == "" and ran.returncode in (0, 128 + 13)


LONG = "a" * 101

# Of each script: what is given, and what the message has to say.
REFUSED = {
    # data.py, and what train.py has from it
    "no mix": (["train.py", "--mix", "week5"], "week4"),
    "no profile": (["data.py", "--profile", "tpu"], "t4"),
    "no flag": (["data.py", "--row", "5"], "--row"),
    "no number": (["data.py", "--seed", "one"], "one"),
    "no cleaning": (["data.py", "--clean", "all"], "wikidoc"),
    "seed": (["train.py", "--seed", "-1"], "--seed -1: expected a whole number"),
    "large seed": (["data.py", "--seed", "4294967296"], "from 0 to 4294967295"),
    "show": (["data.py", "--show", "-1"], "--show -1"),
    "show as JSON": (["data.py", "--show", "1", "--json"], "not with --json"),
    "no rows": (["train.py", "--num-rows", "0"], "--num-rows 0: expected 1 or more"),
    "rows and a mix": (["train.py", "--rows", "q.jsonl", "--mix", "week4"], "--rows replaces the mix"),
    "empty system prompt": (["data.py", "--system-prompt", " "], "--system-prompt is empty"),
    "no source": (
        ["data.py", "--profile", "cpu", "--conversational", "rows.txt"],
        "'rows.txt' does not exist",
    ),
    "empty source": (["data.py", "--profile", "cpu", "--conversational", ""], "'' has an unsupported file type"),
    "no file": (["train.py", "--profile", "cpu", "--rows", "none.jsonl"], "'none.jsonl' does not exist"),
    "no file in a folder": (["data.py", "--profile", "cpu", "--rows", "data/none.jsonl"], "does not exist"),
    "folder of rows": (["data.py", "--profile", "cpu", "--encyclopedic", "folder.jsonl"], "folder.jsonl: cannot be read"),
    "empty rows": (["data.py", "--profile", "cpu", "--encyclopedic", "empty.jsonl"], "empty.jsonl: contains no rows"),
    "cut rows": (["train.py", "--profile", "cpu", "--rows", "cut.jsonl"], "unreadable record: 2 rows, such as cut.jsonl:2"),
    "other columns": (["data.py", "--profile", "cpu", "--rows", "columns.jsonl"], "found a\\x1b[31mb"),
    "columns that are not there": (
        ["data.py", "--profile", "cpu", "--rows", "columns.jsonl", "--question-column", "q", "--answer-column", "a"],
        "--question-column and --answer-column",
    ),
    "a column twice": (["train.py", "--profile", "cpu", "--rows", "twice.csv"], "the column 'answer' occurs twice"),
    "rows in Latin-1": (["data.py", "--profile", "cpu", "--conversational", "latin.csv"], "latin.csv:2: not UTF-8 text"),
    "no Parquet": (["data.py", "--profile", "cpu", "--conversational", "no.parquet"], "no.parquet: cannot be read"),
    "an object of rows": (["data.py", "--profile", "cpu", "--rows", "object.json"], "found none"),
    "rules that leave nothing": (
        ["data.py", "--profile", "cpu", "--rows", "short.jsonl", "--clean", "wikidoc"],
        "--clean none turns rules off",
    ),
    "hub id offline": (["data.py", "--profile", "cpu", "--encyclopedic", "nobody/nothing"], "for a hub id, the network connection"),
    "rows of the hub offline": (["train.py", "--profile", "cpu", "--rows", "nobody/nothing@main"], "cannot be read"),
    "plan of no file": (
        ["train.py", "--profile", "t4", "--dry-run", "--conversational", "none.jsonl", "--mix", "chatdoctor"],
        "does not exist",
    ),
    "plan of rows that are lost": (
        ["train.py", "--profile", "t4", "--dry-run", "--conversational", "columns.jsonl", "--mix", "chatdoctor"],
        "expected a question and an answer",
    ),
    # train.py
    "epochs": (["train.py", "--epochs", "0"], "--epochs 0.0: expected a number above 0"),
    "endless epochs": (["train.py", "--epochs", "inf"], "--epochs inf: expected a number above 0"),
    "learning rate": (["train.py", "--learning-rate", "nan"], "--learning-rate nan"),
    "steps": (["train.py", "--max-steps", "0"], "--max-steps 0: expected a number above 0"),
    "rank": (["train.py", "--r", "2000"], "--r 2000: expected 1 to 1024"),
    "alpha": (["train.py", "--lora-alpha", "-4"], "--lora-alpha -4"),
    "batch": (["train.py", "--per-device-train-batch-size", "5"], "invalid choice '5' for argument"),
    "pad": (["train.py", "--pad", "eos"], "native"),
    "best": (["train.py", "--metric-for-best-model", "loss"], "eval_loss"),
    "modules": (["train.py", "--target-modules", "lm_head"], "all-linear"),
    "all problems at once": (["train.py", "--r", "0", "--max-steps", "-1"], "--max-steps -1"),
    "hours": (["train.py", "--max-hours", "0"], "--max-hours 0.0: expected a number above 0"),
    "minutes": (["train.py", "--save-minutes", "-1"], "--save-minutes -1.0: expected 0 to 1e+06"),
    "probes of a run": (["train.py", "--num-probes", "-1"], "--num-probes -1: expected 0 to 76"),
    "evaluations": (["train.py", "--eval-every", "1"], "--eval-every 1.0: expected 0.001 to 0.999"),
    "enough of what": (["train.py", "--early-stopping-patience", "0"], "--early-stopping-patience 0: expected a number above 0"),
    "ROUGE-L of no answers": (["train.py", "--metric-for-best-model", "rouge_l", "--num-probes", "0"], "--num-probes 0: expected 1 to 76"),
    "upload without a token": (
        ["train.py", "--profile", "cpu", "--push-to-hub", "me/adapter"],
        "needs the network and a token",
    ),
    "empty name": (["train.py", "--name", ""], "--name '': expected up to 100 letters"),
    "name": (["train.py", "--name", "../elsewhere"], "letters, digits"),
    "long name": (["train.py", "--name", LONG], "up to 100 letters"),
    "output into a file": (["train.py", "--profile", "cpu", "--output-dir", "q.txt"], "q.txt"),
    # infer.py
    "no question": (["infer.py"], "stdin contains no question"),
    "empty question": (["infer.py", " "], "question is empty"),
    "question of marks": (["infer.py", "?!"], 'question is empty: "?!"'),
    "question of controls": (["infer.py", "\x1b\x07"], 'question is empty: "\\x1b\\x07"'),
    "control in a question": (["infer.py", "What is\x1b[31m croup?"], "contains \\x1b at character 8, which is not text"),
    "question that is no UTF-8": (["infer.py", b"What is \xff croup?"], "contains \\udcff at character 9, which is not text"),
    "question and file": (["infer.py", "q?", "--questions", "q.txt"], "Give one of the three"),
    "questions missing": (["infer.py", "--questions", "none.txt"], "none.txt cannot be read"),
    "questions that are none": (["infer.py", "--questions", "dots.txt"], 'dots.txt:1: The question is empty: "..."'),
    "empty system prompt of a question": (["infer.py", "q?", "--system-prompt", ""], "--system-prompt is empty"),
    "no questions": (["infer.py", "--questions", "empty.txt"], "empty.txt contains no questions"),
    "questions in Latin-1": (["infer.py", "--questions", "latin.txt"], "not UTF-8 text"),
    "questions without their column": (["infer.py", "--questions", "columns.jsonl"], "columns.jsonl:1: The question is empty"),
    "questions in another file": (["infer.py", "--questions", "q.docx"], "'q.docx' has an unsupported file type"),
    "questions in a folder": (["infer.py", "--questions", "folder.txt"], "folder.txt cannot be read"),
    "verify without a question": (["infer.py", "--verify"], "--verify and --compare take one question"),
    "compare without a question": (["infer.py", "-", "--compare", "decodings"], "--verify and --compare take one question"),
    "compare models without adapter": (["infer.py", "q?", "--base", "--compare", "models"], "--base asks without an adapter"),
    "output without questions": (["infer.py", "q?", "--output", "a.jsonl"], "--output a.jsonl needs --questions"),
    "output over the questions": (["infer.py", "--questions", "q.jsonl", "--output", "./q.jsonl"], "--output q.jsonl needs --questions, and must be another file"),
    "long name of questions": (["infer.py", "--questions", "q" * 300 + ".txt"], "cannot be read (File name too long)"),
    "output nowhere": (["infer.py", "--questions", "q.txt", "--output", "no/where.jsonl"], "expected a file in an existing folder"),
    "decoding": (["infer.py", "q?", "--decoding", "best"], "story-fix"),
    "penalty": (["infer.py", "q?", "--repetition-penalty", "0"], "--repetition-penalty 0.0: expected 0.1 to 10"),
    "temperature": (["infer.py", "q?", "--temperature", "-1"], "--temperature -1.0: expected 0.01 to 100"),
    "temperature that is none": (["infer.py", "q?", "--temperature", "nan"], "--temperature nan"),
    "top-p": (["infer.py", "q?", "--top-p", "2"], "--top-p 2.0: expected 1e-09 to 1"),
    "n-grams": (["infer.py", "q?", "--no-repeat-ngram-size", "-3"], "--no-repeat-ngram-size -3: expected 0 to 1024"),
    "cap": (["infer.py", "q?", "--max-new-tokens", "0"], "--max-new-tokens 0: expected 1 to 1023"),
    "large cap": (["infer.py", "q?", "--max-new-tokens", "5000"], "--max-new-tokens 5000: expected 1 to 1023"),
    "sampling seed": (["infer.py", "q?", "--sampling-seed", "-1"], "--sampling-seed -1: expected 0 to"),
    "no GPU": (["infer.py", "q?", "--base", "--profile", "t4"], "The profile t4 needs a GPU"),
    "base and adapter": (["infer.py", "q?", "--base", "--adapter", "x"], "--base asks without an adapter"),
    "no adapter yet": (["infer.py", "q?"], "Train one: python train.py"),
    "adapter missing": (["infer.py", "q?", "--adapter", "nowhere"], "The adapter 'nowhere' is not a folder"),
    "adapter that is a file": (["infer.py", "q?", "--adapter", "q.txt"], "The adapter 'q.txt' is not a folder"),
    "empty adapter": (["infer.py", "q?", "--adapter", "folder.txt"], "adapter_model.safetensors of an adapter cannot be read (No such file"),
    "adapter in a pickle": (["infer.py", "q?", "--adapter", "pickled"], "a pickle, such as adapter_model.bin, can run code"),
    "hub adapter offline": (["infer.py", "q?", "--adapter", "nobody/nothing"], "The adapter 'nobody/nothing' is not a folder"),
    "other base model": (
        ["infer.py", "q?", "--base", "--profile", "cpu", "--base-model", "bert"],
        "bert: its config.json cannot be used (ValueError(\"{'model_type': 'bert'}\"))",
    ),
    "base model that is not there": (
        ["train.py", "--profile", "cpu", "--base-model", "none"],
        "none: its config.json cannot be used",
    ),
    "base model without sizes": (["data.py", "--profile", "cpu", "--base-model", "sizes"], "its config.json cannot be used (KeyError('num_hidden_layers'))"),
    # ablate.py
    "no records": (["ablate.py", "--table"], "'No such file or directory')). Run without --table"),
    "study name": (["ablate.py", "--name", "a/b"], "letters, digits"),
    "rows and a source of the mix": (["ablate.py", "--rows", "q.jsonl", "--encyclopedic", "q.jsonl"], "--rows replaces the mix"),
    "evaluations of a study": (["ablate.py", "--eval-every", "1"], "--eval-every 1.0: expected 0.001 to 0.999"),
    "no evaluations of a study": (["ablate.py", "--eval-every", "0"], "--eval-every 0.0: expected 0.001 to 0.999"),
    "no evaluations": (["train.py", "--eval-every", "0"], "--eval-every 0.0: expected 0.001 to 0.999"),
    "no probes": (["ablate.py", "--num-probes", "0"], "--num-probes 0: expected 1 to 76"),
    "too many probes": (["ablate.py", "--num-probes", "77"], "--num-probes 77: expected 1 to 76"),
    "no workers": (["ablate.py", "--workers", "0"], "--workers 0: expected 1 to 64"),
    "an arm of no study": (["ablate.py", "--answer", "nope"], "--answer nope: expected one of base,"),
    "no rows of a study": (["ablate.py", "--num-rows", "-9"], "--num-rows -9: expected 1 or more"),
    "shard without parts": (["ablate.py", "--shard", "1"], "--shard 1: expected I/N"),
    "shard that is not there": (["ablate.py", "--shard", "2/2"], "with I from 0 to N - 1"),
    "probes that are not there": (["ablate.py", "--probes", "none.jsonl"], "'none.jsonl' does not exist"),
    "probes without questions": (["train.py", "--profile", "cpu", "--probes", "no-probes.jsonl"], "no-probes.jsonl:1: not a probe"),
    "probes of an answer without questions": (["infer.py", "What is croup?", "--probes", "no-probes.jsonl"], "not a probe"),
    "probes of an audit": (["data.py", "--profile", "cpu", "--probes", "no-probes.jsonl"], "not a probe"),
    "blank prompt of a study": (["ablate.py", "--rows", "q.jsonl", "--system-prompt", " "], "--system-prompt is empty"),
    "source of a mix that is not there": (["ablate.py", "--profile", "cpu", "--conversational", "none.jsonl"], "'none.jsonl' does not exist"),
}


def make_bad_files(folder):
    """Creates the files that the cases above name, and a valid question."""
    for name, content in {
        "q.txt": b"What is croup?\n",
        "empty.txt": b"\n",
        "dots.txt": b"...\n",
        "latin.txt": "Was hilft gegen \xdcbelkeit?".encode("latin-1"),
        "q.docx": b"What is croup?",
        "empty.jsonl": b"",
        "no-probes.jsonl": b"{\"id\": \"a\"}\n",
        "cut.jsonl": b'{"question": "q?", "answer": "a"}\n{"question": "q\n{"',
        "columns.jsonl": b'{"a\\u001b[31mb": 1}\n',
        "twice.csv": b"question,answer,Answer\nq?,a,b\n",
        "short.jsonl": b'{"question": "q?", "answer": "a"}\n',
        "latin.csv": "question,answer\n\xdcbelkeit?,Tee\n".encode("latin-1"),
        "no.parquet": b"PAR1",
        "object.json": b"{}",
    }.items():
        (folder / name).write_bytes(content)
    for name in ("folder.txt", "folder.jsonl", "pickled", "bert", "sizes"):
        (folder / name).mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    (folder / "sizes" / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    (folder / "pickled" / "adapter_config.json").write_text("{}")
    (folder / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04.")


# The others run in this process, whose imports they share.
AS_A_PROCESS = {"no flag", "no file", "hub id offline", "rows of the hub offline", "all problems at once", "upload without a token"}
AS_A_PROCESS |= {"merge offline", "question that is no UTF-8", "hub adapter offline", "no adapter yet", "no records"}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_message_and_exit_2(case, tmp_path):
    arguments, message = REFUSED[case]
    make_bad_files(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    ran = (run_script if case in AS_A_PROCESS else call_script)(*arguments, cwd=tmp_path)
    assert ran.returncode == 2, ran.stderr
    # tyro frames its messages to the terminal's width.
    assert " ".join(message.split()) in " ".join(ran.stderr.replace("│", " ").split())
    assert "Traceback" not in ran.stderr and "\x1b" not in ran.stderr
    assert sorted(tmp_path.rglob("*")) == there


def test_ctrl_c_before_a_script_handles_signals_says_what_to_do(capfd, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["data.py"])
    with pytest.raises(SystemExit) as ended:
        data.run_command(data.DataConfig, interrupt, None)
    assert ended.value.code == 128 + signal.SIGINT
    assert capfd.readouterr().err == "\nInterrupted. Run the same command again.\n"


def test_a_gpu_that_torch_cannot_use_is_an_error_with_the_way_out(tmp_path):
    """A fake `nvidia-smi` reports a T4 that torch does not see."""
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4 (UUID: GPU-0)'\n")
    nvidia_smi.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    refused = call_script("train.py", "--dry-run", cwd=tmp_path, env=path)
    assert refused.returncode == 2
    assert "GPU 0: Tesla T4" in refused.stderr and "--profile cpu" in refused.stderr and "driver" in refused.stderr
    meant = call_script("train.py", "--dry-run", "--profile", "cpu", cwd=tmp_path, env=path)
    assert meant.returncode == 0


def test_the_t4_run_is_planned_anywhere_without_a_network(tmp_path):
    """All but what needs the rows, which are on the hub."""
    ran = run_script("train.py", "--profile", "t4", "--epochs", "2", "--dry-run", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "Rows, tokens and steps are not counted: the hub cannot be reached.\n"
    values = dict(re.findall(r"(?m)^(\S+(?: \S+)*) {2,}(.+)$", ran.stdout))
    assert values["base_model"] == "unsloth/Llama-3.2-3B-Instruct"
    assert values["load_in_4bit"] == "True"
    assert re.fullmatch(r"lavita/ChatDoctor-HealthCareMagic-100k@[0-9a-f]{40}", values["conversational"])
    assert re.fullmatch(r"medalpaca/medical_meadow_wikidoc@[0-9a-f]{40}", values["encyclopedic"])
    assert values["epochs"] == "2.0"
    assert values["trainable parameters"] == "24,313,856"
    assert values["adapter file"] == "97,307,544 bytes"
    assert values["base model"] == "3,212,749,824 parameters, 2.24 GB when loaded"
    assert values["measured"].startswith("on one H100: ")
    assert list(tmp_path.iterdir()) == []


def test_rows_of_the_hub_are_not_counted_offline(tmp_path):
    ran = call_script("train.py", "--profile", "cpu", "--rows", "owner/name", "--dry-run", cwd=tmp_path)
    assert ran.returncode == 0 and "hub cannot be reached" in ran.stderr
    assert "adapter file" in ran.stdout and not re.search(r"(?m)^rows +[\d,]+ of", ran.stdout)


def test_the_cpu_run_is_planned_from_its_rows(tmp_path):
    ran = call_script("train.py", "--profile", "cpu", "--dry-run", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "285 of 51,776 tokens" in ran.stdout and "18 of 16 rows" in ran.stdout and "estimates" not in ran.stdout
    assert list(tmp_path.iterdir()) == []
