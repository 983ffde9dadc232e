"""How soon a script says something: help, plans, a table made again from records, and the first token of an answer.

    python -m tests.bench start ADAPTER STUDY [--rounds N]

ADAPTER is an adapter folder that `train.py` left, STUDY a folder of `ablate.py` (runs/ablate/NAME). The first token is timed
from the start of the process to the first byte on stdout, of `infer.py` and of a script that imports transformers and PEFT,
loads the same weights in float32 and generates: the least that anyone runs. Both print one token, the same one, which is
checked. By turns; medians. The picture is docs/bench-start.png.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import data
import infer
from tests.bench import draw_bars

ROOT = Path(infer.__file__).parent
QUESTION = "What are the warning signs of a heart attack?"

BARE = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
output = model.generate(**ids, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(output[0, ids["input_ids"].shape[1]:]).strip(), flush=True)
"""


def first_byte(command):
    """`(seconds, output)` of a process until its first byte on stdout, and all that it printed there."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        output = (first + process.stdout.read()).decode()
    assert process.returncode == 0, command
    return seconds, output


def to_the_end(command, cwd):
    """Seconds of a process from start to end."""
    started = time.perf_counter()
    subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tests.bench start")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("study", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(arguments)
    python = [sys.executable]
    lines = {f"{name} --help": [str(ROOT / name), "--help"] for name in ("data.py", "infer.py", "train.py", "ablate.py")}
    lines |= {f"{name} --dry-run": [str(ROOT / name), "--dry-run"] for name in ("train.py", "ablate.py")}
    lines["ablate.py --table"] = [str(ROOT / "ablate.py"), "--table", "--name", asked.study.name]
    study_home = asked.study.resolve().parents[2]
    medians = {}
    for name, line in lines.items():
        to_the_end(python + line, study_home)  # which brings the files into memory
        medians[name] = statistics.median(to_the_end(python + line, study_home) for _ in range(asked.rounds))
        print(f"{name:<22}{medians[name]:6.2f} s", flush=True)
    tokenizer = data.load_tokenizer(data.PROFILES["cpu"])
    prompt = tokenizer.decode(data.encode_prompt(tokenizer, QUESTION))
    bare = [*python, "-c", BARE, infer.base_model_path(data.SMALL_MODEL), str(asked.adapter), prompt]
    kit = [*python, str(ROOT / "infer.py"), QUESTION, "--adapter", str(asked.adapter), "--max-new-tokens", "1"]
    rounds = [(first_byte(bare), first_byte(kit)) for _ in range(asked.rounds)]
    assert len({output.strip() for each in rounds for _, output in each}) == 1, rounds
    plain, own = (statistics.median(each[place][0] for each in rounds) for place in (0, 1))
    ratio = statistics.median(kit_run[0] / bare_run[0] for bare_run, kit_run in rounds)
    print(f"first token, bare     {plain:6.2f} s\nfirst token, infer.py {own:6.2f} s: {ratio:.2f} times the bare script's")
    draw_bars("start", "s, median", medians | {"first token, bare script": plain, "first token, infer.py": own})
