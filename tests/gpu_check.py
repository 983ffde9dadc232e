"""Runs the kit on a GPU and prints what holds there, one line per result; everything goes into gpu_check.json as well.

    python -m tests.gpu_check                       all steps, in at most 8 minutes
    python -m tests.gpu_check kit typical           some of them; results of other steps in gpu_check.json are kept
    python -m tests.gpu_check --rehearse            the same steps on the CPU, with tiny models: only that they run

Steps, the most important first; each has a time limit, and one that fails does not stop the others:

    train       a complete train.py on SmolLM2, and infer.py on its adapter in two processes: the same bytes?
    resume      the same training, killed (SIGKILL) in the middle and resumed: the same bytes?
    answers     16 questions to SmolLM2 alone and in one batch: the same bytes? Answers per second of the 3B model
    kit         train.py's settings on the 3B model: tokens per second, memory, kernels of a step
    typical     transformers, PEFT and bitsandbytes, as most scripts have them: 4 passes of 4 rows, checkpointing
    tuned       the same with 16 rows in one pass, without checkpointing if that fits
    fp16        `kit` in float16, as on a T4: losses within 1% of bfloat16's?
    kit-16bit   `kit` with --no-load-in-4bit
    trl         TRL without Unsloth: 16 rows in one pass, its chunked loss, padding-free if flash-attn is installed

The 3B model has its real weights if the hub can be reached, else random ones of the same shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import data
import infer
import train
from tests.bench.train import lora_values, take_rows

ROOT = Path(__file__).resolve().parent.parent
StepName = Literal["train", "resume", "answers", "kit", "typical", "tuned", "fp16", "kit-16bit", "trl"]
# Seconds that each step may take, in the order in which they run. The first import of Unsloth on a fresh machine takes 45 s;
# `train` also loads the model once more, for the judge's reference.
LIMITS = {
    "train": 210,
    "resume": 180,
    "answers": 120,
    "kit": 100,
    "typical": 100,
    "tuned": 100,
    "fp16": 80,
    "kit-16bit": 80,
    "trl": 80,
}
QUESTION = "What are the symptoms of anaemia?"
# Steps that are trained, and those that count: in the first ones, kernels are compiled and memory is reserved.
NUM_STEPS, WARM_UP_STEPS = 8, 3
NUM_QUESTIONS, ANSWER_TOKENS = 16, 24

# What kernels are for, by their names.
KERNELS = {
    "matrix products": r"gemm|gemv|xmma|nvjet|cutlass|splitk|aten::(mm|addmm|bmm|matmul)",
    "4-bit weights to 16 bits": r"dequantize|kDequant",
    "attention": r"flash|fmha|attention",
    "Unsloth's Triton kernels": r"^_|triton",
    "optimizer": r"adam|optimizer|multi_tensor|lpnorm",
    "copies and fills": r"memcpy|memset|copy|fill",
}


@dataclass(frozen=True)
class Config:
    """Flags of this command."""

    steps: tyro.conf.Positional[tuple[StepName, ...]] = tuple(LIMITS)
    """Steps to run."""
    minutes: float = 8.0
    """Time for all of them; steps that have not begun by then are left out."""
    base_model: str | None = None
    """In place of the 3B model."""
    folder: Path = Path("runs/gpu_check")
    """Where models, runs and gpu_check.json are written."""
    rehearse: bool = False
    """Run on the CPU with tiny models. The figures mean nothing."""
    once: str | None = None
    """Set for the processes that this command starts: the step to measure."""


# --- Models --------------------------------------------------------------------------------------


def small_model():
    """The folder of SmolLM2, whose answers make sense."""
    return infer.base_model_path(data.SMALL_MODEL)


def find_large_model(config):
    """The model whose speed is measured: the profile's, or one of the same shape with random weights."""
    if not config.rehearse and data.reaches_hub():
        return data.PROFILES["t4"].base_model
    folder = config.folder.resolve() / "random"
    if not (folder / "config.json").exists():
        make_random_model(folder, data.PROFILES["t4"].architecture, tiny=config.rehearse)
    return str(folder)


def make_random_model(folder, arch, tiny):
    """Writes a Llama of this architecture with random weights, and SmolLM2's tokenizer, into `folder`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(small_model())
    sizes = dataclasses.asdict(arch)
    if tiny:
        sizes |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=131_072, rope_theta=500_000.0))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- One training, in a process of its own ---------------------------------------------------------


def make_kit_trainer(method, base_model, profile_name, folder):
    """The trainer of train.py for the method, and the number of tokens of its rows."""
    in_fp16 = method == "fp16"
    config, profile = train.resolve(
        train.TrainConfig(
            profile=profile_name,
            base_model=base_model,
            output_dir=folder,
            num_probes=0,
            max_steps=NUM_STEPS,
            load_in_4bit=method != "kit-16bit",
        )
    )
    infer.prepare_environment(profile)
    model, tokenizer = infer.load_base(profile, dtype="float16" if in_fp16 else None)
    if in_fp16:
        import unsloth

        unsloth.is_bfloat16_supported = lambda: False
    rows, held_out = take_rows(tokenizer, NUM_STEPS * train.ROWS_PER_STEP)
    longest = max(len(row["input_ids"]) for row in rows)
    with infer.quiet_libraries():
        profile = train.choose_checkpointing(profile, longest)
        model = train.add_lora(model, config, profile, longest)
        args = train.make_sft_config(config, profile, NUM_STEPS)
        args.eval_strategy, args.save_strategy, args.metric_for_best_model = "no", "no", None
        args.eval_on_start = False
        return train.make_trainer(model, tokenizer, args, rows, held_out), rows


def make_plain_trainer(method, base_model, folder):
    """transformers' Trainer, or TRL's, on PEFT's model with 4-bit weights, and its rows."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    on_gpu = torch.cuda.is_available()
    bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float16,
    )
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    data.set_special_tokens(tokenizer, base_model)
    rows, _ = take_rows(tokenizer, NUM_STEPS * train.ROWS_PER_STEP)
    model = AutoModelForCausalLM.from_pretrained(
        base_model, quantization_config=quantization, device_map={"": 0 if on_gpu else "cpu"}
    )
    checkpointing = method in ("typical", "tuned-checkpointing")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    passes = 4 if method == "typical" else 1
    settings = {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": train.ROWS_PER_STEP // passes,
        "gradient_accumulation_steps": passes,
        "gradient_checkpointing": checkpointing,
        "learning_rate": 2e-4,
        "optim": "adamw_8bit" if on_gpu else "adamw_torch",
        "bf16": bf16,
        "fp16": not bf16,
        "use_cpu": not on_gpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    train_rows = Dataset.from_list(rows)
    lora = LoraConfig(**lora_values(train.TrainConfig()))
    if method == "trl":
        from trl import SFTConfig, SFTTrainer

        # Its default loss is the chunked one.
        padding_free = importlib.util.find_spec("flash_attn") is not None
        args = SFTConfig(**settings, max_length=data.MAX_SEQ_LENGTH, padding_free=padding_free)
        trainer = SFTTrainer(model=model, processing_class=tokenizer, args=args, train_dataset=train_rows, peft_config=lora)
    else:
        trainer = Trainer(
            model=get_peft_model(model, lora),
            args=TrainingArguments(**settings),
            train_dataset=train_rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer, rows


def measure_training(config, method):
    """Tokens per second, GiB and losses of a short training; of the kit also what its kernels are."""
    profile_name = "cpu" if config.rehearse else "t4"
    folder, base_model = config.folder / method, config.base_model
    if method in ("kit", "fp16", "kit-16bit"):
        trainer, rows = make_kit_trainer(method, base_model, profile_name, folder)
    else:
        trainer, rows = make_plain_trainer(method, base_model, folder)
    import torch
    from transformers import TrainerCallback

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    ends = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            wait()
            ends.append(time.perf_counter())

        on_step_end = on_train_begin

    trainer.add_callback(Clock())
    trainer.train()
    durations = [after - before for before, after in itertools.pairwise(ends)]
    step_seconds = statistics.median(durations[WARM_UP_STEPS:])
    tokens = sum(len(row["input_ids"]) for row in rows) / NUM_STEPS
    result = {
        "tokens_per_second": tokens / step_seconds,
        "step_seconds": step_seconds,
        "first_step_seconds": durations[0],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "rows_per_pass": trainer.args.per_device_train_batch_size,
        "gradient_checkpointing": trainer.args.gradient_checkpointing,
        "dtype": "float16" if trainer.args.fp16 else "bfloat16" if trainer.args.bf16 else "float32",
    }
    if torch.cuda.is_available():
        result["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / data.GIB
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / data.GIB
    if method == "kit":
        result["profile"] = profile_step(trainer)
    return result


def profile_step(trainer):
    """Shares of a step's time on the device by kind of kernel, and the number of kernels started."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.training_step(trainer.model, dict(batch), None)
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        trainer.training_step(trainer.model, dict(batch), None)
    times, launches = Counter(), 0
    for event in profiled.key_averages():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
            launches += event.count
        if is_kernel or not on_gpu:
            seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kind = next((name for name, words in KERNELS.items() if re.search(words, event.key, re.IGNORECASE)), "other")
            times[kind] += seconds
    total = sum(times.values()) or 1
    return {"launches": launches, "shares": {name: spent / total for name, spent in times.most_common()}}


def measure_answers(config):
    """How many answers of SmolLM2 are the same alone and in a batch, and answers per second of the large model."""
    name = "cpu" if config.rehearse else "t4"
    decoding = dataclasses.replace(infer.DECODINGS["kit"], max_new_tokens=ANSWER_TOKENS)
    result = {}
    for role, base_model, num_alone in (("small", small_model(), NUM_QUESTIONS), ("large", config.base_model, 4)):
        profile = data.resolve_profile(name, base_model)
        infer.prepare_environment(profile)
        loaded = infer.load_for_inference(profile)
        requests = [infer.Request(probe.question, decoding) for probe in infer.read_probes()[:NUM_QUESTIONS]]
        infer.answer_requests(loaded, requests[:1])  # compiles kernels
        started = time.perf_counter()
        alone = [infer.answer_requests(loaded, [request])[0] for request in requests[:num_alone]]
        middle = time.perf_counter()
        together = infer.answer_requests(loaded, requests)
        ended = time.perf_counter()
        result[role] = {
            "equal": sum(a.token_ids == b.token_ids for a, b in zip(alone, together, strict=False)),
            "alone": num_alone,
            "answers_per_second_alone": num_alone / (middle - started),
            "answers_per_second_batched": len(requests) / (ended - middle),
            "tokens_per_answer": ANSWER_TOKENS,
        }
        del loaded
    return result


# --- Runs of the scripts ---------------------------------------------------------------------------


def train_command(config, name, *flags):
    """train.py on SmolLM2 and the sample rows, into a run of this name."""
    sizes = ("--max-steps", "2", "--num-probes", "1") if config.rehearse else ("--max-steps", "24", "--num-probes", "8")
    rows = [f"--{source}={data.SAMPLES / source}.jsonl" for source in ("conversational", "encyclopedic")]
    command = [sys.executable, str(ROOT / "train.py"), "--profile", "cpu" if config.rehearse else "t4"]
    if not config.rehearse:
        command += ["--base-model", small_model()]
    return [*command, *rows, "--name", name, "--output-dir", str(config.folder.resolve()), *sizes, *flags]


def run_quietly(command, limit):
    """The finished process of a command, with its output; raises RuntimeError with the end of it if it failed."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT, check=False)
    if ran.returncode:
        raise RuntimeError(f"exit code {ran.returncode}: {(ran.stderr or ran.stdout)[-1500:]}")
    return ran


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_run(folder):
    """sha256 of each file of a run that has to be the same whenever it is repeated."""
    files = [folder / "adapter" / infer.WEIGHTS, folder / "metrics.jsonl", *sorted((folder / "samples").iterdir())]
    return {str(path.relative_to(folder)): digest(path) for path in files}


def check_training(config, limit):
    """A complete training, and the same question to its adapter in two processes."""
    folder, started = config.folder / "full", time.time()
    shutil.rmtree(folder, ignore_errors=True)
    ran = run_quietly(train_command(config, "full"), limit)
    ended = time.time()
    ask = [sys.executable, str(ROOT / "infer.py"), QUESTION, "--adapter", str(folder.resolve() / "adapter"), "--json"]
    if config.rehearse:
        ask += ["--profile", "cpu", "--max-new-tokens", "8"]
    first, second = (json.loads(run_quietly(ask, limit).stdout) for _ in range(2))
    record = json.loads((folder / "run.json").read_text())
    return {
        "seconds": ended - started,
        "seconds_until_first_step": (folder / "samples" / "0.jsonl").stat().st_mtime - started,
        "equal_in_new_process": first["token_ids"] == second["token_ids"],
        "answer": first["text"],
        "record": record,
        "stderr": ran.stderr[-4000:],
    }


def check_resume(config, limit):
    """The training of `check_training`, killed in the middle and resumed."""
    folder = config.folder / "killed"
    command = train_command(config, "killed", "--save-minutes", "0")
    last = int(command[command.index("--max-steps") + 1])
    shutil.rmtree(folder, ignore_errors=True)
    with (config.folder / "killed.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        deadline = time.monotonic() + limit
        while not any((folder / f"checkpoint-{n}" / "trainer_state.json").is_file() for n in range(last // 2, last)):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"ended without a checkpoint: {(config.folder / 'killed.txt').read_text()[-1500:]}")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = run_quietly(command, limit).stdout
    expected, found = digest_run(config.folder / "full"), digest_run(folder)
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return {"resumed": "resuming" in resumed, "identical": not different, "different": different}


def measure_apart(config, method, limit):
    """The result of a step that runs in a process of its own."""
    command = [sys.executable, "-m", "tests.gpu_check", "--once", method, "--folder", str(config.folder)]
    command += ["--base-model", config.base_model] if config.base_model else []
    command += ["--rehearse"] if config.rehearse else []
    return json.loads(run_quietly(command, limit).stdout.splitlines()[-1])


def run_step(config, step, limit):
    """The result of a step."""
    if step == "train":
        return check_training(config, limit)
    if step == "resume":
        return check_resume(config, limit)
    if step != "tuned":
        return measure_apart(config, step, limit)
    try:
        return measure_apart(config, step, limit)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return measure_apart(config, "tuned-checkpointing", limit)


# --- Results ---------------------------------------------------------------------------------------


def describe_machine():
    """The card, its driver, and the versions that matter."""
    import torch

    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    names = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "xformers")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    memory = card.total_memory / data.GIB if card else 0
    driver = None
    if card:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"card": card.name if card else "none", "memory_gib": memory, "driver": driver, "versions": versions}


def summarise(step, results):
    """What a step found, in one line."""
    result = results[step]
    if "error" in result:
        return f"failed: {result['error'].strip().splitlines()[-1]:.200}"
    if step == "train":
        same = "the same" if result["equal_in_new_process"] else "OTHER"
        wait = result["seconds_until_first_step"]
        return f"complete in {result['seconds']:.0f} s, {wait:.0f} s before step 1; {same} answer in a new process"
    if step == "resume":
        return "identical bytes" if result["identical"] else f"DIFFERENT: {', '.join(result['different'])}"
    if step == "answers":
        small, large = result["small"], result["large"]
        rates = f"{large['answers_per_second_alone']:.2f} and {large['answers_per_second_batched']:.2f} answers/s"
        return f"{small['equal']} of {small['alone']} equal alone and batched; one by one and batched {rates}"
    memory = f", {result['peak_reserved_gib']:.2f} GiB" if "peak_reserved_gib" in result else ""
    line = f"{result['tokens_per_second']:,.0f} tokens/s{memory}, {result['dtype']}"
    kit = results.get("kit", {})
    if step == "fp16" and kit.get("losses"):
        pairs = zip(result["losses"], kit["losses"], strict=True)
        line += f"; losses within {max(abs(ours / theirs - 1) for ours, theirs in pairs):.2%} of the kit's"
    elif step != "kit" and "tokens_per_second" in kit:
        line += f"; the kit is {kit['tokens_per_second'] / result['tokens_per_second']:.2f}x as fast"
    elif "profile" in result:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in list(result["profile"]["shares"].items())[:4])
        line += f"; {result['profile']['launches']} launches per pass; {shares}"
    return line


def main(config):
    config.folder.mkdir(parents=True, exist_ok=True)
    if config.once:
        with contextlib.redirect_stdout(sys.stderr):
            if config.once == "models":
                small_model()
                result = {"base_model": find_large_model(config)}
            else:
                result = measure_answers(config) if config.once == "answers" else measure_training(config, config.once)
        print("\n" + json.dumps(result))
        return
    if not config.rehearse:
        import torch

        if not torch.cuda.is_available():
            sys.exit("torch finds no GPU. Use --rehearse for a run on the CPU.")
    deadline = time.monotonic() + 60 * config.minutes
    path = config.folder / "gpu_check.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    machine = describe_machine() | {"rehearsal": config.rehearse}
    if results.get("machine") != machine:
        results = {"machine": machine}  # figures of different machines do not compare
    print(json.dumps(results["machine"]), flush=True)
    if not config.base_model:
        # Apart, since Unsloth has to be imported before transformers.
        config = dataclasses.replace(config, **measure_apart(config, "models", 60 * config.minutes))
    for step in config.steps:
        left = deadline - time.monotonic()
        # TRL's loss and half precision have no code for the CPU.
        reason = "no time" if left < 30 else "needs a GPU" if config.rehearse and step in ("fp16", "trl") else None
        if reason:
            print(f"{step:<10} left out: {reason}", flush=True)
            continue
        started = time.monotonic()
        try:
            results[step] = run_step(config, step, left if config.rehearse else min(left, LIMITS[step]))
        except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            results[step] = {"error": str(error)}
        results[step]["step_took_seconds"] = round(time.monotonic() - started, 1)
        data.write_atomic(path, json.dumps(results, indent=1))
        print(f"{step:<10} {summarise(step, results)}", flush=True)
    sys.exit(any("error" in results.get(step, {}) for step in config.steps))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(tyro.cli(Config, description=__doc__))
