"""How the weights change: LoRA on the base model through Unsloth, with the loss on the answers only.

    python train.py                                    the default recipe on this machine
    python train.py --epochs 2 --mix week4             the story's fourth week
    python train.py --target-modules attention --name attention-only
    python train.py --profile t4 --dry-run             print the resolved values and stop

A run leaves runs/train/NAME/: run.json, metrics.jsonl and adapter/, which `infer.py` asks by default.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import data
import infer
from data import ProfileName, UsageError

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

TargetModules = Literal["attention", "all-linear"]

# The modules LoRA touches. The story blamed attention-only LoRA for thin facts: attention routes, feed-forward stores.
TARGET_MODULES: dict[TargetModules, list[str]] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}

EFFECTIVE_BATCH_SIZE = 16


@dataclass(frozen=True)
class TrainingValues:
    """The values in which the two profiles differ, for training."""

    per_device_train_batch_size: int
    optim: str
    train_sampling_strategy: str
    """Unsloth packs a GPU's batches without padding; on the CPU, rows of like length go together instead."""


TRAINING: dict[ProfileName, TrainingValues] = {
    "t4": TrainingValues(4, optim="adamw_8bit", train_sampling_strategy="random"),
    "cpu": TrainingValues(4, optim="adamw_torch_fused", train_sampling_strategy="group_by_length"),
}

# Evaluations come before the first step, then after every such share of the steps, the last step included.
EVAL_EVERY = 0.5

VERSIONS_OF = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "datasets")


@dataclass(frozen=True)
class TrainConfig(data.RowsConfig):
    """Flags of train.py."""

    name: str | None = None
    """Folder of the run below runs/train. Unset: PROFILE-MIX-TARGET_MODULES."""
    epochs: float = 1.0
    """Passes over the rows."""
    max_steps: int | None = None
    """Stop after so many optimiser steps, whatever --epochs says."""
    learning_rate: float = 2e-4
    """Peak of the schedule: linear warm-up over 3% of the steps, then linear decay to 0."""
    target_modules: TargetModules = "all-linear"
    """`attention` is q, k, v, o; `all-linear` adds gate, up, down."""
    r: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: int = 32
    """LoRA's update is scaled by lora_alpha / r."""
    per_device_train_batch_size: int | None = None
    """Rows of a forward pass; a divisor of 16, since steps always see 16 rows. Unset: the profile's."""
    restart: bool = False
    """Train again although the run is there; the old folder is kept under another name."""
    dry_run: bool = False
    """Print the resolved values and stop. Nothing is loaded or written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            problems.append(f"--name {self.name!r}: letters, digits, '.', '_' and '-' are allowed, a letter or digit first.")
        for flag in ("epochs", "learning_rate", "r", "lora_alpha", "max_steps"):
            value = getattr(self, flag)
            if value is not None and not (value > 0 and math.isfinite(value)):
                problems.append(f"--{flag.replace('_', '-')} {value}: a number above 0 is wanted.")
        batch = self.per_device_train_batch_size
        if batch is not None and (batch < 1 or EFFECTIVE_BATCH_SIZE % batch):
            problems.append(f"--per-device-train-batch-size {batch}: a divisor of {EFFECTIVE_BATCH_SIZE} is wanted.")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class Recipe:
    """Every value that a run depends on, resolved. Two runs with equal recipes on equal rows train the same adapter."""

    profile: ProfileName
    base_model: str
    load_in_4bit: bool
    mix: data.MixName
    wanted: dict[data.SourceName, int]
    conversational: str
    encyclopedic: str
    seed: int
    max_seq_length: int
    target_modules: TargetModules
    r: int
    lora_alpha: int
    learning_rate: float
    epochs: float
    max_steps: int | None
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    optim: str
    train_sampling_strategy: str
    use_gradient_checkpointing: Literal["unsloth"] | bool


def resolve_recipe(config: TrainConfig) -> Recipe:
    """The recipe that the flags and the profile's values give. Raises UsageError as `data.resolve_profile`."""
    profile = data.resolve_profile(config.profile)
    model, training = infer.PROFILES[profile], TRAINING[profile]
    batch = config.per_device_train_batch_size or training.per_device_train_batch_size
    return Recipe(
        profile=profile,
        base_model=model.base_model,
        load_in_4bit=model.load_in_4bit,
        mix=config.mix,
        wanted=config.wanted,
        **config.sources(profile),
        seed=config.seed,
        max_seq_length=data.MAX_SEQ_LENGTH,
        target_modules=config.target_modules,
        r=config.r,
        lora_alpha=config.lora_alpha,
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=EFFECTIVE_BATCH_SIZE // batch,
        optim=training.optim,
        train_sampling_strategy=training.train_sampling_strategy,
        use_gradient_checkpointing=model.use_gradient_checkpointing,
    )


# --- The run folder ----------------------------------------------------------------------------------------------


def find_finished(folder: Path, recipe: Recipe, data_fingerprint: str) -> dict[str, Any] | None:
    """The record of the run in `folder` if it is done, else None. The record is written last: without it, it is not done.

    Raises:
        UsageError: the folder holds a finished run of another recipe, or on other rows.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    there = record["recipe"] | {"data_fingerprint": record["data_fingerprint"]}
    wanted = dataclasses.asdict(recipe) | {"data_fingerprint": data_fingerprint}
    # Where the rows came from is no matter as long as they are the same, which the fingerprint tells.
    differences = [
        f"  {name}: {there.get(name)!r} there, {wanted.get(name)!r} now"
        for name in sorted((there.keys() | wanted.keys()) - {"conversational", "encyclopedic"})
        if there.get(name) != wanted.get(name)
    ]
    if differences:
        raise UsageError(
            f"{folder} holds a finished run with other values:\n"
            + "\n".join(differences)
            + "\nChoose another --name, or keep that run aside and train anew with --restart."
        )
    return record


def set_aside(folder: Path) -> None:
    """Renames the folder to the first free `NAME.old-N`."""
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    folder.rename(folder.with_name(f"{folder.name}.old-{number}"))


def commit_id() -> str | None:
    """Commit of the kit's own checkout, or None where it is none."""
    asked = subprocess.run(["git", "-C", str(data.HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


# --- Training ----------------------------------------------------------------------------------------------------


def make_sft_config(recipe: Recipe, folder: Path) -> SFTConfig:
    """TRL's settings. Each value whose default differs between Unsloth's GPU path and its CPU backend is set here."""
    from unsloth import is_bfloat16_supported  # isort: skip
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder),
        max_length=recipe.max_seq_length,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        per_device_eval_batch_size=recipe.per_device_train_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.03,
        weight_decay=0.01,
        max_grad_norm=1.0,
        optim=recipe.optim,
        # A T4 has no bf16.
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        gradient_checkpointing=bool(recipe.use_gradient_checkpointing),
        train_sampling_strategy=recipe.train_sampling_strategy,
        packing=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=EVAL_EVERY,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )


def add_lora(model: Any, recipe: Recipe) -> PeftModel:
    """`model` with fresh LoRA matrices; nothing but them is trainable."""
    from unsloth import FastLanguageModel

    model = FastLanguageModel.get_peft_model(
        model,
        r=recipe.r,
        target_modules=TARGET_MODULES[recipe.target_modules],
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing=recipe.use_gradient_checkpointing,
        random_state=recipe.seed,
    )
    assert all("lora_" in name for name, tensor in model.named_parameters() if tensor.requires_grad)
    return model


def make_progress_callback(metrics_path: Path) -> TrainerCallback:
    """Shows a live bar of steps on stderr, and writes one line a log to `metrics_path`."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    names = {"loss": "train_loss", "eval_loss": "eval_loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
    names |= {"mean_token_accuracy": "train_mean_token_accuracy", "eval_mean_token_accuracy": "mean_token_accuracy"}

    class ProgressCallback(TrainerCallback):
        """The Trainer's own bar, with the loss beside it and the log in a file."""

        bar: tqdm | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Where nobody watches, a line every 10 s is enough.
            interval = 0.1 if sys.stderr.isatty() else 10
            self.bar = tqdm(total=state.max_steps, desc="training", unit="step", dynamic_ncols=True, mininterval=interval)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
            line |= {name: logs[key] for key, name in names.items() if key in logs}
            with metrics_path.open("a", encoding="utf-8") as metrics:
                metrics.write(json.dumps(line) + "\n")
            if "eval_loss" in logs:
                tqdm.write(f"step {state.global_step}: eval_loss {logs['eval_loss']:.4f}", file=sys.stderr)
            elif "loss" in logs and self.bar:
                self.bar.set_postfix(train_loss=f"{logs['loss']:.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return ProgressCallback()


def make_trainer(
    model: PeftModel, tokenizer: Any, recipe: Recipe, train: Dataset, held_out: Dataset, folder: Path
) -> SFTTrainer:
    """TRL's trainer on encoded rows, with our progress in place of its printing."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=make_sft_config(recipe, folder),
        train_dataset=train,
        eval_dataset=held_out,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(make_progress_callback(folder / "metrics.jsonl"))
    return trainer


def train_and_evaluate(trainer: SFTTrainer) -> dict[str, float]:
    """Trains; returns the run's numbers: eval loss before and after, token accuracy, steps and seconds."""
    before = trainer.evaluate()
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    last = trainer.state.log_history[-2] if "eval_loss" in trainer.state.log_history[-2] else {}
    after = last if last.get("step") == trainer.state.global_step else trainer.evaluate()
    return {
        "eval_loss_before": before["eval_loss"],
        "eval_loss": after["eval_loss"],
        "mean_token_accuracy": after.get("eval_mean_token_accuracy"),
        "steps": trainer.state.global_step,
        "training_seconds": round(seconds, 1),
    }


def save_adapter(model: PeftModel, tokenizer: Any, folder: Path, record: infer.AdapterRecord) -> int:
    """Writes the adapter folder, whole or not at all, and returns the bytes of its weights.

    The record's decoding goes with it: into generation_config.json, which other programs read, and whole into our own record,
    since that file cannot say that the penalty does not count the prompt.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    # Only LoRA tensors: "auto" would look the base model up on the hub to see whether its embedding grew.
    model.save_pretrained(part, save_embedding_layers=False)
    tokenizer.save_pretrained(part)
    if decoding := record.decoding:
        infer.make_generation_config(
            decoding.max_new_tokens,
            infer.stop_ids(decoding, model, tokenizer),
            tokenizer.pad_token_id,
            decoding.repetition_penalty,
            decoding.no_repeat_ngram_size,
        ).save_pretrained(part)
    data.write_whole(part / infer.ADAPTER_RECORD, json.dumps(record.to_json(), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return (folder / "adapter_model.safetensors").stat().st_size


def run(recipe: Recipe, mix: data.Mix, folder: Path) -> dict[str, Any]:
    """One training run into `folder`; returns the record that run.json holds."""
    model, tokenizer = infer.load_base(recipe.profile, dtype=None)
    import datasets

    datasets.disable_progress_bars()
    audit = data.audit_mix(mix, tokenizer)
    print(data.format_audit(audit))
    train, held_out = (datasets.Dataset.from_list(data.encode_rows(tokenizer, rows)[0]) for rows in (mix.train, mix.eval))
    if not len(train) or not len(held_out):
        raise UsageError(f"Every row is longer than {data.MAX_SEQ_LENGTH} tokens. Give shorter rows.")
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    with infer.quiet_libraries():
        trainer = make_trainer(add_lora(model, recipe), tokenizer, recipe, train, held_out, folder)
    num_trainable = sum(tensor.numel() for tensor in trainer.model.parameters() if tensor.requires_grad)
    print(f"{num_trainable:,} trainable parameters in LoRA on {recipe.target_modules}", flush=True)
    numbers = train_and_evaluate(trainer)
    adapter_record = infer.AdapterRecord(
        recipe.base_model, recipe.profile, data.prompt_fingerprint(tokenizer), infer.DECODINGS["kit"]
    )
    numbers["adapter_bytes"] = save_adapter(trainer.model, tokenizer, folder / "adapter", adapter_record)
    return {
        "recipe": dataclasses.asdict(recipe),
        "argv": sys.argv,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF} | {"python": platform.python_version()},
        "commit": commit_id(),
        "data_fingerprint": mix.fingerprint,
        "prompt_fingerprint": adapter_record.prompt_fingerprint,
        "numbers": numbers
        | {name: audit[name] for name in ("train_rows", "train_tokens", "eval_rows")}
        | {"trainable_parameters": num_trainable},
    }


def describe_result(folder: Path, numbers: dict[str, float]) -> str:
    """What came out of a run, where it lies, and what to do next."""
    return "\n".join(
        (
            f"eval loss {numbers['eval_loss_before']:.4f} before, {numbers['eval_loss']:.4f} after {numbers['steps']} steps "
            f"({numbers['training_seconds'] / 60:.1f} minutes)",
            f"adapter   {folder / 'adapter'} ({numbers['adapter_bytes'] / 1e6:.1f} MB)",
            f"record    {folder / 'run.json'}, {folder / 'metrics.jsonl'}",
            "A lower loss is not a better answer. Read some:",
            '  python infer.py "What are the warning signs of a heart attack?"',
            "  python ablate.py",
        )
    )


def main(config: TrainConfig) -> None:
    """Resolves the recipe, prints it, trains, and prints what came out."""
    infer.prepare_cublas()
    recipe = resolve_recipe(config)
    folder = infer.TRAIN_RUNS / (config.name or f"{recipe.profile}-{recipe.mix}-{recipe.target_modules}")
    for name, value in dataclasses.asdict(recipe).items():
        print(f"{name:<30}{value}")
    print(f"{'run folder':<30}{folder}", flush=True)
    if config.dry_run:
        return
    from_files = all(Path(source).is_file() for source in (recipe.conversational, recipe.encyclopedic))
    infer.prepare_environment(recipe.profile, offline=recipe.profile == "cpu" and from_files)
    mix = config.load(recipe.profile)
    record = None if config.restart else find_finished(folder, recipe, mix.fingerprint)
    if record:
        print(f"{folder} is already trained with these values (--restart trains it again).")
    else:
        if folder.exists() and config.restart:
            set_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = run(recipe, mix, folder)
        data.write_whole(folder / "run.json", json.dumps(record, indent=2) + "\n")
    data.write_whole(infer.LATEST, folder.name + "\n")
    print(describe_result(folder, record["numbers"]))


if __name__ == "__main__":
    data.run_command(TrainConfig, main, __doc__)
