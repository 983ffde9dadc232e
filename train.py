"""Fine-tunes the base model with LoRA on the answers, and keeps the weights that answer best.

    python train.py --epochs 2                       train; the same command resumes
    python train.py --rows my.jsonl --name mine      on your own rows
    python train.py --profile t4 --dry-run           print the plan; loads no weights

Writes to runs/train/NAME: adapter/, which `infer.py` uses by default, run.json, metrics.jsonl,
samples/STEP.jsonl and curves.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from filelock import FileLock, Timeout
from rapidfuzz.distance import LCSseq
from safetensors import safe_open
from tqdm import tqdm

import data
import infer
from data import Profile, UsageError

TargetModules = Literal["attention", "all-linear"]
Log = dict[str, Any]

# The story blamed attention-only LoRA: the feed-forward layers, it says, store the facts.
TARGET_MODULES: dict[TargetModules, list[str]] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
METRICS = {"answers": "eval_quality", "eval_loss": "eval_loss", "rouge_l": "eval_rouge_l"}
LIBRARIES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "datasets")
ROWS_PER_STEP = 16
LEAST = 1e-12  # of numbers above 0
# Exit codes: the folder contains a run with different values, or another process writes to it.
OTHER_VALUES, BUSY = 3, 75
# Flags that do not change what is learned. The rows have a fingerprint.
NOT_IN_RECIPE = """name output_dir max_hours save_minutes merge gguf push_to_hub dry_run rows
    question_column answer_column conversational encyclopedic per_device_train_batch_size""".split()
MEMORY_ADVICE = (
    "Lower --per-device-train-batch-size (a step keeps its rows). If that is not enough, choose "
    "another --name, and lower --r or use --target-modules attention."
)
STARTED = time.monotonic()  # of --max-hours

CARD = """---
{{ card_data }}
---

# LoRA adapter for medical questions

**Not medical advice.** A small language model wrote these answers. It makes things up, and no
physician has reviewed the rows or the answers.
{% for name, value in values.items() %}
- {{ name }}: {{ value|e }}
{%- endfor %}
"""


# --- Flags and plan ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig(data.RowsConfig):
    """Flags of train.py."""

    name: str | None = None  # Name of the run's folder. Unset: profile, rows and target modules.
    output_dir: Path = infer.TRAIN_RUNS  # Folder for runs. By default, infer.py uses only this one.
    epochs: float = 1.0  # Passes over the rows.
    max_steps: int | None = None  # Number of optimizer steps, overriding --epochs.
    learning_rate: float = 2e-4  # Peak learning rate, after a warm-up over 3% of the steps.
    target_modules: TargetModules = "all-linear"  # `attention` is q, k, v and o.
    r: int = 16  # Rank of the LoRA matrices.
    lora_alpha: int = 32  # The LoRA update is scaled by lora_alpha / r.
    pad: infer.PadName = "native"  # `added`, a new token, is the story's mistake: a huge adapter.
    # Rows per forward pass, of the 16 rows of a step. Unset: the profile's.
    per_device_train_batch_size: Literal[1, 2, 4, 8, 16] | None = None
    load_in_4bit: bool = True  # Quantize the base model to 4-bit NF4. Never on a CPU.
    num_probes: int | None = None  # Probes answered at each evaluation. Unset: the profile's.
    eval_every: float | None = None  # Share of the steps between evaluations. Unset: the profile's.
    # Selects the weights: most sound answers (then points, then loss), lowest loss, or ROUGE-L.
    metric_for_best_model: Literal["answers", "eval_loss", "rouge_l"] = "answers"
    # Stop after this many evaluations in a row that do not improve --metric-for-best-model.
    early_stopping_patience: int | None = None
    max_hours: float | None = None  # Stop after 95% of these hours, with everything saved.
    save_minutes: float = 5.0  # Minutes between two checkpoints; 0 saves after every step.
    merge: bool = False  # Also write base model and adapter as one 16-bit model.
    gguf: Literal["q4_k_m", "q5_k_m", "q8_0", "f16"] | None = None  # Also write a GGUF file.
    push_to_hub: str | None = None  # Also upload the adapter to OWNER/NAME, private if it is new.
    dry_run: bool = False  # Print the plan and stop. Loads no weights, writes no results.

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = "epochs max_steps learning_rate lora_alpha early_stopping_patience max_hours"
        limits = dict.fromkeys(positive.split(), (LEAST, 1e9))
        # 1024: rows of the 3B model's k_proj.
        limits |= {"r": (1, 1024), "save_minutes": (0, 1e6), "eval_every": (0.001, 0.999)}
        least = int(self.metric_for_best_model == "rouge_l")
        limits["num_probes"] = (least, len(infer.read_probes(self.probes)))
        problems = []
        for name, (low, high) in limits.items():
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if value is not None and not low <= value <= high:
                expected = "a number above 0" if low == LEAST else f"{low:g} to {high:g}"
                problems.append(f"{flag} {value}: expected {expected}.")
        if self.name is not None and not infer.RUN_NAME.fullmatch(self.name):
            problems.append(f"--name {self.name!r}: expected {infer.RUN_NAME_RULE}")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def folder(self) -> Path:
        """The run's folder; needs a resolved config."""
        return self.output_dir / self.name

    def count_steps(self, rows: int) -> int:
        """Number of optimizer steps, as the Trainer counts them."""
        return self.max_steps or math.ceil(math.ceil(rows / ROWS_PER_STEP) * self.epochs)

    def recipe(self) -> dict[str, Any]:
        """The values that decide what is learned: equal ones and equal rows give equal adapters."""
        values = {n: v for n, v in dataclasses.asdict(self).items() if n not in NOT_IN_RECIPE}
        probes = hashlib.sha256(repr(infer.read_probes(self.probes)).encode()).hexdigest()
        return {**values, "mix": "rows" if self.rows else self.mix, "probes": probes[:16]}


def name_rows(source: str) -> str:
    """A file's or repository's name as part of a folder's name, without suffix or commit."""
    stem = Path(re.sub(r"@\w+$", "", source)).stem
    return re.sub(r"[^\w.-]+", "-", stem, flags=re.ASCII)[:30] or "rows"


def resolve(config: TrainConfig) -> tuple[TrainConfig, Profile]:
    """The config with the profile's values for unset flags, and the profile."""
    profile = data.resolve_profile(config.profile, config.base_model)
    in_4bit = {"load_in_4bit": config.load_in_4bit and profile.load_in_4bit}
    parts = [profile.name, name_rows(config.rows) if config.rows else config.mix]
    parts += [config.target_modules] + ["pad-added"] * (config.pad == "added")
    if profile.base_model != data.PROFILES[profile.name].base_model:
        base_model = Path(profile.base_model).name
        parts.insert(1, re.sub(r"[^\w.-]+", "-", base_model, flags=re.ASCII)[:40])
    num_probes = min(profile.num_probes, len(infer.read_probes(config.probes)))
    defaults = {"name": "-".join(parts), "num_probes": num_probes, "eval_every": profile.eval_every}
    defaults["per_device_train_batch_size"] = profile.per_device_train_batch_size
    values = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    values |= in_4bit | {"profile": profile.name, "base_model": profile.base_model}
    values |= {} if config.num_probes != 0 else {"metric_for_best_model": "eval_loss"}
    return dataclasses.replace(config, **values), dataclasses.replace(profile, **in_4bit)


def count_adapter(
    arch: data.Architecture, target_modules: TargetModules, r: int, embedding: str | None = None
) -> tuple[int, int]:
    """`(trainable parameters, bytes of adapter_model.safetensors)`, exact, without torch. The file
    has 8 bytes, a JSON header padded to a multiple of 8, and the tensors, wider dtypes first, then
    by name. With --pad added, embedding and head are among them, one row longer, in the dtype
    `embedding` (F32, F16 or BF16)."""
    tensors = []  # (minus the bytes of a value, name, dtype, shape), which sort as in the file
    for module in TARGET_MODULES[target_modules]:
        block = "self_attn" if module in TARGET_MODULES["attention"] else "mlp"
        rows, columns = arch.linear_shapes[module]
        for layer in range(arch.num_hidden_layers):
            name = f"base_model.model.model.layers.{layer}.{block}.{module}.lora_"
            tensors.append((-4, f"{name}A.weight", "F32", (r, columns)))
            tensors.append((-4, f"{name}B.weight", "F32", (rows, r)))
    trainable = sum(math.prod(shape) for *_, shape in tensors)
    if embedding:
        size, shape = 4 if embedding == "F32" else 2, (arch.vocab_size + 1, arch.hidden_size)
        tensors += [(-size, name, embedding, shape) for name in infer.EMBEDDINGS]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for size, name, dtype, shape in sorted(tensors):
        start, end = end, end - size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header_bytes = len(json.dumps(header, separators=(",", ":")))
    return trainable, 8 + math.ceil(header_bytes / 8) * 8 + end


def count_base(profile: Profile) -> tuple[int, int]:
    """`(parameters, bytes when loaded)` of the base model."""
    arch = profile.architecture
    linear = arch.num_hidden_layers * sum(map(math.prod, arch.linear_shapes.values()))
    others = arch.vocab_size * arch.hidden_size * (1 if arch.tie_word_embeddings else 2)
    others += (2 * arch.num_hidden_layers + 1) * arch.hidden_size
    # NF4 with double quantization (Dettmers et al. 2023): 4 bits per weight, 8 per block of 64
    # weights, and 32 per 256 blocks. Embedding and norms stay in 16 bits.
    per_weight = 1 / 2 + 1 / 64 + 4 / (64 * 256) if profile.load_in_4bit else 2
    return linear + others, int(linear * per_weight) + 2 * others


def plan(config: TrainConfig, profile: Profile) -> dict[str, str]:
    """Sizes, exact before anything is loaded; with --pad added, of an embedding in 16 bits."""
    dtype = "BF16" if profile.name == "cpu" else "F16"
    adapter = (config.target_modules, config.r, dtype if config.pad == "added" else None)
    trainable, size = count_adapter(profile.architecture, *adapter)
    parameters, base_bytes = count_base(profile)
    # Three checkpoints, of which one is being replaced, two adapters, and exports.
    disk = 5 * size + 24 * trainable + 8 * parameters * bool(config.merge or config.gguf)
    parent = next(each for each in config.folder.absolute().parents if each.is_dir())
    return {
        "trainable parameters": f"{trainable:,}",
        "adapter file": f"{size:,} bytes",
        "base model": f"{parameters:,} parameters, {base_bytes / 1e9:.2f} GB when loaded",
        "disk": f"{disk / 1e9:.2f} GB of {shutil.disk_usage(parent).free / 1e9:.1f} GB free",
        "measured": profile.measured,
    }


def format_values(values: Log) -> str:
    """Names and values in two columns."""
    lines = (f"{name:<30}{value}" for name, value in values.items() if value is not None)
    return data.escape_controls("\n".join(lines))


def format_rows(config: TrainConfig, audit: Log) -> str:
    """The audit of the rows, and the steps that they make."""
    rows, batch = audit["train_rows"], config.per_device_train_batch_size
    passes = f"{ROWS_PER_STEP} rows: {batch} rows x {ROWS_PER_STEP // batch} forward passes"
    values = {"rows": f"{rows:,} of {audit['train_tokens']:,} tokens"}
    values["steps"] = f"{config.count_steps(rows):,} of {passes}"
    return f"\n{data.format_audit(audit)}\n\n{format_values(values)}\n"


# --- Model and answers ---------------------------------------------------------------------------


def add_lora(model: Any, config: TrainConfig, profile: Profile, longest_row: int = 0) -> Any:
    """`model` with LoRA matrices, initialized by the seed, for rows of up to `longest_row` tokens;
    nothing else is trainable."""
    from unsloth import FastLanguageModel

    model = FastLanguageModel.get_peft_model(
        model,
        r=config.r,
        target_modules=TARGET_MODULES[config.target_modules],
        lora_alpha=config.lora_alpha,
        use_gradient_checkpointing=profile.use_gradient_checkpointing,
        random_state=config.seed,
    )
    if profile.fused_lora:
        fuse_lora(model)
    # Eager attention keeps its (B, heads, T, T) weights for the backward pass. While they are small
    # it is faster: training takes 1.17 times as long without.
    if 0 < longest_row <= profile.eager_attention_tokens:
        model.set_attn_implementation("eager")
    return model


def fuse_lora(model: Any) -> None:
    """Fuses LoRA's update into the product of the frozen weight, which is rounded once. In
    bfloat16, PEFT's sum of two rounded products loses what is below half a unit in the last place
    of the larger one. Training takes 1.05 times as long without (`tests.bench train --measures`).
    """
    import torch
    from peft.tuners.lora import Linear

    def forward(layer: Linear, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x (..., in) -> (..., out)."""
        if layer.disable_adapters:
            return layer.base_layer(x)
        weight = layer.base_layer.weight
        a, b = (matrices["default"].weight for matrices in (layer.lora_A, layer.lora_B))
        scaled_b = (b * layer.scaling["default"]).to(weight.dtype)
        rows = x.to(weight.dtype).flatten(0, -2)
        update = rows @ a.to(weight.dtype).T @ scaled_b.T
        return torch.addmm(update, rows, weight.T).unflatten(0, x.shape[:-1])

    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.forward = functools.partial(forward, layer)


def choose_checkpointing(profile: Profile, longest_row: int) -> Profile:
    """The profile; without gradient checkpointing if the GPU's memory has room for activations."""
    import torch

    if not profile.use_gradient_checkpointing:
        return profile
    arch = profile.architecture
    # What autograd keeps for LoRA on all linear layers in 16 bits; a test measures it.
    per_token = arch.num_hidden_layers * (26 * arch.hidden_size + 8 * arch.intermediate_size)
    # Whatever the batch size: a smaller one is for less memory.
    needed = count_base(profile)[1] + ROWS_PER_STEP * longest_row * per_token
    has_room = needed < 0.8 * torch.cuda.get_device_properties(0).total_memory
    return dataclasses.replace(profile, use_gradient_checkpointing=False) if has_room else profile


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L, the F1 of the longest common subsequence of words (Lin 2004), in [0, 1]."""
    words = [re.findall(r"[^\W_]+", each.lower()) for each in (text, reference)]
    return 2 * LCSseq.similarity(*words) / max(1, sum(map(len, words)))


def evaluate_answers(
    config: TrainConfig, loaded: infer.LoadedModel, mix: data.Mix, step: int, eval_loss: float
) -> dict[str, float]:
    """Metrics of answers to probes, which are written to samples/STEP.jsonl, and to held-out
    questions. `eval_quality` orders by sound answers, then by points, then by loss."""
    from unsloth import FastLanguageModel

    encoded = [data.encode_row(loaded.tokenizer, row) for row in mix.eval]
    num_tokens = sum(label != -100 for row in encoded for label in row["labels"])
    texts = (text for row in mix.eval for role, text in row.messages if role == "assistant")
    tokens_per_byte = num_tokens / sum(len(text.encode()) for text in texts)
    metrics = {"eval_loss_per_byte": eval_loss * tokens_per_byte}
    count, judged = config.num_probes, []
    if count:
        limit = min(infer.DECODINGS["kit"].max_new_tokens, loaded.profile.eval_max_new_tokens)
        decoding = dataclasses.replace(infer.DECODINGS["kit"], max_new_tokens=limit)
        requests = [infer.Request(probe.question, decoding) for probe in loaded.probes[:count]]
        references: dict[infer.Request, str] = {}
        for row in sorted(mix.eval, key=lambda row: len(row.question)):
            with contextlib.suppress(UsageError):  # without letters, or too long to be answered
                infer.encode_request(loaded, request := infer.Request(row.question, decoding))
                references[request] = row.answer
        # Short questions, which fill up the last batch of probes.
        requests += list(references)[: max(8, -count % infer.ROWS)]
        FastLanguageModel.for_inference(loaded.model)
        with infer.quiet_libraries():
            answers = infer.answer_requests(loaded, requests)
            judged = infer.judge_answers(loaded, answers[:count])
        recompute = loaded.profile.use_gradient_checkpointing
        FastLanguageModel.for_training(loaded.model, use_gradient_checkpointing=recompute)
        pairs = zip(answers[count:], references.values(), strict=False)
        scores = [rouge_l(answer.text, reference) for answer, reference in pairs]
        metrics["eval_rouge_l"] = sum(scores) / len(scores) if scores else math.nan
        # Without what differs from run to run.
        records = (each.to_record() | {"adapter": None, "seconds": None} for each in judged)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (config.folder / "samples").mkdir(exist_ok=True)
        data.write_atomic(config.folder / "samples" / f"{step}.jsonl", lines)
    found = infer.measure_quality(judged)
    # NaN is never selected: diverged weights still give answers.
    tie_break = 1 / (1 + eval_loss) if math.isfinite(eval_loss) else math.nan
    points = (found["points"] + tie_break) / (found["max_points"] + 1)
    metrics |= {f"eval_{name}": count for name, count in found.items()}
    return metrics | ({"eval_quality": found["sound"] + points} if found["answers"] else {})


def describe_evaluation(now: Log, before: Log | None) -> str:
    """An evaluation in one line; a second one warns if the loss improved, but not the answers."""
    line = "step {step}: eval_loss {eval_loss:.4f}"
    if now["eval_answers"]:
        line += " | sound {eval_sound}/{eval_answers} | ended {eval_ended}/{eval_answers} | points "
        line += "{eval_points}/{eval_max_points}, wrong claims {eval_wrong_claims} | ROUGE-L "
        line += "{eval_rouge_l:.3f}"
    if before and now["eval_loss"] < before["eval_loss"]:
        names = {"eval_sound": "sound answers", "eval_points": "points"}
        worse = [f"{names[n]} {before[n]} -> {now[n]}" for n in names if now[n] < before[n]]
        if worse:
            line += f"\n  the loss improved while the answers got worse: {', '.join(worse)}"
    return line.format(**now)


# --- Training ------------------------------------------------------------------------------------


def make_callback(config: TrainConfig, recipe: Log) -> Any:
    """Shows progress, writes metrics.jsonl, saves in time, and stops training after a signal."""
    from transformers.trainer_callback import ExportableState, TrainerCallback

    class RunCallback(TrainerCallback, ExportableState):
        """Its state in trainer_state.json is the recipe and the seconds of training so far."""

        seconds, began = 0.0, time.monotonic()
        signals: ClassVar[list[int]] = []  # of all instances: resuming makes another one

        def handle_signal(self, number: int, frame: object) -> None:
            """Stops after this step. A second Ctrl-C ends the run at once."""
            self.signals.append(number)
            if self.signals.count(signal.SIGINT) > 1:
                raise infer.Interrupted(number)
            # Not by print, which the signal may have interrupted.
            with contextlib.suppress(OSError):  # the terminal may have been closed
                os.write(2, b"\nStopping after this step. Ctrl-C again stops at once.\n")

        def state(self) -> dict[str, Any]:
            seconds = round(self.seconds + time.monotonic() - self.began, 1)
            return {"args": {}, "attributes": {"recipe": recipe, "seconds": seconds}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step, steps = state.global_step, state.max_steps
            self.bar = tqdm(initial=step, total=steps, desc="training", unit="step")
            self.began = self.saved = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update()
            now, limit = time.monotonic(), 0.95 * 3600 * (config.max_hours or math.inf)
            self.stops = bool(self.signals) or now - STARTED >= limit
            # A run that is killed in an evaluation resumes one step before it.
            before = (state.global_step + 1) % state.eval_steps == 0
            is_due = before or now - self.saved >= 60 * config.save_minutes
            control.should_save |= self.stops or is_due

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.saved = time.monotonic()
            # Only now, since a saved should_training_stop means that the run is complete.
            control.should_training_stop |= self.stops

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            lines = select_metrics(state.log_history)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            data.write_atomic(config.folder / "metrics.jsonl", text)
            if "eval_loss" in logs:
                evaluations = [None, *(line for line in lines if "eval_loss" in line)]
                tqdm.write(describe_evaluation(evaluations[-1], evaluations[-2]), sys.stderr)
            elif "loss" in logs:
                self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.bar.close()

    return RunCallback()


def select_metrics(log_history: list[Log]) -> list[Log]:
    """The lines of metrics.jsonl: the Trainer's logs of steps and evaluations, without times."""
    volatile = re.compile(r"runtime|_per_second|flos|num_tokens")  # tokens since the last start
    logs = [log for log in log_history if "loss" in log or "eval_loss" in log]
    return [{name: log[name] for name in sorted(log) if not volatile.search(name)} for log in logs]


def make_sft_config(config: TrainConfig, profile: Profile, steps: int) -> Any:
    """TRL's settings, with every value whose default differs between Unsloth's GPU and CPU code."""
    from unsloth import is_bfloat16_supported  # isort: skip
    from trl import SFTConfig

    batch = config.per_device_train_batch_size
    names = ("optim", "train_sampling_strategy", "padding_free", "pad_to_multiple_of")
    return SFTConfig(
        **{name: getattr(profile, name) for name in names},
        output_dir=str(config.folder),
        max_length=data.MAX_SEQ_LENGTH,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=batch,
        # Not the flag's: the eval loss is a mean over batches, so it depends on their size.
        per_device_eval_batch_size=profile.per_device_train_batch_size,
        gradient_accumulation_steps=ROWS_PER_STEP // batch,
        eval_accumulation_steps=None,
        learning_rate=config.learning_rate,
        # Rounded down, since the first step of a warm-up has a learning rate of 0.
        warmup_steps=int(0.03 * steps),
        weight_decay=0.01,
        fp16=not is_bfloat16_supported(),  # a T4 has no bf16
        bf16=is_bfloat16_supported(),
        gradient_checkpointing=bool(profile.use_gradient_checkpointing),
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a loss that is not a number
        include_num_input_tokens_seen="no",
        eval_strategy="steps",
        eval_steps=config.eval_every,
        eval_on_start=True,
        save_steps=config.eval_every,
        save_total_limit=2,
        metric_for_best_model=METRICS[config.metric_for_best_model],
        greater_is_better=config.metric_for_best_model != "eval_loss",
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,  # our callback shows the progress
        torch_empty_cache_steps=None,
    )


def make_trainer(
    model: Any, tokenizer: Any, args: Any, rows: list, held_out: list, evaluate: Any = None
) -> Any:
    """TRL's trainer for encoded rows; `evaluate(step, eval_loss)` returns metrics of answers."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            output = super().evaluation_loop(*args, **kwargs)
            if evaluate:
                loss, step = output.metrics["eval_loss"], self.state.global_step
                output.metrics.update(evaluate(step, loss))
            return output

    disable_progress_bars()
    if args.train_sampling_strategy == "sequential":
        # Saves padding. `group_by_length` draws from the generator that evaluations use as well.
        span = 4 * ROWS_PER_STEP
        spans = [rows[start : start + span] for start in range(0, len(rows), span)]
        rows = [row for each in spans for row in sorted(each, key=lambda row: -len(row["labels"]))]
    sets = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(held_out)}
    trainer = Trainer(model=model, processing_class=tokenizer, args=args, **sets)
    trainer.create_model_card = lambda *args, **kwargs: None  # `make_card` is the card
    trainer.remove_callback(PrinterCallback)
    return trainer


# --- The run -------------------------------------------------------------------------------------


def find_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The newest checkpoint that can be loaded, and its state. Newer ones are renamed."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda path: -int(path.name[11:])):
        try:
            scaler = [path.name for path in checkpoint.glob("scaler.pt")]  # of float16
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", *scaler):
                if zipfile.ZipFile(checkpoint / name).testzip():
                    raise ValueError(f"{name} is broken")
            safe_open(checkpoint / infer.WEIGHTS, framework="np")
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            callbacks = state["stateful_callbacks"]
            # Set at the end of training: after all steps, or by early stopping.
            state["complete"] = callbacks["TrainerControl"]["args"]["should_training_stop"]
            return checkpoint, state | callbacks["RunCallback"]["attributes"]
        except Exception as error:  # whatever a damaged file leads to
            problem = f"{checkpoint} cannot be loaded ({data.first_line(error)})"
            print(f"{problem}. Using the previous one, if there is one.", file=sys.stderr)
            damaged = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(damaged, ignore_errors=True)
            checkpoint.rename(damaged)
    return None, {"complete": False}


def check_recipe(folder: Path, found: Log, recipe: Log) -> None:
    """Raises UsageError if the run in the folder has a different recipe."""
    names = [n for n in sorted(found.keys() | recipe.keys()) if found.get(n) != recipe.get(n)]
    if names:
        lines = [f"{folder} contains a run with different values:"]
        lines += [f"  {n}: {found.get(n)!r} there, {recipe.get(n)!r} now" for n in names]
        lines.append("Choose another --name, or remove the folder.")
        raise UsageError("\n".join(lines), OTHER_VALUES)


def prepare_trainer(
    config: TrainConfig, loaded: infer.LoadedModel, mix: data.Mix, longest_row: int
) -> Any:
    """Adds LoRA to the base model; returns a trainer that answers questions at each evaluation."""
    from transformers import EarlyStoppingCallback

    profile, tokenizer = loaded.profile, loaded.tokenizer
    if config.pad == "added":
        infer.add_pad_token(loaded.model, tokenizer)
    model = loaded.model = add_lora(loaded.model, config, profile, longest_row)
    lora = model.peft_config["default"]
    lora.base_model_name_or_path = profile.hub_id  # not this machine's cache
    lora.target_modules = sorted(lora.target_modules)  # a set, whose order varies
    # By default, PEFT checks on the hub whether the embedding has grown.
    save = functools.partial(model.save_pretrained, save_embedding_layers=config.pad == "added")
    model.save_pretrained = save
    rows = [data.encode_row(tokenizer, row) for row in mix.train]
    held_out = [data.encode_row(tokenizer, row) for row in mix.eval]
    held_out.sort(key=lambda row: len(row["input_ids"]))
    args = make_sft_config(config, profile, config.count_steps(len(rows)))
    evaluate = functools.partial(evaluate_answers, config, loaded, mix)
    trainer = make_trainer(model, tokenizer, args, rows, held_out, evaluate)
    if config.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    return trainer


def run(config: TrainConfig, profile: Profile, mix: data.Mix, recipe: Log) -> Log | None:
    """Trains, from a checkpoint if there is one. Returns the record; None after --max-hours."""
    folder = config.folder
    checkpoint, state = find_checkpoint(folder)
    if checkpoint:
        check_recipe(folder, state["recipe"], recipe)
        print(f"resuming {folder} after step {state['global_step']} of {state['max_steps']}")
    if config.num_probes:
        infer.prepare_reference(profile)
    model, tokenizer = infer.load_base(profile, dtype=None)
    mix = data.fit_mix(mix, tokenizer)
    audit = data.audit_mix(mix, tokenizer)
    print(format_rows(config, audit), flush=True)
    longest = audit["lengths"]["longest"]
    profile = choose_checkpointing(profile, longest)
    with infer.quiet_libraries():
        loaded = infer.LoadedModel(model, tokenizer, profile, system_prompt=mix.system_prompt)
        loaded.probes = infer.read_probes(config.probes)
        trainer = prepare_trainer(config, loaded, mix, longest)
        trainer.add_callback(callback := make_callback(config, recipe))
    trainer.args.eval_on_start = checkpoint is None
    if not state["complete"]:
        infer.handle_signals(callback.handle_signal)
        with data.writing(folder), infer.quiet_libraries():
            folder.mkdir(parents=True, exist_ok=True)
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        infer.handle_signals()
        state = find_checkpoint(folder)[1]
    advice = f"Run the same command to resume {folder}."
    if callback.signals and not state["complete"]:
        raise infer.Interrupted(callback.signals[0], f"Interrupted. {advice}")
    if state["complete"]:
        return write_results(config, loaded, recipe, audit, state)
    steps = f"{state['global_step']} of {state['max_steps']} steps"
    print(f"Stopped by --max-hours after {steps}. {advice}")
    if state["best_global_step"]:
        write_results(config, loaded, recipe, audit, state)
        print(f"The best weights so far are in {folder / 'adapter'}.")
    return None


def select_steps(folder: Path, state: Log) -> dict[str, Any]:
    """The evaluations before training, at the selected step and at the last, and the step that each
    metric selects. Raises UsageError if the loss of the selected one is not a number."""
    before, *lines = [log for log in select_metrics(state["log_history"]) if "eval_loss" in log]
    chosen = next((line for line in lines if line["step"] == state["best_global_step"]), None)
    if not chosen or not math.isfinite(chosen["eval_loss"]):
        problem = "the eval loss is not a number, so there are no weights to select"
        advice = "Remove the folder, and lower --learning-rate."
        raise UsageError(f"{folder}: {problem}. {advice}")
    selected = {}
    for name, key in METRICS.items():
        best = min if name == "eval_loss" else max  # the first of equal ones
        if finite := [line for line in lines if math.isfinite(line.get(key, math.nan))]:
            selected[name] = best(finite, key=lambda line: line[key])["step"]
    return {"before": before, "chosen": chosen, "last": lines[-1], "selected": selected}


def write_results(
    config: TrainConfig, loaded: infer.LoadedModel, recipe: Log, audit: Log, state: Log
) -> dict[str, Any]:
    """Writes adapter, curves and, if the run is complete, run.json last; returns its content."""
    import torch

    folder, tokenizer = config.folder, loaded.tokenizer
    steps = select_steps(folder, state)
    checkpoint = folder / f"checkpoint-{steps['chosen']['step']}"
    numbers = {name: audit[name] for name in ("train_rows", "train_tokens", "eval_rows")} | steps
    numbers |= {"steps": state["global_step"], "planned_steps": state["max_steps"]}
    # On a CPU, torch counts no bytes.
    peak = torch.cuda.max_memory_reserved() or 1024 * resource.getrusage(0).ru_maxrss
    numbers |= {"training_seconds": state["seconds"], "peak_memory_bytes": peak}
    numbers["adapter_bytes"] = (checkpoint / infer.WEIGHTS).stat().st_size
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    prompt = {"system_prompt": loaded.system_prompt}
    prompt["prompt_fingerprint"] = data.prompt_fingerprint(tokenizer, loaded.system_prompt)
    record = {"recipe": recipe, "argv": sys.argv, "versions": versions, "numbers": numbers} | prompt
    about = infer.AdapterRecord(
        **{name: recipe[name] for name in ("base_model", "profile", "pad", "load_in_4bit")},
        **prompt,
        decoding=infer.DECODINGS["kit"],
        surprisal_reference=infer.surprisal_reference(loaded) if config.num_probes else None,
    )
    adapter, part = folder / "adapter", folder / ".adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    with data.writing(adapter, part):
        tokenizer.save_pretrained(part)
        for name in (infer.WEIGHTS, infer.CONFIG):
            shutil.copyfile(checkpoint / name, part / name)
        kit, end, pad = about.decoding, [tokenizer.eos_token_id], tokenizer.pad_token_id
        generation = (kit.max_new_tokens, end, pad, kit.repetition_penalty)
        infer.make_generation_config(*generation).save_pretrained(part)
        about_text = json.dumps(dataclasses.asdict(about), indent=2)
        data.write_atomic(part / infer.ADAPTER_RECORD, about_text + "\n")
        data.write_atomic(part / "README.md", make_card(config, loaded.profile, record))
        shutil.rmtree(adapter, ignore_errors=True)
        part.rename(adapter)
    draw_curves(state["log_history"], steps["selected"], folder / "curves.png")
    if state["complete"]:
        data.write_atomic(folder / "run.json", json.dumps(record, indent=2) + "\n")
    return record


def make_card(config: TrainConfig, profile: Profile, record: Log) -> str:
    """The model card (markdown) from `CARD`, with the recipe and the losses; text is escaped."""
    from huggingface_hub import ModelCard, ModelCardData

    before, chosen = record["numbers"]["before"], record["numbers"]["chosen"]
    # A file's folder may be private, and so may the base model's path.
    sources = {f"source of {name}": Path(each) for name, each in config.sources(profile).items()}
    values = {name: path.name if path.exists() else path for name, path in sources.items()}
    values |= {name: value for name, value in record["recipe"].items() if name != "base_model"}
    values["system_prompt"] = " ".join(record["system_prompt"].split())  # without markdown lines
    values["weights"] = f"of step {chosen['step']}, selected by {config.metric_for_best_model}"
    for name, key in {"eval loss": "eval_loss", "sound answers": "eval_sound"}.items():
        total = f" of {before['eval_answers']}" if key == "eval_sound" else ""
        values[name] = f"{before[key]:.5g} before, {chosen[key]:.5g} at that step{total}"
    values |= record["versions"]
    base_model = None if Path(profile.hub_id).is_dir() else profile.hub_id
    about = ModelCardData(base_model=base_model, library_name="peft", license=profile.license)
    card = ModelCard.from_template(about, template_str=CARD, values=values)
    return data.escape_controls(card.content)


def draw_curves(log_history: list[Log], selected: dict[str, int], path: Path) -> None:
    """Draws loss and answers over the steps, and as gray bars the steps that metrics select."""
    import pandas
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, answers = figure.subplots(2, sharex=True)
    logs = pandas.DataFrame(log_history).set_index("step").astype(float, errors="ignore")
    losses.plot(logs.loss.dropna(), color="0.6", label="train")
    losses.plot(logs.eval_loss.dropna(), "o--", color="black", label="eval")
    for name, style in {"sound": "o-", "ended": "s:", "points": "^-."}.items():
        total = logs.eval_max_points if name == "points" else logs.eval_answers
        share = (logs[f"eval_{name}"] / total).dropna()
        answers.plot(share, style, color="black", label=name)
    losses.set_ylabel("loss (nats per token)")
    answers.set(ylabel="share of answers", xlabel="step", ylim=(-0.02, 1.02))
    for axes in (losses, answers):
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        for step in selected.values():
            axes.axvline(step, color="0.8", linewidth=4, zorder=0)
    answers.xaxis.get_major_locator().set_params(integer=True)
    losses.set_title(", ".join(f"{name} selects step {step}" for name, step in selected.items()))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    data.write_atomic(path, image.getvalue())


def make_modelfile(tokenizer: Any, system_prompt: str) -> str:
    """An Ollama Modelfile for a merged model, with the prompt of training and the kit's decoding.
    Ollama adds the beginning-of-text token itself."""
    decoding, places = infer.DECODINGS["kit"], {"system": ".System", "user": ".Prompt"}
    messages = [{"role": role, "content": f"{{{{ {name} }}}}"} for role, name in places.items()]
    options = {"add_generation_prompt": True, "date_string": data.TEMPLATE_DATE}
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    prompt = prompt.removeprefix(tokenizer.decode(tokenizer("")["input_ids"]))
    quoted = system_prompt.replace('"""', '"')
    return f"""# ollama create medical -f Modelfile && ollama run medical
# Ollama's repetition penalty includes the prompt, so answers differ from those of infer.py.
FROM .
TEMPLATE \"\"\"{prompt}{{{{ .Response }}}}{tokenizer.eos_token}\"\"\"
SYSTEM \"\"\"{quoted}\"\"\"
PARAMETER stop "{tokenizer.eos_token}"
PARAMETER temperature {decoding.temperature:g}
PARAMETER repeat_penalty {decoding.repetition_penalty:g}
PARAMETER repeat_last_n -1
PARAMETER num_predict {decoding.max_new_tokens}
PARAMETER num_ctx {data.MAX_SEQ_LENGTH}
"""


def export(config: TrainConfig, profile: Profile, system_prompt: str) -> None:
    """Merges and converts the adapter as the flags say."""
    model, tokenizer = infer.load_base(profile, dtype=profile.dtype)
    # On Kaggle, Unsloth may write relative paths to another disk.
    folder = config.folder.absolute()
    merged, gguf, part = (folder / name for name in ("merged", "gguf", ".merged.part"))
    shutil.rmtree(part, ignore_errors=True)
    with infer.quiet_libraries(), data.writing(merged, part):
        if config.pad == "added":
            infer.add_pad_token(model, tokenizer)
        model = add_lora(model, config, profile)
        model.load_adapter(config.folder / "adapter", "default")
        try:
            if config.merge:
                model.save_pretrained_merged(str(part), tokenizer, save_method="merged_16bit")
                data.write_atomic(part / "Modelfile", make_modelfile(tokenizer, system_prompt))
                shutil.rmtree(merged, ignore_errors=True)
                part.rename(merged)
            if config.gguf:
                model.save_pretrained_gguf(str(gguf), tokenizer, quantization_method=config.gguf)
        except Exception as error:  # of Unsloth, and of llama.cpp's tools, which it downloads
            shutil.rmtree(gguf, ignore_errors=True)
            problem = f"The adapter is complete, but not the export ({data.first_line(error)})"
            advice = "--gguf needs the network and a compiler; --merge may need the network"
            raise UsageError(f"{problem}. {advice}.") from error
    print(f"exported  to {config.folder}")


def upload(config: TrainConfig, adapter: Path | None = None) -> None:
    """Uploads the adapter or, without one, checks the token. Raises UsageError."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
        if adapter:
            url = HfApi().create_repo(config.push_to_hub, private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=url.repo_id, folder_path=adapter)
            print(f"uploaded  {url} (private, if it is new)")
    except Exception as error:  # of the hub's client, of many types
        problem = f"--push-to-hub {config.push_to_hub} needs the network and a token with write"
        advice = "Run hf auth login, or set HF_TOKEN, and rerun."
        raise UsageError(f"{problem} access ({data.first_line(error)}). {advice}") from None


def train(config: TrainConfig, profile: Profile, mix: data.Mix, recipe: Log) -> None:
    """Trains, unless the run is complete, exports, and prints the results."""
    folder, path, adapter = config.folder, config.folder / "run.json", config.folder / "adapter"
    if path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            record["recipe"].items(), record["numbers"]["chosen"]["step"]
        except Exception as error:  # whatever a damaged file leads to
            raise UsageError(f"{path} is corrupt ({error!r}). Remove the folder.") from None
        check_recipe(folder, record["recipe"], recipe)
        infer.check_adapter(adapter)
        print(f"{folder} is already trained with these values. Remove it to train again.")
    elif (record := run(config, profile, mix, recipe)) is None:
        return
    for checkpoint in folder.glob("*checkpoint-*"):
        shutil.rmtree(checkpoint)
    if config.output_dir == infer.TRAIN_RUNS:
        data.write_atomic(infer.LATEST, folder.name + "\n")
    if config.merge or config.gguf:
        export(config, profile, record["system_prompt"])
    if config.push_to_hub:
        upload(config, adapter)
    numbers = record["numbers"]
    before, last, minutes = numbers["before"], numbers["last"], numbers["training_seconds"] / 60
    choices = ", ".join(f"{name} step {step}" for name, step in numbers["selected"].items())
    flags = f'--adapter {shlex.quote(str(adapter))} "What are the warning signs of a heart attack?"'
    print(f"""loss      {before["eval_loss"]:.4f} before, {last["eval_loss"]:.4f} after
steps     {last["step"]} of {numbers["planned_steps"]} in {minutes:.1f} minutes
memory    {numbers["peak_memory_bytes"] / data.GIB:.2f} GiB at the peak
adapter   {adapter} ({numbers["adapter_bytes"]:,} bytes)
try it    python infer.py {flags}
selected  step {numbers["chosen"]["step"]} by {config.metric_for_best_model}; {choices}""")


def main(config: TrainConfig) -> None:
    """Resolves the values, prints them and the plan, and trains unless it is a dry run."""
    infer.handle_signals()
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UsageError("Several processes are not supported. Use one, without torchrun.")
    config, profile = resolve(config)
    folder, recipe, sources = config.folder, config.recipe(), config.sources(profile)
    has_files = all(each.lower().endswith(data.FILE_SUFFIXES) for each in sources.values())
    is_local = profile.base_model == data.SMALL_MODEL or Path(profile.base_model).is_dir()
    needs_hub = config.push_to_hub or not (is_local and has_files)
    is_online = needs_hub and data.reaches_hub()
    infer.prepare_environment(profile, offline=not is_online)
    values = {**recipe, **sources, "run folder": folder, **plan(config, profile)}
    print(format_values(values), flush=True)
    if config.dry_run:
        mix = config.load(profile) if has_files or is_online else None
        tokenizer = None
        try:
            tokenizer = mix and data.load_tokenizer(profile)  # maybe from the hub client's cache
        except UsageError:
            if is_online or is_local:
                raise
        if tokenizer:
            print(format_rows(config, data.audit_mix(data.fit_mix(mix, tokenizer), tokenizer)))
        else:
            infer.report("Rows, tokens and steps are not counted: the hub cannot be reached.")
        return
    if config.push_to_hub:
        upload(config)
    mix = config.load(profile)
    recipe["data_fingerprint"] = mix.fingerprint
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            train(config, profile, mix, recipe)
    except Timeout:
        text = f"Another process is training into {folder}. Wait for it, or choose another --name."
        raise UsageError(text, BUSY) from None


if __name__ == "__main__":
    data.run_command(TrainConfig, main, __doc__, MEMORY_ADVICE)
