"""How the weights change: LoRA on the base model through Unsloth, with the loss on the answers only.

    python train.py                                    the default recipe on this machine
    python train.py --epochs 2 --mix week4             the story's fourth week
    python train.py --target-modules attention --name attention-only
    python train.py --profile t4 --dry-run             the plan: rows, steps, parameters, bytes, memory; loads no weights
    python train.py --max-hours 8.5                    stop in time; the same line goes on from there
    python train.py --merge                            16-bit weights of base and adapter in one, for other programs
    torchrun --nproc_per_node 2 train.py               two GPUs

A run leaves runs/train/NAME/: run.json, metrics.jsonl, samples.jsonl and adapter/, which `infer.py` asks by default.
"""

from __future__ import annotations

import ctypes
import dataclasses
import html
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import data
import infer
from data import ProfileName, UsageError
from infer import PadName

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

TargetModules = Literal["attention", "all-linear"]
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]

# The modules LoRA touches. The story blamed attention-only LoRA for thin facts: attention routes, feed-forward stores.
TARGET_MODULES: dict[TargetModules, list[str]] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}

EFFECTIVE_BATCH_SIZE = 16
GIB = 2**30


@dataclass(frozen=True)
class TrainingValues:
    """The values in which the two profiles differ, for training."""

    per_device_train_batch_size: int
    optim: str
    train_sampling_strategy: Literal["random", "group_by_length"]
    padding_free: bool
    """Unsloth joins a GPU's batches to one row and keeps their rows apart in attention; on the CPU, where it does not, rows of
    like length go together instead."""
    pad_to_multiple_of: int | None
    """Lengths of padded batches are rounded up to it: the CPU's matrix library compiles and keeps kernels for every length that
    it meets (measured: 75 MB a step, and 11% of the time)."""
    dtype: Literal["float16"] | None
    """Of the base model in training. None: Unsloth's choice for the machine, bfloat16 or float32."""
    memory_limit: int | None
    """Bytes of device memory: of a T4 what its 16 GB leave to torch. None: what the host has free."""
    runtime: int
    """Bytes of device memory beside tensors: a CUDA context; on the CPU Python and the libraries (measured)."""
    gaps: float
    """Of the activations, what their allocator loses between blocks: measured on the CPU, an allowance on a GPU."""
    host_runtime: int
    """Bytes of host memory beside the device's: Python, the libraries and CUDA (estimated). 0 where the host is the device."""
    loss: int
    """Bytes of logits, and of what is computed from them, that the loss holds at a time: Unsloth's losses go by chunks."""
    eval_bytes_per_logit: int
    """In evaluation, where the CPU backend computes all logits at once for the token accuracy (measured)."""


TRAINING: dict[ProfileName, TrainingValues] = {
    "t4": TrainingValues(
        4,
        optim="adamw_8bit",
        train_sampling_strategy="random",
        padding_free=True,
        pad_to_multiple_of=None,
        dtype="float16",
        memory_limit=15 * GIB,
        runtime=GIB // 2,
        gaps=0.1,
        host_runtime=3 * GIB,
        loss=infer.FUSED_LOSS_GIB * GIB,
        eval_bytes_per_logit=0,
    ),
    "cpu": TrainingValues(
        4,
        optim="adamw_torch_fused",
        train_sampling_strategy="group_by_length",
        padding_free=False,
        pad_to_multiple_of=32,
        dtype=None,
        memory_limit=None,
        runtime=GIB,
        gaps=0.35,
        host_runtime=0,
        loss=3 * 64 * 2**20,
        eval_bytes_per_logit=10,
    ),
}

# Evaluations come before the first step, then after every such share of the steps, the last step included.
EVAL_EVERY = 0.5

# For a plan without the rows: mean tokens of prompt and answer, of 1,494 published ChatDoctor-iCliniq and 1,497 WikiDoc rows
# after cleaning, under Llama 3.2's tokenizer.
MEAN_ROW_TOKENS: dict[data.SourceName, int] = {"conversational": 264, "encyclopedic": 169}

# Seconds that --max-hours keeps for saving, and for each probe question, beside evaluations and the longest step so far.
SAVING_SECONDS = 60
PROBE_SECONDS = 20

# The values that vLLM takes for --max-lora-rank.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

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
    pad: PadName = "native"
    """`native`: the tokenizer's own reserved pad token. `added`: a new one, the story's mistake, for comparison: the embedding
    grows by a row, and the adapter carries it whole, twice."""
    per_device_train_batch_size: int | None = None
    """Rows of a forward pass; times the processes a divisor of 16, since steps always see 16 rows. Unset: the profile's."""
    max_hours: float | None = None
    """Stop in time to be done so many hours after the start, with everything saved; the same line goes on from there."""
    num_probes: int = 5
    """How many probe questions to ask when training is done, the story's five first; the answers stand in samples.jsonl and,
    whatever they are, in the model card."""
    report_to: Tracker = "none"
    """Where the Trainer reports to as well. The package has to be installed."""
    merge: bool = False
    """When the run is done, write base and adapter as one 16-bit model into its folder `merged`. A run that is already done is
    not trained again. The t4 profile fetches the 16-bit base model, 6.4 GB, from the hub."""
    push_to_hub: str | None = None
    """When the run is done, upload the adapter to this hub repository (OWNER/NAME), private at first. Needs the network and a
    token with write rights."""
    restart: bool = False
    """Train again although the run is there; the old folder is kept under another name."""
    dry_run: bool = False
    """Print the plan and stop. No weights are loaded, nothing is written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            problems.append(f"--name {self.name!r}: letters, digits, '.', '_' and '-' are allowed, a letter or digit first.")
        for flag in ("epochs", "learning_rate", "r", "lora_alpha", "max_steps", "max_hours"):
            value = getattr(self, flag)
            if value is not None and not (value > 0 and math.isfinite(value)):
                problems.append(f"--{flag.replace('_', '-')} {value}: a number above 0 is wanted.")
        batch, processes = self.per_device_train_batch_size, data.world_size()
        if EFFECTIVE_BATCH_SIZE % processes:
            problems.append(f"{processes} processes: a divisor of {EFFECTIVE_BATCH_SIZE}, the rows of a step, is wanted.")
        elif batch is not None and (batch < 1 or EFFECTIVE_BATCH_SIZE % (batch * processes)):
            of = f" in {processes} processes" if processes > 1 else ""
            problems.append(
                f"--per-device-train-batch-size {batch}{of}: a divisor of {EFFECTIVE_BATCH_SIZE // processes} is wanted."
            )
        if self.num_probes < 0:
            problems.append(f"--num-probes {self.num_probes}: 0 or more is wanted.")
        if self.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            problems.append(f"--push-to-hub {self.push_to_hub!r}: a hub repository, OWNER/NAME, is wanted.")
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
    optim: str
    train_sampling_strategy: Literal["random", "group_by_length"]
    padding_free: bool
    pad_to_multiple_of: int | None
    use_gradient_checkpointing: Literal["unsloth"] | bool
    pad: PadName

    @property
    def gradient_accumulation_steps(self) -> int:
        """Forward passes of a process before a step: all processes together see `EFFECTIVE_BATCH_SIZE` rows."""
        return EFFECTIVE_BATCH_SIZE // (self.per_device_train_batch_size * data.world_size())

    def count_steps(self, rows: int) -> int:
        """Optimiser steps on so many rows, as the Trainer counts them."""
        batches = math.ceil(rows / (self.per_device_train_batch_size * data.world_size()))
        steps = math.ceil(math.ceil(batches / self.gradient_accumulation_steps) * self.epochs)
        return self.max_steps or steps


def resolve_recipe(config: TrainConfig) -> Recipe:
    """The recipe that the flags and the profile's values give. Raises UsageError as `data.resolve_profile`."""
    profile = data.resolve_profile(config.profile)
    model, training = infer.PROFILES[profile], TRAINING[profile]
    batch = config.per_device_train_batch_size or min(
        training.per_device_train_batch_size, EFFECTIVE_BATCH_SIZE // data.world_size()
    )
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
        optim=training.optim,
        train_sampling_strategy=training.train_sampling_strategy,
        padding_free=training.padding_free,
        pad_to_multiple_of=training.pad_to_multiple_of,
        use_gradient_checkpointing=model.use_gradient_checkpointing,
        pad=config.pad,
    )


# --- The run folder ----------------------------------------------------------------------------------------------


def find_record(folder: Path, recipe: Recipe, data_fingerprint: str) -> dict[str, Any] | None:
    """The record of the run in `folder`, finished or stopped by --max-hours, or None. It is written last: without it, nothing
    there is whole.

    Raises:
        UsageError: the folder holds a run of another recipe, or on other rows, or its record cannot be read.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["numbers"]["planned_steps"], record["numbers"]["steps"]
        there = record["recipe"] | {"data_fingerprint": record["data_fingerprint"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is broken ({error!r}). Keep that run aside and train anew with --restart.") from None
    wanted = dataclasses.asdict(recipe) | {"data_fingerprint": data_fingerprint}
    # Where the rows came from is no matter as long as they are the same, which the fingerprint tells.
    differences = [
        f"  {name}: {there.get(name)!r} there, {wanted.get(name)!r} now"
        for name in sorted((there.keys() | wanted.keys()) - {"conversational", "encyclopedic"})
        if there.get(name) != wanted.get(name)
    ]
    if differences:
        raise UsageError(
            f"{folder} holds a run with other values:\n"
            + "\n".join(differences)
            + "\nChoose another --name, or keep that run aside and train anew with --restart."
        )
    return record


def is_complete(record: Mapping[str, Any]) -> bool:
    """Whether a run went to its last step; one that --max-hours stopped did not."""
    return record["numbers"]["steps"] == record["numbers"]["planned_steps"]


def set_aside(folder: Path) -> None:
    """Renames the folder to the first free `NAME.old-N`."""
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    folder.rename(folder.with_name(f"{folder.name}.old-{number}"))


def commit_id() -> str | None:
    """Commit of the kit's own checkout, or None where it is none."""
    asked = subprocess.run(["git", "-C", str(data.HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


# --- The plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run will be, computed before it: no weights are loaded for it."""

    rows: int
    tokens: int
    """Of prompts and answers, in one pass over the rows."""
    estimated: str | None
    """Why rows and tokens are estimates, or None where they were counted."""
    steps: int
    trainable_parameters: int
    adapter_bytes: int
    """Of adapter_model.safetensors, exact."""
    memory: dict[str, int]
    """Bytes of device memory at the peak of a training step, by part."""
    memory_peak: int
    """The largest of loading, a training step and an evaluation, in bytes of device memory."""
    memory_limit: int
    host_memory: dict[str, int]
    """Bytes of host memory beside the device's, by part; empty where the host is the device."""
    disk: dict[str, int]
    """Bytes to be written, or fetched into the cache, by part."""

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.memory_peak <= self.memory_limit


def build_meta_adapter(recipe: Recipe, dtype: str) -> PeftModel:
    """The base model's architecture with fresh LoRA on it, on torch's `meta` device: shapes and dtypes without memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dataclasses.asdict(infer.PROFILES[recipe.profile].architecture)
    sizes["vocab_size"] += recipe.pad == "added"
    lora = LoraConfig(r=recipe.r, target_modules=TARGET_MODULES[recipe.target_modules], task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(getattr(torch, dtype))
        return get_peft_model(model, lora)


def saved_tensors(model: PeftModel, pad: PadName) -> dict[str, torch.Tensor]:
    """The tensors that an adapter file holds, by name: LoRA's, and both embeddings where a pad token was added."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=pad == "added")


def count_safetensors_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Size of a safetensors file that holds the tensors: 8 bytes, the JSON header padded to a multiple of 8, and the data.

    In the file, tensors of wider dtypes come first, and those of one dtype by name (safetensors' own order); it decides how
    many digits the offsets in the header have.
    """
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = names[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header_bytes = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + math.ceil(header_bytes / 8) * 8 + end


def count_weight_bytes(recipe: Recipe, element_size: int) -> tuple[int, int]:
    """Bytes of the base model's weights as loaded, and in its file.

    4-bit NF4 with double quantisation (Dettmers et al. 2023) takes 4 bits a weight, 8 a block of 64 weights, and 32 a 256
    blocks. The embedding, tied with the head, stays in 16 bits, and so do some layers of Unsloth's dynamic 4-bit files, which
    are not counted here. The small model's file is fp32.
    """
    arch = infer.PROFILES[recipe.profile].architecture
    query, key_value = (heads * arch.head_dim for heads in (arch.num_attention_heads, arch.num_key_value_heads))
    attention = 2 * arch.hidden_size * (query + key_value)
    linear = arch.num_hidden_layers * (attention + 3 * arch.hidden_size * arch.intermediate_size)
    embedding = (arch.vocab_size + (recipe.pad == "added")) * arch.hidden_size * (1 if arch.tie_word_embeddings else 2)
    if recipe.load_in_4bit:
        loaded = int(linear * (1 / 2 + 1 / 64 + 4 / (64 * 256))) + embedding * element_size
        return loaded, loaded
    return (linear + embedding) * element_size, (linear + embedding) * 4


def count_activation_bytes(recipe: Recipe, tokens: int, element_size: int) -> int:
    """Bytes that autograd keeps of one decoder layer for the backward pass of so many tokens.

    Counted off transformers' layer with PEFT's LoRA on all its linear layers, fused attention and without its weights (a test
    counts again): in 16 bits 26 bytes a hidden unit and 8 a feed-forward unit, for norms in fp32, queries, repeated keys and
    values, and the two inputs of each product; in fp32 24 a hidden, 8 a key-value and 16 a feed-forward unit; and LoRA's r
    numbers a module. With LoRA on attention alone the inputs of the feed-forward products are not kept. Unsloth's GPU kernels
    keep less.
    """
    arch = infer.PROFILES[recipe.profile].architecture
    key_value = arch.num_key_value_heads * arch.head_dim
    modules = TARGET_MODULES[recipe.target_modules]
    per_token = 26 * arch.hidden_size if element_size == 2 else 24 * arch.hidden_size + 8 * key_value
    per_token += 4 * element_size * arch.intermediate_size + len(modules) * recipe.r * element_size
    if "down_proj" not in modules:
        per_token -= 4 * arch.hidden_size + element_size * arch.intermediate_size
    return tokens * per_token


def plan_memory(recipe: Recipe, trainable: int, embeddings: int, longest_row: int, element_size: int) -> dict[str, int]:
    """Bytes of device memory at the peak of a training step, by part.

    `embeddings` counts the bytes of an adapter's own embedding. 8-bit Adam keeps two bytes a parameter and a 32-bit scale for
    256 of them (Dettmers et al. 2022), others two 32-bit numbers. With gradient checkpointing one layer at a time is computed
    again and kept, and beside it the gradients of its three feed-forward products.
    """
    arch, training = infer.PROFILES[recipe.profile].architecture, TRAINING[recipe.profile]
    tokens = recipe.per_device_train_batch_size * longest_row
    layer = count_activation_bytes(recipe, tokens, element_size)
    if recipe.use_gradient_checkpointing:
        activations = layer + 3 * tokens * arch.intermediate_size * element_size
    else:
        activations = arch.num_hidden_layers * layer
    return {
        "runtime": training.runtime,
        "base weights": count_weight_bytes(recipe, element_size)[0],
        "LoRA weights": 4 * trainable + embeddings,
        "LoRA gradients": 4 * trainable,
        "optimiser": int(trainable * (2 + 2 * 4 / 256)) if "8bit" in recipe.optim else 8 * trainable,
        "activations": activations,
        "gaps between blocks": int(training.gaps * activations),
        "logits and loss": training.loss,
    }


def training_dtype(recipe: Recipe) -> str:
    """dtype of the base model in training, as the profile or, on this machine, Unsloth chooses it."""
    if TRAINING[recipe.profile].dtype:
        return TRAINING[recipe.profile].dtype
    from unsloth import is_bfloat16_supported

    return "bfloat16" if is_bfloat16_supported() else "float32"


def count_rows(config: TrainConfig, recipe: Recipe) -> tuple[int, int, int, str | None]:
    """`(rows, tokens, longest row, why estimated)` of the mix: counted, or estimated where the hub cannot be reached.

    Raises:
        UsageError: a file of rows cannot be used.
    """
    sources: dict[data.SourceName, str] = config.sources(recipe.profile)
    files = {name: source for name, source in sources.items() if Path(source).suffix in data.FILE_SUFFIXES}
    for name, source in files.items():
        data.load_rows(source, name)  # what is wrong with a file is the user's to mend, and no reason to estimate
    counts, lengths, missing = recipe.wanted, None, None
    try:
        rows = config.load(recipe.profile).train
        counts = {name: sum(row.source == name for row in rows) for name in sources}
        lengths = [len(row["input_ids"]) for row in data.encode_rows(data.load_tokenizer(recipe.profile), rows)[0]]
    except UsageError as error:
        if files.keys() == sources.keys() and recipe.profile == "cpu":
            raise
        missing = str(error).split(". ")[0]
    if lengths is not None:
        return len(lengths), sum(lengths), max(lengths, default=0), None
    tokens = sum(count * MEAN_ROW_TOKENS[name] for name, count in counts.items())
    return sum(counts.values()), tokens, data.MAX_SEQ_LENGTH, missing


def make_plan(recipe: Recipe, dtype: str, rows: int, tokens: int, longest_row: int, estimated: str | None = None) -> Plan:
    """The plan of a run on so many rows, of which the longest has so many tokens, with a base model of this dtype."""
    import psutil
    import torch

    training, arch = TRAINING[recipe.profile], infer.PROFILES[recipe.profile].architecture
    element_size = getattr(torch, dtype).itemsize
    multiple = recipe.pad_to_multiple_of or 1
    longest_row = math.ceil(longest_row / multiple) * multiple
    model = build_meta_adapter(recipe, dtype)
    tensors = saved_tensors(model, recipe.pad)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    embeddings = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if ".lora_" not in name)
    memory = plan_memory(recipe, trainable, embeddings, longest_row, element_size)
    loaded, in_file = count_weight_bytes(recipe, element_size)
    batch_tokens = recipe.per_device_train_batch_size * longest_row
    # Where the host is the device, the file that is read counts as well.
    loading = training.runtime + loaded + (0 if training.host_runtime else in_file)
    evaluation = training.runtime + loaded + training.eval_bytes_per_logit * batch_tokens * arch.vocab_size
    adapter_bytes = count_safetensors_bytes(tensors)
    offloaded = arch.num_hidden_layers * batch_tokens * arch.hidden_size * element_size
    host = {"runtime": training.host_runtime, "activations kept for the GPU": offloaded}
    disk = {"adapter": adapter_bytes, "checkpoint, with --max-hours": adapter_bytes + memory["optimiser"]}
    return Plan(
        rows=rows,
        tokens=tokens,
        estimated=estimated,
        steps=recipe.count_steps(rows),
        trainable_parameters=trainable,
        adapter_bytes=adapter_bytes,
        memory=memory,
        memory_peak=max(sum(memory.values()), loading, evaluation),
        memory_limit=training.memory_limit or psutil.virtual_memory().available // data.local_world_size(),
        host_memory=host if training.host_runtime else {},
        disk={"base model, into the cache, once": in_file, **disk},
    )


def format_plan(plan: Plan, recipe: Recipe, folder: Path) -> str:
    """The plan as plain text for a terminal."""
    import psutil

    def parts(title: str, sizes: Mapping[str, int], total: int, of: int, says: str) -> list[str]:
        lines = [f"{title:<30}{total / GIB:.2f} GiB of {of / GIB:.1f} GiB {says}".rstrip()]
        return lines + [f"  {name:<28}{size / GIB:9.3f} GiB" for name, size in sizes.items()]

    written = existing_parent(folder)
    about = "about " if plan.estimated else ""
    lines = [f"rows, tokens and the longest row are estimates: {plan.estimated}"] if plan.estimated else []
    lines += [
        f"{'rows':<30}{about}{plan.rows:,} of {about}{plan.tokens:,} tokens",
        f"{'steps':<30}{about}{plan.steps:,} of {EFFECTIVE_BATCH_SIZE} rows: {recipe.per_device_train_batch_size} rows x "
        f"{recipe.gradient_accumulation_steps} forward passes x {data.world_size()} processes",
        f"{'trainable parameters':<30}{plan.trainable_parameters:,}",
        f"{'adapter file':<30}{plan.adapter_bytes:,} bytes",
        *parts("device memory", plan.memory, plan.memory_peak, plan.memory_limit, "" if plan.fits else "IS MORE THAN THERE IS"),
    ]
    if plan.host_memory:
        available = psutil.virtual_memory().available
        lines += parts("host memory", plan.host_memory, sum(plan.host_memory.values()), available, "free here")
    lines += parts("disk", plan.disk, sum(plan.disk.values()), shutil.disk_usage(written).free, f"free at {written}")
    lines += [
        f"{'to be written':<30}{folder}/: run.json, metrics.jsonl, samples.jsonl, adapter/; "
        "checkpoint-N/ with --max-hours, merged/ with --merge"
    ]
    return "\n".join(lines)


MEMORY_ADVICE = (
    "Lower --per-device-train-batch-size first (the steps stay those of 16 rows), then --r, or take --target-modules attention."
)


# --- The pad token, guarded --------------------------------------------------------------------------------------


def explain_added_pad(plan: Plan, recipe: Recipe, dtype: str) -> str:
    """What `--pad added` does, said before it does it."""
    native_recipe = dataclasses.replace(recipe, pad="native")
    native = count_safetensors_bytes(saved_tensors(build_meta_adapter(native_recipe, dtype), "native"))
    return (
        f"--pad added: {infer.ADDED_PAD_TOKEN} becomes a new token, the embedding grows by a row, and the adapter file carries "
        f"embedding and head whole: {plan.adapter_bytes:,} bytes, {plan.adapter_bytes / native:.1f} times the {native:,} of "
        "the tokenizer's own pad token. This is the story's mistake, for comparison."
    )


def check_before_training(model: PeftModel, tokenizer: Any, recipe: Recipe) -> None:
    """Checks that only LoRA will be trained and saved, and that pad is a token of the vocabulary that is not eos.

    Raises:
        UsageError: it is not so; the message names what was found.
    """
    rows, vocab_size = model.get_input_embeddings().weight.shape[0], model.config.vocab_size
    expected = infer.PROFILES[recipe.profile].architecture.vocab_size + (recipe.pad == "added")
    lora = model.peft_config["default"]
    others = [name for name, tensor in model.named_parameters() if tensor.requires_grad and ".lora_" not in name]
    problems = []
    if not rows == vocab_size == expected or len(tokenizer) > rows:
        problems.append(
            f"The embedding has {rows:,} rows, the config says {vocab_size:,}, the tokenizer has {len(tokenizer):,} tokens; "
            f"{expected:,} rows are wanted. A token was added, or the base model is another than {recipe.base_model}."
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) or tokenizer.pad_token_id >= rows:
        problems.append(f"Pad is {tokenizer.pad_token!r} ({tokenizer.pad_token_id}); a token of its own is wanted, not eos.")
    if lora.modules_to_save or {"embed_tokens", "lm_head"} & set(lora.target_modules):
        problems.append("The embedding or the head would be trained and saved whole; only LoRA tensors are wanted.")
    if others:
        problems.append(f"{len(others)} tensors other than LoRA's would be trained, the first {others[0]}.")
    if problems:
        raise UsageError(
            "Nothing was trained, for the adapter would not be what was planned:\n"
            + "\n".join(problems)
            + "\nInstall the pinned packages again (pip install --no-deps -r requirements.txt), and clear the model's cache."
        )


def check_saved(weights: Path, plan: Plan, pad: PadName) -> None:
    """Checks that an adapter file holds the planned tensors and no others.

    Raises:
        UsageError: it holds others, or its size is more than 2% off the plan.
    """
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        names = list(file.keys())
    others = [name for name in names if ".lora_" not in name]
    size = weights.stat().st_size
    if (others and pad == "native") or abs(size - plan.adapter_bytes) > 0.02 * plan.adapter_bytes:
        raise UsageError(
            f"{weights} is not what was planned: {size:,} bytes, planned {plan.adapter_bytes:,}; tensors other than LoRA's: "
            f"{', '.join(others) or 'none'}. It was not put in place as the adapter. An embedding in it means that a token was "
            "added to the tokenizer: use the base model's own pad token (--pad native) and train again with --restart."
        )


def existing_parent(folder: Path) -> Path:
    """The nearest folder above `folder` that is there: on its disk the run will be written."""
    return next(parent for parent in folder.resolve().parents if parent.exists())


def keep_metrics(path: Path, last_step: int) -> None:
    """Drops the lines after `last_step` from a file of metrics: a run that goes on from there writes them again."""
    if last_step < 0:
        path.unlink(missing_ok=True)
    elif path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
        data.write_whole(path, "".join(kept))


# --- Training ----------------------------------------------------------------------------------------------------


def make_sft_config(recipe: Recipe, folder: Path, report_to: Tracker = "none") -> SFTConfig:
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
        eval_accumulation_steps=None,
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
        padding_free=recipe.padding_free,
        pad_to_multiple_of=recipe.pad_to_multiple_of,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=1,
        # A loss that is no number has to show.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="no",
        eval_strategy="steps",
        eval_steps=EVAL_EVERY,
        # By the Trainer, once the model is wrapped: after a call of `evaluate` before training, accelerate takes the model for
        # prepared and does not wrap it, so that several processes would train on their own (a test compares them with one).
        eval_on_start=True,
        save_strategy="no",
        report_to=report_to,
        disable_tqdm=True,
        dataloader_num_workers=0,
        torch_empty_cache_steps=None,
        ddp_find_unused_parameters=False,
    )


def add_lora(model: Any, recipe: Recipe) -> PeftModel:
    """`model` with fresh LoRA matrices; nothing but them is trainable."""
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        model,
        r=recipe.r,
        target_modules=TARGET_MODULES[recipe.target_modules],
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing=recipe.use_gradient_checkpointing,
        random_state=recipe.seed,
        use_rslora=False,
        modules_to_save=None,
        init_lora_weights=True,
    )


def release_freed_memory() -> None:
    """Gives freed memory back to the system: glibc keeps it, in gaps that batches of other lengths do not fit into."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def make_progress_callback(metrics_path: Path) -> TrainerCallback:
    """Shows a live bar of steps on stderr, and writes one line a log to `metrics_path`; in the main process alone."""
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
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                mininterval=interval,
                disable=not data.is_main_process(),
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)
            release_freed_memory()

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            release_freed_memory()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if not data.is_main_process():
                return
            known = {name: logs[key] for key, name in names.items() if key in logs}
            if not known:
                return
            line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **known}
            with metrics_path.open("a", encoding="utf-8") as metrics:
                metrics.write(json.dumps(line) + "\n")
            if "eval_loss" in logs:
                tqdm.write(f"step {state.global_step}: eval_loss {logs['eval_loss']:.4f}", file=sys.stderr)
            elif "loss" in logs and self.bar:
                self.bar.set_postfix(train_loss=f"{logs['loss']:.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return ProgressCallback()


def make_time_limit_callback(deadline: float) -> TrainerCallback:
    """Ends training with a checkpoint while there is time left for one more step and an evaluation.

    `deadline` is a reading of `time.monotonic`. Processes that train together stop at the same step.
    """
    import torch
    from transformers import TrainerCallback

    class TimeLimitCallback(TrainerCallback):
        """Watches the clock at the end of every step."""

        longest_step = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.monotonic()
            self.longest_step = max(self.longest_step, now - self.began)
            evaluation = max(log.get("eval_runtime", 0.0) for log in state.log_history)
            # One at the end, and one before the next step where it is due.
            evaluations = evaluation * (1 + control.should_evaluate)
            late = now + self.longest_step + evaluations > deadline
            if torch.distributed.is_initialized():
                votes = torch.tensor([late], dtype=torch.int32, device=args.device)
                torch.distributed.all_reduce(votes)
                late = bool(votes.item())
            if late and state.global_step < state.max_steps:
                control.should_training_stop = control.should_save = True

    return TimeLimitCallback()


class LikeLengthsSampler:
    """Order of the rows of an epoch, in which rows of like length share a step. It depends on seed and epoch alone.

    The Trainer's own sampler groups by the batch of a process, so that two processes would see other steps than one, and draws
    from the global generator, which whatever else is drawn there moves on.
    """

    def __init__(self, lengths: Sequence[int], seed: int) -> None:
        self.lengths, self.seed, self.epoch = list(lengths), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, EFFECTIVE_BATCH_SIZE, generator=generator))


def make_trainer(
    model: PeftModel,
    tokenizer: Any,
    recipe: Recipe,
    train: Dataset,
    held_out: Dataset,
    folder: Path,
    report_to: Tracker = "none",
) -> SFTTrainer:
    """TRL's trainer on encoded rows, with our progress in place of its printing."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        """TRL's trainer with our order of rows; rows to be evaluated keep their own."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if recipe.train_sampling_strategy == "group_by_length":
                return LikeLengthsSampler([len(ids) for ids in self.train_dataset["input_ids"]], recipe.seed)
            return super()._get_train_sampler(train_dataset)

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            from torch.utils.data import SequentialSampler

            return SequentialSampler(eval_dataset)

    trainer = Trainer(
        model=model,
        processing_class=tokenizer,
        args=make_sft_config(recipe, folder, report_to),
        train_dataset=train,
        eval_dataset=held_out,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(make_progress_callback(folder / "metrics.jsonl"))
    return trainer


def train_and_evaluate(trainer: SFTTrainer, deadline: float | None, checkpoint: Path | None) -> dict[str, Any]:
    """Trains, from `checkpoint` on if there is one; returns the run's numbers: eval losses, accuracy, steps and seconds.

    Raises:
        UsageError: the GPU's memory was not enough.
    """
    import torch

    if deadline:
        trainer.add_callback(make_time_limit_callback(deadline))
    trainer.args.eval_on_start = checkpoint is None
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise UsageError(f"Out of memory ({str(error).splitlines()[0]}). {MEMORY_ADVICE}") from error
    seconds = time.monotonic() - started
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    if evaluations[-1]["step"] < trainer.state.global_step:
        trainer.evaluate()
        evaluations.append(trainer.state.log_history[-1])
    return {
        "eval_loss_before": evaluations[0]["eval_loss"],
        "eval_loss": evaluations[-1]["eval_loss"],
        "mean_token_accuracy": evaluations[-1].get("eval_mean_token_accuracy"),
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "training_seconds": round(seconds, 1),
        "peak_memory": peak_memory_bytes(trainer.args.device),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most device memory that this process has held so far: torch's on a GPU, else the whole process's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ask_probes(model: PeftModel, tokenizer: Any, base_model: str, adapter: Path, num_probes: int) -> list[infer.Answer]:
    """What the model answers to the first probe questions right after training.

    One by one and in the dtype that it was trained in, which is quick; `infer.py` asks in a dtype and in rows that make answers
    repeatable, and may choose other words.
    """
    from tqdm import tqdm
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    digest = infer.adapter_digest(adapter)
    loaded = infer.LoadedModel(model, tokenizer, base_model, min_rows=1, adapter=adapter, adapter_sha256=digest)
    requests = [infer.Request(question, infer.DECODINGS["kit"]) for question in data.read_probes()[:num_probes]]
    with tqdm(
        total=sum(request.decoding.max_new_tokens for request in requests), unit="token", desc="asking", disable=not requests
    ) as bar:
        return infer.answer_requests(loaded, requests, bar.update)


# --- What a run leaves -------------------------------------------------------------------------------------------


def save_adapter(model: PeftModel, tokenizer: Any, folder: Path, record: infer.AdapterRecord, plan: Plan, hub_id: str) -> int:
    """Writes the adapter folder, whole or not at all, and returns the bytes of its weights.

    The record's decoding goes with it: into generation_config.json, which other programs read, and whole into our own record,
    since that file cannot say that the penalty does not count the prompt.

    Raises:
        UsageError: as `check_saved`.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    # Where others find the base model; what we loaded may be a folder of this machine's cache.
    model.peft_config["default"].base_model_name_or_path = hub_id
    # Not "auto", which would look the base model up on the hub to see whether its embedding grew.
    model.save_pretrained(part, save_embedding_layers=record.pad == "added")
    check_saved(part / "adapter_model.safetensors", plan, record.pad)
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


def describe_source(source: str) -> str:
    """A source of rows as a card names it, with its licence: of a file only the name, for its folder is nobody's business."""
    path = Path(source)
    name, key = (path.name, str(path.resolve())) if path.is_file() else (source, source.partition("@")[0])
    return f"{name} (licence: {data.LICENCES.get(key, 'not known to the kit')})"


def format_vllm_command(recipe: Recipe, adapter: str, decoding: infer.Decoding) -> str:
    """The line that serves the adapter with vLLM under the decoding, as far as vLLM knows its values."""
    values = {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "repetition_penalty": decoding.repetition_penalty,
        "max_new_tokens": decoding.max_new_tokens,
    }
    rank = next((rank for rank in VLLM_RANKS if rank >= recipe.r), recipe.r)
    return (
        f"vllm serve {infer.PROFILES[recipe.profile].hub_id} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules medical={adapter} --chat-template {adapter}/chat_template.jinja "
        f"--override-generation-config '{json.dumps(values)}'"
    )


def format_card_answers(answers: Sequence[infer.Answer]) -> list[str]:
    """Lines of markdown with every answer, and of each whether it ended; as HTML, so that no text is read as markdown."""
    ended = sum(answer.finish_reason == "stop" for answer in answers)
    lines = [
        "## Answers",
        "",
        f"All {len(answers)} questions that were asked right after training, whatever came out; {ended} ended by the stop "
        f"token. Decoding: {infer.describe_decoding(infer.DECODINGS['kit'])}. *rep-4* is the share of 4-word sequences that "
        "occurred before.",
        "",
    ]
    for answer in answers:
        how = "ended" if answer.finish_reason == "stop" else f"**cut at the cap of {answer.answer_tokens} tokens**"
        rep_4 = infer.rep_n(re.findall(r"\w+", answer.text.lower()), 4)
        lines += [f"**{html.escape(answer.question, quote=False)}** ({how}; rep-4 {rep_4:.2f})", ""]
        lines += [f"<pre>{html.escape(answer.text, quote=False)}</pre>", ""]
    return lines


def make_card(recipe: Recipe, record: Mapping[str, Any], answers: Sequence[infer.Answer]) -> str:
    """The model card (markdown): recipe, data with licences, losses, every probe answer, versions, how to ask."""
    profile, numbers, decoding = infer.PROFILES[recipe.profile], record["numbers"], infer.DECODINGS["kit"]
    sources = {"conversational": recipe.conversational, "encyclopedic": recipe.encyclopedic}
    stopped = "" if is_complete(record) else f" of {numbers['planned_steps']} planned (--max-hours)"
    table = {
        "base model": f"{profile.hub_id}, {'4-bit NF4' if recipe.load_in_4bit else '16 or 32 bits'}",
        "LoRA": f"r {recipe.r}, alpha {recipe.lora_alpha}, dropout 0, on {', '.join(TARGET_MODULES[recipe.target_modules])}",
        "rows": f"{numbers['train_rows']:,} of {numbers['train_tokens']:,} tokens, mix {recipe.mix}; loss on the answers only",
        "steps": f"{numbers['steps']:,} of {EFFECTIVE_BATCH_SIZE} rows{stopped}, learning rate {recipe.learning_rate:g}, "
        f"linear, {recipe.optim}, seed {recipe.seed}",
        "pad token": recipe.pad,
        "eval loss": f"{numbers['eval_loss_before']:.4f} before, {numbers['eval_loss']:.4f} after, on {numbers['eval_rows']} "
        "rows held out",
    }
    lines = [
        "---",
        f"base_model: {profile.hub_id}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        f"license: {profile.licence}",
        "tags: [lora, unsloth, medical]",
        "---",
        "",
        "# LoRA adapter for medical questions",
        "",
        "**No medical advice.** A small language model writes these answers; it makes things up, and no physician has reviewed "
        "rows or answers.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in table.items()),
        "",
        "## Data",
        "",
        *(f"- {name}: {describe_source(source)}" for name, source in sources.items() if recipe.wanted[name]),
        "",
        *format_card_answers(answers),
        "## Asking",
        "",
        'With the kit that made it: `python infer.py --adapter FOLDER "question"`. With vLLM, whose penalty counts the prompt '
        f'too, so that answers differ; add `"chat_template_kwargs": {{"date_string": "{data.TEMPLATE_DATE}"}}` and the '
        f'system prompt "{data.SYSTEM_PROMPT}" to each request:',
        "",
        "```sh",
        format_vllm_command(recipe, "FOLDER", decoding),
        "```",
        "",
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()) + f"; kit commit {record['commit']}",
        "",
    ]
    return "\n".join(lines)


def prepare_trainer(recipe: Recipe, mix: data.Mix, folder: Path, report_to: Tracker) -> tuple[SFTTrainer, Any, dict, Plan]:
    """Loads the model, encodes the rows, and returns `(trainer, tokenizer, audit, plan)`, all checked.

    Raises:
        UsageError: every row is too long, or the model is not what was planned.
    """
    model, tokenizer = infer.load_base(recipe.profile, dtype=None)
    import datasets

    datasets.disable_progress_bars()
    audit = data.audit_mix(mix, tokenizer)
    print(data.format_audit(audit))
    train, held_out = (data.encode_rows(tokenizer, rows)[0] for rows in (mix.train, mix.eval))
    if not train or not held_out:
        raise UsageError(f"Every row is longer than {data.MAX_SEQ_LENGTH} tokens. Give shorter rows.")
    # Rows of like length are evaluated together: the order is the same whatever the batch, and little is padded.
    held_out.sort(key=lambda row: len(row["input_ids"]))
    dtype = str(model.dtype).removeprefix("torch.")
    sizes = [audit[name] for name in ("train_rows", "train_tokens", "longest_row")]
    plan = make_plan(recipe, dtype, *sizes)
    print(f"\n{format_plan(plan, recipe, folder)}", flush=True)
    if not plan.fits and data.is_main_process():
        print(f"This may run out of memory. {MEMORY_ADVICE}", file=sys.stderr)
    with infer.quiet_libraries():
        if recipe.pad == "added":
            if data.is_main_process():
                print(explain_added_pad(plan, recipe, dtype), file=sys.stderr)
            infer.add_pad_token(model, tokenizer)
        model = add_lora(model, recipe)
        check_before_training(model, tokenizer, recipe)
        rows = (datasets.Dataset.from_list(each) for each in (train, held_out))
        trainer = make_trainer(model, tokenizer, recipe, *rows, folder, report_to)
    return trainer, tokenizer, audit, plan


def run(
    config: TrainConfig, recipe: Recipe, mix: data.Mix, folder: Path, deadline: float | None, checkpoint: Path | None
) -> dict[str, Any]:
    """One training run into `folder`, from `checkpoint` on if there is one; returns the record that run.json holds.

    Raises:
        UsageError: as `prepare_trainer`, `train_and_evaluate` and `save_adapter`.
    """
    trainer, tokenizer, audit, plan = prepare_trainer(recipe, mix, folder, config.report_to)
    if data.is_main_process():
        keep_metrics(folder / "metrics.jsonl", int(checkpoint.name.partition("-")[2]) if checkpoint else -1)
    numbers = train_and_evaluate(trainer, deadline, checkpoint)
    numbers |= {name: audit[name] for name in ("train_rows", "train_tokens", "eval_rows")}
    numbers |= {"trainable_parameters": plan.trainable_parameters, "planned_memory": plan.memory_peak}
    adapter_record = infer.AdapterRecord(
        recipe.base_model, recipe.profile, data.prompt_fingerprint(tokenizer), infer.DECODINGS["kit"], recipe.pad
    )
    record = {
        "recipe": dataclasses.asdict(recipe),
        "argv": sys.argv,
        "world_size": data.world_size(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF} | {"python": platform.python_version()},
        "commit": commit_id(),
        "data_fingerprint": mix.fingerprint,
        "prompt_fingerprint": adapter_record.prompt_fingerprint,
        "numbers": numbers,
    }
    if data.is_main_process():
        # The weights first: what comes after is only talk about them.
        adapter, hub_id = folder / "adapter", infer.PROFILES[recipe.profile].hub_id
        numbers["adapter_bytes"] = save_adapter(trainer.model, tokenizer, adapter, adapter_record, plan, hub_id)
        answers = ask_probes(trainer.model, tokenizer, recipe.base_model, adapter, config.num_probes)
        lines = (json.dumps({"step": numbers["steps"], **answer.to_record()}, ensure_ascii=False) for answer in answers)
        data.write_whole(folder / "samples.jsonl", "".join(line + "\n" for line in lines))
        data.write_whole(adapter / "README.md", make_card(recipe, record, answers))
    return record


def describe_result(folder: Path, recipe: Recipe, numbers: Mapping[str, Any]) -> str:
    """What came out of a run, where it lies, and what to do next."""
    lines = [
        f"eval loss {numbers['eval_loss_before']:.4f} before, {numbers['eval_loss']:.4f} after {numbers['steps']} steps "
        f"({numbers['training_seconds'] / 60:.1f} minutes)",
        f"memory    {numbers['peak_memory'] / GIB:.2f} GiB at the peak, {numbers['planned_memory'] / GIB:.2f} planned",
        f"adapter   {folder / 'adapter'} ({numbers['adapter_bytes']:,} bytes, as planned)",
        f"record    {folder / 'run.json'}, {folder / 'metrics.jsonl'}; answers {folder / 'samples.jsonl'}",
    ]
    if numbers["steps"] < numbers["planned_steps"]:
        stopped = f"Stopped by --max-hours after {numbers['steps']} of {numbers['planned_steps']} steps"
        return "\n".join([*lines, f"{stopped}; the same line (without --restart) goes on."])
    return "\n".join(
        [
            *lines,
            "A lower loss is not a better answer. Read some:",
            '  python infer.py "What are the warning signs of a heart attack?"',
            "  python ablate.py",
            "or serve it:",
            f"  {format_vllm_command(recipe, str(folder / 'adapter'), infer.DECODINGS['kit'])}",
        ]
    )


# --- Out of the kit ----------------------------------------------------------------------------------------------


def check_exports(config: TrainConfig, recipe: Recipe, folder: Path) -> None:
    """Checks before anything starts what the flags will need at the end: packages, network, a token, disk.

    Raises:
        UsageError: something is missing; the message says what.
    """
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UsageError(
            f"--report-to {config.report_to}: it is not installed. pip install {config.report_to}, or leave it away."
        )
    if config.push_to_hub:
        from huggingface_hub import HfApi

        try:
            HfApi().whoami()
        except Exception as error:
            raise UsageError(
                f"--push-to-hub {config.push_to_hub} needs the network and a token with write rights ({type(error).__name__}). "
                "Log in once (hf auth login, or set HF_TOKEN), or leave the flag away."
            ) from None
    if config.merge:
        arch = infer.PROFILES[recipe.profile].architecture
        weights = 2 * count_weight_bytes(dataclasses.replace(recipe, load_in_4bit=False), 1)[0]
        # A model that was loaded in 4 bits is merged into its 16-bit original, which is fetched for it.
        needed = weights * (2 if recipe.load_in_4bit else 1)
        free = shutil.disk_usage(existing_parent(folder)).free
        if needed > free:
            raise UsageError(
                f"--merge needs {needed / GIB:.1f} GiB of disk for {arch.num_hidden_layers} layers in 16 bits, and "
                f"{free / GIB:.1f} GiB are free. Make room, or leave the flag away: the adapter works without it."
            )
        if recipe.load_in_4bit and not data.reaches_hub():
            raise UsageError("--merge fetches the 16-bit base model from the hub, which cannot be reached. Go online first.")


def make_modelfile(tokenizer: Any, decoding: infer.Decoding) -> str:
    """A Modelfile that makes an Ollama model of the folder it lies in, under our prompt and the decoding's values.

    The template is what the tokenizer's own chat template renders around a system prompt and a question, less the
    beginning-of-text token where the tokenizer puts one before any text: Ollama does so too.
    """
    messages = [{"role": "system", "content": "{{ .System }}"}, {"role": "user", "content": "{{ .Prompt }}"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=data.TEMPLATE_DATE)
    prompt = prompt.removeprefix(tokenizer.decode(tokenizer("")["input_ids"]))
    stop = tokenizer.convert_ids_to_tokens(infer.end_of_turn_id(tokenizer))
    return "\n".join(
        [
            "# ollama create medical -f Modelfile && ollama run medical",
            "# Ollama's penalty counts the prompt too, and the kit's does not: answers differ from infer.py's.",
            "FROM .",
            f'TEMPLATE """{prompt}{{{{ .Response }}}}{stop}"""',
            f'SYSTEM """{data.SYSTEM_PROMPT}"""',
            f'PARAMETER stop "{stop}"',
            f"PARAMETER temperature {decoding.temperature:g}",
            f"PARAMETER top_p {decoding.top_p:g}",
            f"PARAMETER repeat_penalty {decoding.repetition_penalty:g}",
            "PARAMETER repeat_last_n -1",
            f"PARAMETER num_predict {decoding.max_new_tokens}",
            f"PARAMETER num_ctx {data.MAX_SEQ_LENGTH}",
            "",
        ]
    )


def merge_adapter(recipe: Recipe, folder: Path) -> Path:
    """Writes base and adapter of a finished run as one 16-bit model, with an Ollama Modelfile; returns its folder.

    Raises:
        UsageError: as `infer.load_base`.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    profile = infer.PROFILES[recipe.profile]
    model, tokenizer = infer.load_base(recipe.profile, dtype=profile.dtype)
    merged, part = folder / "merged", folder / ".merged.part"
    shutil.rmtree(part, ignore_errors=True)
    with infer.quiet_libraries():
        if recipe.pad == "added":
            infer.add_pad_token(model, tokenizer)
        model = add_lora(model, recipe)
        set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
        model.save_pretrained_merged(str(part), tokenizer, save_method="merged_16bit")
    (part / "Modelfile").write_text(make_modelfile(tokenizer, infer.DECODINGS["kit"]), encoding="utf-8")
    shutil.rmtree(merged, ignore_errors=True)
    part.rename(merged)
    return merged


def push_adapter(adapter: Path, repo_id: str) -> str:
    """Uploads the adapter folder, card and all, to a hub repository, which is made private if it is new; returns its URL.

    Raises:
        UsageError: the hub refused it, or could not be reached any more.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=adapter, commit_message="LoRA adapter and its card")
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UsageError(
            f"{adapter} is whole, but could not be uploaded to {repo_id} ({str(error).splitlines()[0]}). "
            "Once that is mended, the same line uploads it without training again."
        ) from None
    return str(url)


# --- Command -----------------------------------------------------------------------------------------------------


def default_name(recipe: Recipe) -> str:
    """Folder of a run that was given no --name."""
    return f"{recipe.profile}-{recipe.mix}-{recipe.target_modules}" + ("-pad-added" if recipe.pad == "added" else "")


def train_unless_done(config: TrainConfig, recipe: Recipe, folder: Path, deadline: float | None) -> dict[str, Any]:
    """The record of the run in `folder`, after training it, or going on with it, where it is not finished yet.

    Raises:
        UsageError: as `find_record` and `run`, or what a stopped or finished run left is not there any more.
    """
    mix = config.load(recipe.profile)
    record = None if config.restart else find_record(folder, recipe, mix.fingerprint)
    checkpoint = None
    if record:
        numbers = record["numbers"]
        if not (folder / "adapter" / "adapter_model.safetensors").is_file():
            raise UsageError(f"{folder} is recorded, but its adapter is gone. Put it back, or train anew with --restart.")
        if is_complete(record):
            if data.is_main_process():
                data.write_whole(infer.LATEST, folder.name + "\n")
            print(f"{folder} is already trained with these values (--restart trains it again).")
            return record
        checkpoint = folder / f"checkpoint-{numbers['steps']}"
        if not (checkpoint / "trainer_state.json").is_file():
            raise UsageError(
                f"{folder} was stopped after step {numbers['steps']} of {numbers['planned_steps']}, and {checkpoint.name}, "
                "from which it would go on, is gone. Put it back, or train anew with --restart."
            )
        print(f"going on with {folder} after step {numbers['steps']} of {numbers['planned_steps']}")
    if data.is_main_process():
        if folder.exists() and config.restart:
            set_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
    earlier = record["numbers"]["training_seconds"] if record else 0
    record = run(config, recipe, mix, folder, deadline, checkpoint)
    record["numbers"]["training_seconds"] += earlier
    if data.is_main_process():
        data.write_whole(folder / "run.json", json.dumps(record, indent=2) + "\n")
        data.write_whole(infer.LATEST, folder.name + "\n")
        # TRL's card, which it writes beside a checkpoint; ours lies with the adapter.
        (folder / "README.md").unlink(missing_ok=True)
        for old in folder.glob("checkpoint-*"):
            if old.name != f"checkpoint-{record['numbers']['steps']}" or is_complete(record):
                shutil.rmtree(old)
    return record


def main(config: TrainConfig) -> None:
    """Resolves the recipe, prints it and the plan, trains, exports, and prints what came out."""
    reserve = SAVING_SECONDS + PROBE_SECONDS * config.num_probes
    deadline = time.monotonic() + 3600 * config.max_hours - reserve if config.max_hours else None
    infer.prepare_cublas()
    if not data.is_main_process():
        sys.stdout = io.StringIO()  # rank 0 alone prints
    recipe = resolve_recipe(config)
    folder = infer.TRAIN_RUNS / (config.name or default_name(recipe))
    for name, value in dataclasses.asdict(recipe).items():
        print(f"{name:<30}{value}")
    print(f"{'run folder':<30}{folder}", flush=True)
    from_files = all(Path(source).is_file() for source in (recipe.conversational, recipe.encyclopedic))
    needs_hub = recipe.profile != "cpu" or not from_files or config.push_to_hub
    infer.prepare_environment(recipe.profile, offline=not needs_hub or not data.reaches_hub())
    if config.dry_run:
        with infer.quiet_libraries():
            dtype = training_dtype(recipe)  # before the rows' tokenizer: Unsloth wants to be imported first
            plan = make_plan(recipe, dtype, *count_rows(config, recipe))
        print(format_plan(plan, recipe, folder))
        if recipe.pad == "added":
            print(explain_added_pad(plan, recipe, dtype), file=sys.stderr)
        return
    check_exports(config, recipe, folder)
    if config.report_to == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    record = train_unless_done(config, recipe, folder, deadline)
    if not data.is_main_process():
        return
    print(describe_result(folder, recipe, record["numbers"]))
    if (config.merge or config.push_to_hub) and not is_complete(record):
        print("Neither merged nor uploaded: that waits until the run has gone on to its end.")
        return
    if config.merge:
        print(f"merged    {merge_adapter(recipe, folder)}, with a Modelfile for Ollama")
    if config.push_to_hub:
        print(f"uploaded  {push_adapter(folder / 'adapter', config.push_to_hub)} (private, if it is new)")


if __name__ == "__main__":
    data.run_command(TrainConfig, main, __doc__)
