"""A small Llama, a few rows, and the command that trains on them through Unsloth's GPU code."""

import json
import shlex
import subprocess
import sys
import tempfile

from conftest import ENVIRONMENT, ROOT, load_llama_tokenizer, write_rows

# Special tokens of Llama 3.2 behind so many of its ordinary ones: its loss over the whole vocabulary takes minutes here.
NUM_ORDINARY_TOKENS = 8000


def start_module(*arguments, cwd, twice=()):
    """The started process; what it writes goes to files, which it never has to wait for. `twice`: flags of a first time."""
    files = {name: tempfile.TemporaryFile("w+", encoding="utf-8") for name in ("stdout", "stderr")}  # noqa: SIM115
    command = [sys.executable, "-m", *map(str, arguments)]
    if twice:
        command = ["sh", "-c", f'"$@" {shlex.join(twice)} && exec "$@"', "sh", *command]
    # One core of the interpreter's; more threads would only spin beside those of other tests.
    env = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=cwd, env=env, **files)
    return process, files


def finish(started):
    """The finished process with its output."""
    process, files = started
    process.wait()
    for file in files.values():
        file.seek(0)
    return subprocess.CompletedProcess(process.args, process.returncode, *(file.read() for file in files.values()))


def cut_vocabulary(tokenizer):
    """Llama 3.2's tokenizer with its first ordinary tokens only, and all its special ones right behind them."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = {token: number for token, number in content["model"]["vocab"].items() if number < NUM_ORDINARY_TOKENS}
    content["model"]["vocab"] = vocabulary
    content["model"]["merges"] = [
        [left, right] for left, right in content["model"]["merges"] if {left, right, left + right} <= vocabulary.keys()
    ]
    for place, token in enumerate(content["added_tokens"]):
        token["id"] = NUM_ORDINARY_TOKENS + place
    content["post_processor"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
    )


def make_workplace(cwd):
    """Fills the folder with a Llama of two narrow layers in `base`, and a few short rows: a token costs milliseconds here."""
    # First, for it imports Unsloth, which wants to come before transformers.
    tokenizer = cut_vocabulary(load_llama_tokenizer())
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).half()
    model.generation_config.eos_token_id = stops
    model.save_pretrained(cwd / "base")
    tokenizer.save_pretrained(cwd / "base")
    for source in ("conversational", "encyclopedic"):
        answer = "It is the number {}, and it is no other. " + "It stays so. "
        rows = [{"question": f"What is {source} {n}?", "answer": answer.format(n) * (1 + n % 2)} for n in range(10)]
        write_rows(cwd / f"{source}.jsonl", rows)


def start_training(backend, cwd, num_probes, twice=()):
    """`train.py` with the t4 values: two steps of two passes, two rows a pass, and three evaluations."""
    flags = ["--name", backend, "--max-steps", "2", "--num-probes", str(num_probes), "--per-device-train-batch-size", "2"]
    rows = ["--conversational", "conversational.jsonl", "--encyclopedic", "encyclopedic.jsonl"]
    return start_module("tests.gpu_path", backend, cwd / "base", "train", *flags, *rows, cwd=cwd, twice=twice)
