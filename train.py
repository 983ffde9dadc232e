"""Fine-tunes the base model with LoRA on the answers, and keeps the weights that answer best.

    python train.py --epochs 2                       train; the same command resumes
    python train.py --rows my.jsonl --name mine      on your own rows
    python train.py --mix week4 --target-modules attention
    python train.py --profile t4 --dry-run           print the plan; loads no weights
    python train.py --max-hours 8.5                  end within 8.5 hours, with everything saved
    python train.py --merge                          also write one 16-bit model for other programs
    torchrun --nproc_per_node 2 train.py             on two GPUs

Writes to runs/train/NAME: adapter/, which `infer.py` uses by default, run.json, metrics.jsonl,
samples/STEP.jsonl and curves.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

import data
import infer
from data import Profile, UsageError
from infer import PadName

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState
    from trl import SFTConfig, SFTTrainer

TargetModules = Literal["attention", "all-linear"]
Metric = Literal["answers", "eval_loss", "rouge_l"]
Checkpointing = Literal["unsloth"] | bool
# A switch without a --no- counterpart.
Switch = tyro.conf.FlagCreatePairsOff[bool]
Log = Mapping[str, Any]

# The story suspected attention-only LoRA: attention routes, the feed-forward layers store facts.
TARGET_MODULES: dict[TargetModules, list[str]] = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
METRICS: dict[Metric, str] = {
    "answers": "eval_quality",
    "eval_loss": "eval_loss",
    "rouge_l": "eval_rouge_l",
}
ROWS_PER_STEP = 16
# Exit codes for ablate.py: the folder contains a run with other values, or another process is
# writing to it.
OTHER_VALUES, BUSY = 3, 75
# The file of a checkpoint that the Trainer writes last.
STATE = "trainer_state.json"
# Flags that do not change what is learned, except for rounding.
NOT_IN_RECIPE = """name output_dir max_hours save_minutes merge gguf push_to_hub restart dry_run
    rows question_column answer_column conversational encyclopedic gradient_checkpointing
    no_load_in_4bit per_device_train_batch_size gradient_accumulation_steps""".split()

# As stated by the publishers of the rows.
LICENCES = {
    data.HUB_IDS["chatdoctor"]: "none stated",
    data.HUB_IDS["wikidoc"]: "cc, variant not named",
    data.PROFILES["cpu"].conversational: "Apache-2.0",
    data.PROFILES["cpu"].encyclopedic: "Apache-2.0",
}

MEMORY_ADVICE = (
    "Lower --per-device-train-batch-size (a step keeps its rows), pass --gradient-checkpointing, "
    "lower --r, or use --target-modules attention, in this order. The same command resumes; with "
    "another --r or --target-modules, choose another --name."
)

CARD = """---
{{ card_data }}
---

# LoRA adapter for medical questions

**Not medical advice.** A small language model wrote these answers. It makes things up, and no
physician has reviewed the rows or the answers.

| | |
|---|---|
{% for name, value in values.items() %}| {{ name }} | {{ value }} |
{% endfor %}
## Training rows
{% for name, source, licence in sources %}
- {{ name }}: {{ source }} (license: {{ licence }})
{%- endfor %}

## Answers

All {{ samples|length }} probe questions at the step of these weights. A verdict is about the form
of an answer, and points count words of a list. Neither says that an answer is correct.
{% for sample in samples %}
**{{ sample.question|e }}** ({{ sample.verdict|e }}; {{ sample.finish_reason }}; {{ sample.facts }})

<pre>{{ sample.text|e|replace("\\n", "&#10;") }}</pre>
{% endfor %}
## Usage

`python infer.py --adapter FOLDER "question"`. System prompt: `{{ system_prompt }}`

## Versions

{% for name, version in versions.items() %}{{ name }} {{ version }}, {% endfor %}commit {{ commit }}
"""


# --- Flags ---------------------------------------------------------------------------------------


def world_size() -> int:
    """Number of processes that train together, as set by torchrun; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes and prints."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class TrainConfig(data.RowsConfig):
    """Flags of train.py."""

    name: str | None = None
    """Name of the run's folder. Unset: profile, rows and target modules."""
    output_dir: Path = infer.TRAIN_RUNS
    """Folder for runs. Only a run in runs/train becomes the default of `infer.py`."""
    adapter: str | None = None
    """Folder or hub id of an adapter to continue from. Its r, alpha and modules are used."""
    epochs: float = 1.0
    """Passes over the rows."""
    max_steps: int | None = None
    """Number of optimizer steps, overriding --epochs."""
    learning_rate: float = 2e-4
    """Peak learning rate, after a warm-up over 3% of the steps."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Schedule of the learning rate after the warm-up."""
    target_modules: TargetModules = "all-linear"
    """`attention` is q, k, v, o; `all-linear` adds gate, up, down."""
    r: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: int = 32
    """The LoRA update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout of the LoRA input."""
    pad: PadName = "native"
    """`native`: the tokenizer's own pad token. `added`: a new token, the story's mistake, for
    comparison; the adapter then contains the whole embedding, twice."""
    max_seq_length: int = data.MAX_SEQ_LENGTH
    """Maximum tokens of a row. Longer rows lose their last turns, or are dropped."""
    per_device_train_batch_size: int | None = None
    """Rows per forward pass of a process. Unset: the profile's."""
    gradient_accumulation_steps: int | None = None
    """Forward passes per optimizer step. Unset: as many as needed for 16 rows."""
    load_in_4bit: Switch = False
    """Quantize the base model to 4-bit NF4; needs a GPU. Without either switch: the profile's."""
    no_load_in_4bit: Switch = False
    """Load the base model in 16 bits."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the backward pass to save memory. Unset: on a GPU, if necessary."""
    num_probes: int | None = None
    """Probe questions answered and judged at each evaluation; 0 for none. Unset: the profile's."""
    eval_every: float | None = None
    """Share of the steps between two evaluations. Unset: the profile's."""
    metric_for_best_model: Metric = "answers"
    """Selects the evaluation whose weights are kept. `answers`: most sound answers, then most
    points, then lowest eval loss. `rouge_l`: ROUGE-L of answers to held-out questions."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row that do not improve --metric-for-best-model."""
    max_hours: float | None = None
    """End within this many hours, with everything saved. The same command resumes."""
    save_minutes: float = 5.0
    """Minutes between two checkpoints; 0 saves after every step."""
    merge: bool = False
    """Also write base model and adapter as one 16-bit model, with an Ollama Modelfile."""
    gguf: str | None = None
    """Also write a GGUF file, quantized by this method (q4_k_m); downloads and builds llama.cpp."""
    push_to_hub: str | None = None
    """Also upload the adapter to this hub repository (OWNER/NAME), private if it is new."""
    restart: bool = False
    """Train from the beginning. An existing run is kept under another name."""
    dry_run: bool = False
    """Print the plan and stop. Loads no weights, writes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []

        def check(name: str, valid: object, allowed: str) -> None:
            if not valid:
                flag = f"--{name.replace('_', '-')} {getattr(self, name)!r}"
                problems.append(f"{flag}: expected {allowed}")

        for name in ("epochs", "learning_rate", "r", "lora_alpha", "max_steps", "max_hours"):
            value = getattr(self, name)
            check(name, value is None or 0 < value < math.inf, "a number above 0.")
        for name in ("early_stopping_patience", "gradient_accumulation_steps"):
            value = getattr(self, name)
            check(name, value is None or value >= 1, "1 or more.")
        check("name", self.name is None or infer.RUN_NAME.fullmatch(self.name), infer.RUN_NAME_RULE)
        # The smaller side of the largest base model's narrowest LoRA module.
        check("r", self.r <= 1024, "1 to 1024, the rank of the modules themselves.")
        check("lora_dropout", 0 <= self.lora_dropout < 1, "0 or more, and below 1.")
        check("max_seq_length", 32 <= self.max_seq_length <= 8192, "32 to 8192.")
        check("save_minutes", 0 <= self.save_minutes < math.inf, "0 or more.")
        most = len(infer.read_probes(self.probes))
        check("num_probes", 0 <= (self.num_probes or 0) <= most, f"0 to {most}.")
        share = 0.5 if self.eval_every is None else self.eval_every
        check("eval_every", 0 < share < 1, "a share between 0 and 1.")
        repository = re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub or "a/b")
        check("push_to_hub", repository, "a hub repository, OWNER/NAME.")
        check("load_in_4bit", not (self.load_in_4bit and self.no_load_in_4bit), "one of the two.")
        batch = 1 if self.per_device_train_batch_size is None else self.per_device_train_batch_size
        rows = batch * world_size()
        if rows <= 0 or (ROWS_PER_STEP % rows and not self.gradient_accumulation_steps):
            problems.append(
                f"--per-device-train-batch-size {batch} x {world_size()} processes: expected a "
                f"divisor of {ROWS_PER_STEP}, or --gradient-accumulation-steps as well."
            )
        metric = self.metric_for_best_model
        stops_by_answers = metric == "answers" and self.early_stopping_patience
        if self.num_probes == 0 and (metric == "rouge_l" or stops_by_answers):
            problems.append(
                f"--metric-for-best-model {metric} compares answers, and --num-probes 0 asks for "
                "none. Remove it, or select by eval_loss."
            )
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def passes(self) -> int:
        """Forward passes of a process per optimizer step; needs a resolved config."""
        batch = self.per_device_train_batch_size * world_size()
        return self.gradient_accumulation_steps or ROWS_PER_STEP // batch

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step; needs a resolved config."""
        return self.per_device_train_batch_size * world_size() * self.passes

    def count_steps(self, rows: int) -> int:
        """Optimizer steps for this many rows, as the Trainer counts them."""
        batches = math.ceil(rows / (self.per_device_train_batch_size * world_size()))
        return self.max_steps or math.ceil(math.ceil(batches / self.passes) * self.epochs)

    def eval_steps(self, steps: int) -> int:
        """Steps between two evaluations."""
        return math.ceil(steps * self.eval_every)

    def count_evaluations(self, steps: int) -> int:
        """Evaluations in this many steps: before the first, one per interval, after the last."""
        return 1 + math.ceil(steps / self.eval_steps(steps))

    def recipe(self, profile: Profile, adapter: infer.Adapter | None) -> dict[str, Any]:
        """The values that decide what is learned: equal ones and equal rows give equal adapters."""
        values = dataclasses.asdict(self)
        if self.probes:
            content = repr(infer.read_probes(self.probes)).encode()
            values["probes"] = f"sha256 {hashlib.sha256(content).hexdigest()[:16]}"
        return {name: value for name, value in values.items() if name not in NOT_IN_RECIPE} | {
            "profile": profile.name,
            "base_model": profile.base_model,
            "adapter": adapter and adapter.sha256,
            "mix": "rows" if self.rows else self.mix,
            "rows_per_step": self.rows_per_step,
        }

    def default_name(self, profile: Profile) -> str:
        """Name of a run without --name: the values that users vary most."""
        parts = [profile.name]
        if profile.base_model != data.PROFILES[profile.name].base_model:
            parts.append(re.sub(r"[^\w.-]+", "-", Path(profile.base_model).name)[:50])
        parts += [name_rows(self.rows) if self.rows else self.mix, self.target_modules]
        if self.pad == "added":
            parts.append("pad-added")
        return "-".join(parts)

    def count_adapter(self, profile: Profile, dtype: str) -> tuple[int, int]:
        """`count_adapter` of a run whose base model is loaded in `dtype`."""
        embedding = dtype if self.pad == "added" else None
        return count_adapter(profile.architecture, self.target_modules, self.r, embedding)

    def needs_hub(self, profile: Profile) -> bool:
        """Whether rows or base model come from the hub."""
        is_local = profile.base_model == data.SMALL_MODEL or Path(profile.base_model).is_dir()
        sources = self.sources(profile).values()
        return not (is_local and all(Path(each).is_file() for each in sources))


def resolve(config: TrainConfig) -> tuple[TrainConfig, Profile, infer.Adapter | None]:
    """The config with the profile's values for unset flags, the profile, and the --adapter.

    Raises UsageError as `data.resolve_profile` and `infer.check_adapter`, or if the adapter cannot
    be trained further, or 4 bits need a GPU.
    """
    adapter, changes = None, {}
    if config.adapter:
        folder = infer.find_adapter(config.adapter)
        adapter = infer.check_adapter(folder, config.profile, config.base_model)
        names = {frozenset(modules): name for name, modules in TARGET_MODULES.items()}
        targets = names.get(frozenset(adapter.target_modules))
        if targets is None or adapter.use_rslora or type(adapter.lora_alpha) is not int:
            raise UsageError(
                f"--adapter {config.adapter}: expected LoRA on the modules of --target-modules, "
                f"an integer lora_alpha and no rslora; found {', '.join(adapter.target_modules)}, "
                f"lora_alpha {adapter.lora_alpha}, rslora {adapter.use_rslora}. Merge it into its "
                "base model, and pass the result as --base-model."
            )
        changes = {"target_modules": targets, "r": adapter.r, "lora_alpha": adapter.lora_alpha}
        changes["pad"] = adapter.record.pad
        profile = adapter.profile
    else:
        profile = data.resolve_profile(config.profile, config.base_model)
    most = max(1, ROWS_PER_STEP // world_size())
    for name, value in {
        "per_device_train_batch_size": min(profile.per_device_train_batch_size, most),
        "num_probes": min(profile.num_probes, len(infer.read_probes(config.probes))),
        "eval_every": profile.eval_every,
    }.items():
        if getattr(config, name) is None:
            changes[name] = value
    if config.load_in_4bit and profile.name == "cpu":
        raise UsageError("--load-in-4bit needs an NVIDIA GPU. Remove it, or use --profile t4.")
    in_4bit = not config.no_load_in_4bit and (config.load_in_4bit or profile.load_in_4bit)
    config = dataclasses.replace(config, **changes, load_in_4bit=in_4bit, no_load_in_4bit=False)
    return config, dataclasses.replace(profile, load_in_4bit=in_4bit), adapter


def name_rows(source: str) -> str:
    """The name of a file or repository, as part of a folder's name."""
    stem = Path(source.partition("@")[0]).stem
    return re.sub(r"[^\w.-]+", "-", stem, flags=re.ASCII)[:50] or "rows"


# --- The plan ------------------------------------------------------------------------------------


def count_adapter(
    arch: data.Architecture, target_modules: TargetModules, r: int, embedding: str | None = None
) -> tuple[int, int]:
    """`(trainable parameters, bytes of adapter_model.safetensors)`, exact, without loading a model.

    After --pad added, the file also contains the embedding in the dtype `embedding` ("float16") and
    the head, one row longer. A safetensors file has 8 bytes, a JSON header padded to a multiple of
    8 bytes, and the tensors: wider dtypes first, then by name.
    """
    shapes = {}
    for module in TARGET_MODULES[target_modules]:
        block = "self_attn" if module in TARGET_MODULES["attention"] else "mlp"
        rows, columns = arch.linear_shapes[module]
        for layer in range(arch.num_hidden_layers):
            name = f"base_model.model.model.layers.{layer}.{block}.{module}.lora_"
            shapes |= {f"{name}A.weight": (r, columns), f"{name}B.weight": (rows, r)}
    trainable = sum(math.prod(shape) for shape in shapes.values())
    tensors = [(-4, name, "F32", shape) for name, shape in shapes.items()]
    if embedding:
        dtypes = {"float32": (4, "F32"), "float16": (2, "F16"), "bfloat16": (2, "BF16")}
        size, dtype = dtypes[embedding]
        shape = (arch.vocab_size + 1, arch.hidden_size)
        tensors += [(-size, name, dtype, shape) for name in infer.EMBEDDINGS]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for size, name, dtype, shape in sorted(tensors):
        start, end = end, end - size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header_bytes = len(json.dumps(header, separators=(",", ":")))
    return trainable, 8 + math.ceil(header_bytes / 8) * 8 + end


def count_base(profile: Profile) -> tuple[int, int]:
    """`(parameters, bytes when loaded)` of the base model.

    NF4 with double quantization (Dettmers et al. 2023) takes 4 bits per weight, 8 per block of 64
    weights, and 32 per 256 blocks; embedding and norms stay in 16 bits.
    """
    arch = profile.architecture
    linear = arch.num_hidden_layers * sum(map(math.prod, arch.linear_shapes.values()))
    others = arch.vocab_size * arch.hidden_size * (1 if arch.tie_word_embeddings else 2)
    others += (2 * arch.num_hidden_layers + 1) * arch.hidden_size
    per_weight = 1 / 2 + 1 / 64 + 4 / (64 * 256) if profile.load_in_4bit else 2
    return linear + others, int(linear * per_weight) + 2 * others


def count_disk(config: TrainConfig, profile: Profile, folder: Path, dtype: str) -> tuple[int, int]:
    """`(needed, free)`: maximum bytes that a run writes, and free bytes on the folder's disk.

    Counts three checkpoints (one is being replaced), two adapters, and exports. Merging a model
    that was loaded in 4 bits downloads its 16-bit original.
    """
    trainable, adapter_bytes = config.count_adapter(profile, dtype)
    needed = 5 * adapter_bytes + 3 * trainable * (2 if "8bit" in profile.optim else 8)
    if config.merge or config.gguf:
        merged = count_base(dataclasses.replace(profile, load_in_4bit=False))[1]
        needed += merged * (1 + profile.load_in_4bit + 2 * bool(config.gguf))
    parent = next(each for each in folder.absolute().parents if each.is_dir())
    return needed, shutil.disk_usage(parent).free


def format_plan(
    config: TrainConfig, profile: Profile, folder: Path, audit: Log | None, dtype: str
) -> str:
    """The plan as lines for a terminal: exact numbers, and one line of measured ones.

    If `audit` is None, since the rows could not be read, the flags give an upper bound. `dtype` is
    the base model's.
    """
    trainable, adapter_bytes = config.count_adapter(profile, dtype)
    parameters, base_bytes = count_base(profile)
    needed, free = count_disk(config, profile, folder, dtype)
    adapter_file = f"{adapter_bytes:,} bytes"
    if config.pad == "added":
        native = count_adapter(profile.architecture, config.target_modules, config.r)[1]
        times = f"{adapter_bytes / native:.1f} times the {native:,} bytes without --pad added"
        adapter_file += f", {times}: it contains embedding and head"
    lines = {"rows": "not counted"}
    rows, up_to, tokens = None, "", ""
    if audit:
        rows, tokens = audit["train_rows"], f" of {audit['train_tokens']:,} tokens"
    elif None not in config.wanted.values():
        rows, up_to = sum(config.wanted.values()), "up to "
    if rows:
        steps = config.count_steps(rows)
        lines = {
            "rows": f"{up_to}{rows:,}{tokens}",
            "steps": f"{up_to}{steps:,} of {config.rows_per_step} rows: "
            f"{config.per_device_train_batch_size} rows x {config.passes} forward passes x "
            f"{world_size()} processes",
            "evaluations": f"{up_to}{config.count_evaluations(steps)}, each with "
            f"{config.num_probes} probe answers of up to {profile.eval_max_new_tokens} tokens",
        }
    lines |= {
        "trainable parameters": f"{trainable:,}",
        "adapter file": adapter_file,
        "base model": f"{parameters:,} parameters, {base_bytes / 1e9:.2f} GB in "
        f"{'4-bit NF4' if profile.load_in_4bit else '16 bits'}",
        "disk": f"up to {needed / 1e9:.2f} GB of {free / 1e9:.1f} GB free",
        "measured": profile.measured,
    }
    return "\n".join(f"{name:<30}{value}" for name, value in lines.items())


def check_disk(config: TrainConfig, profile: Profile, folder: Path) -> None:
    """Raises UsageError if the disk has no room for what the run still has to write."""
    needed, free = count_disk(config, profile, folder, profile.dtype)
    files = () if config.restart else folder.rglob("*")
    needed -= sum(file.stat().st_size for file in files if file.is_file())
    if needed > free:
        raise UsageError(
            f"{folder} needs up to {needed / 2**20:,.0f} MiB for checkpoints, adapter and exports, "
            f"and {free / 2**20:,.0f} MiB are free there. Free disk space, choose another "
            "--output-dir, or lower --r."
        )


def use_checkpointing(config: TrainConfig, profile: Profile, longest_row: int) -> Checkpointing:
    """Whether to recompute activations: if the flag is given, or the longest rows need it.

    Counts 26 bytes per hidden unit and 8 per feed-forward unit, for each token and layer, as
    measured with `torch.autograd.graph.saved_tensors_hooks` for LoRA on all linear layers in 16
    bits.
    """
    if config.gradient_checkpointing:
        return profile.use_gradient_checkpointing or True
    if not profile.use_gradient_checkpointing:
        return False
    import torch

    arch = profile.architecture
    per_token = arch.num_hidden_layers * (26 * arch.hidden_size + 8 * arch.intermediate_size)
    activations = config.per_device_train_batch_size * longest_row * per_token
    total = torch.cuda.get_device_properties(0).total_memory
    fits = count_base(profile)[1] + activations < 0.8 * total
    return False if fits else profile.use_gradient_checkpointing


# --- LoRA ----------------------------------------------------------------------------------------


def add_lora(model: Any, config: TrainConfig, checkpointing: Checkpointing = False) -> PeftModel:
    """`model` with LoRA matrices, initialized by the seed; nothing else is trainable."""
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        model,
        r=config.r,
        target_modules=TARGET_MODULES[config.target_modules],
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_gradient_checkpointing=checkpointing,
        random_state=config.seed,
    )


def check_model(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, profile: Profile
) -> None:
    """Raises UsageError unless only LoRA is trainable, and the pad token is one of the base model's
    tokens other than its stop token."""
    rows, vocab_size = model.get_input_embeddings().weight.shape[0], model.config.vocab_size
    expected = profile.architecture.vocab_size + (config.pad == "added")
    others = [n for n, each in model.named_parameters() if each.requires_grad and ".lora_" not in n]
    pad, stop = tokenizer.pad_token_id, tokenizer.eos_token_id
    fits = rows == vocab_size == expected and len(tokenizer) <= rows
    if others or not fits or pad in (None, stop) or pad >= rows:
        raise UsageError(
            "Nothing was trained, because the adapter would not be as planned. Expected an "
            f"embedding of {expected:,} rows, a pad token of its own, and no trainable tensors "
            f"besides LoRA; found {rows:,} rows ({vocab_size:,} in the config), "
            f"{len(tokenizer):,} tokens, the pad token {pad}, the stop token {stop}, and "
            f"{len(others)} other trainable tensors {others[:1]}. Install the pinned packages "
            f"again (README), and clear the cache of {profile.base_model}."
        )


def join_lora(model: PeftModel) -> None:
    """Computes base and LoRA in one product: [x, x A'] [W, s B]' instead of x W' + s (x A') B'.

    Training takes 1.08 times as long without (`tests.bench train --measures`), and in bfloat16, the
    sum of two products loses what is below half a unit in the last place of the larger one. The
    frozen weight W (out, in) becomes a view of the joined matrix (out, in + r).
    """
    import torch
    from peft.tuners.lora import Linear

    class JoinedProduct(torch.autograd.Function):
        """x (..., in), joined (out, in + r), A (r, in), B (out, r) -> (..., out)."""

        @staticmethod
        def forward(ctx: Any, x: Any, joined: Any, a: Any, b: Any, scaling: float) -> Any:
            num_in = a.shape[1]
            a = a.to(joined.dtype)
            rows = x.to(joined.dtype).reshape(-1, num_in)
            low = rows @ a.T
            joined[:, num_in:] = b * scaling
            ctx.save_for_backward(rows, low, a)
            ctx.joined, ctx.scaling, ctx.x_shape, ctx.x_dtype = joined, scaling, x.shape, x.dtype
            return (torch.cat([rows, low], dim=1) @ joined.T).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, d_out: Any) -> Any:
            rows, low, a = ctx.saved_tensors
            num_in = a.shape[1]
            d_out = d_out.reshape(-1, d_out.shape[-1])
            d_x = None
            if ctx.needs_input_grad[0]:
                d_joined = d_out @ ctx.joined
                d_low = d_joined[:, num_in:].contiguous()
                d_x = torch.addmm(d_joined[:, :num_in], d_low, a)
                d_x = d_x.view(ctx.x_shape).to(ctx.x_dtype)
            else:
                d_low = d_out @ ctx.joined[:, num_in:]
            d_a = (d_low.T @ rows).float()
            d_b = (d_out.T @ low).float() * ctx.scaling
            return d_x, None, d_a, d_b, None

    def forward(layer: Linear, x: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.disable_adapters:
            return layer.base_layer(x)
        a, b = (matrices["default"].weight for matrices in (layer.lora_A, layer.lora_B))
        return JoinedProduct.apply(x, layer.joined, a, b, layer.scaling["default"])

    for layer in model.modules():
        if isinstance(layer, Linear):
            weight = layer.base_layer.weight
            zeros = weight.new_zeros(len(weight), layer.r["default"])
            layer.joined = torch.cat([weight.data, zeros], dim=1)
            weight.data = layer.joined[:, : weight.shape[1]]
            layer.forward = types.MethodType(forward, layer)


def speed_up(model: PeftModel, config: TrainConfig, profile: Profile, longest_row: int) -> None:
    """Applies the profile's speed-ups for training on a CPU."""
    if profile.joined_lora and not config.lora_dropout:
        join_lora(model)
    # Eager attention keeps its (B, heads, T, T) weights for the backward pass. While they are small
    # it is faster: training takes 1.18 times as long without.
    if longest_row <= profile.eager_attention_tokens:
        model.set_attn_implementation("eager")


# --- Evaluation of answers -----------------------------------------------------------------------


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L, the F1 of the longest common subsequence of words (Lin 2004), in [0, 1]."""
    from rapidfuzz.distance import LCSseq

    words = [re.findall(r"[^\W_]+", each.lower()) for each in (text, reference)]
    return 2 * LCSseq.similarity(*words) / max(1, sum(map(len, words)))


class AnswerEvaluation:
    """Answers probe and held-out questions during training, and judges the former."""

    def __init__(
        self,
        config: TrainConfig,
        loaded: infer.LoadedModel,
        mix: data.Mix,
        held_out: list[dict[str, list[int]]],
        folder: Path,
        checkpointing: Checkpointing,
    ) -> None:
        """`held_out` are the encoded rows of `mix.eval`; `checkpointing` is that of training."""
        self.loaded, self.samples, self.checkpointing = loaded, folder / "samples", checkpointing
        self.probes = [probe.question for probe in loaded.probes[: config.num_probes]]
        tokens = sum(label != -100 for row in held_out for label in row["labels"])
        texts = (text for row in mix.eval for role, text in row.messages if role == "assistant")
        self.tokens_per_byte = tokens / sum(len(text.encode()) for text in texts)

        def width(question: str) -> int:
            prompt = data.encode_prompt(loaded.tokenizer, question, (), loaded.system_prompt)
            return infer.padded_width(len(prompt))

        # Held-out questions fill up the batch of probes; first those that do not widen it.
        widest = max(map(width, self.probes), default=0)
        rows = sorted(mix.eval, key=lambda row: max(width(row.question), widest))
        rows = rows[: max(8, -len(self.probes) % infer.ROWS)]
        self.references = {row.question: row.answer for row in rows}

    def __call__(self, step: int, eval_loss: float) -> dict[str, float]:
        """The metrics of the current weights; writes their answers to samples/STEP.jsonl.

        `eval_quality` orders evaluations by sound answers, then by points, then by loss.
        """
        kit = infer.DECODINGS["kit"]
        limit = min(kit.max_new_tokens, self.loaded.profile.eval_max_new_tokens)
        decoding = dataclasses.replace(kit, max_new_tokens=limit)
        metrics = {"eval_loss_per_byte": eval_loss * self.tokens_per_byte}
        judged: list[infer.JudgedAnswer] = []
        if self.probes:
            questions = (*self.probes, *self.references)
            judged, others = self._answer([infer.Request(each, decoding) for each in questions])
            scores = [rouge_l(each.text, self.references[each.question]) for each in others]
            metrics["eval_rouge_l"] = sum(scores) / len(scores)
            records = [each.to_record() for each in judged]
            for record in records:
                del record["adapter"], record["seconds"]  # differ from run to run
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            self.samples.mkdir(parents=True, exist_ok=True)
            data.write_atomic(self.samples / f"{step}.jsonl", text)
        found = infer.measure_quality(judged)
        tie_break = 1 / (1 + eval_loss) if math.isfinite(eval_loss) else 0.0
        quality = found.num_sound + (found.num_named + tie_break) / (found.num_points + 1)
        return metrics | {
            "eval_quality": quality,
            "eval_answers": found.num_answers,
            "eval_sound": found.num_sound,
            "eval_ended": found.num_ended,
            "eval_sound_and_ended": found.num_sound_and_ended,
            "eval_points": found.num_named,
            "eval_max_points": found.num_points,
            "eval_wrong_claims": found.num_wrong_claims,
        }

    def _answer(
        self, requests: Sequence[infer.Request]
    ) -> tuple[list[infer.JudgedAnswer], list[infer.Answer]]:
        from tqdm import tqdm
        from unsloth import FastLanguageModel

        model, count = self.loaded.model, len(self.probes)
        total = infer.count_new_tokens(requests)
        # `disable=None` shows the bar on a terminal only.
        bar = tqdm(total=total, unit="token", desc="answers", leave=False, disable=None)

        def progress(tokens: int) -> None:
            bar.update(tokens)
            STOP.check()

        FastLanguageModel.for_inference(model)
        try:
            with infer.quiet_libraries(), bar:
                answers = infer.answer_requests(self.loaded, requests, progress)
                judged = infer.judge_answers(self.loaded, answers[:count], progress=progress)
        finally:
            FastLanguageModel.for_training(model, use_gradient_checkpointing=self.checkpointing)
        return judged, answers[count:]


def describe_evaluation(now: Log, before: Log | None) -> str:
    """Loss and answers of an evaluation in one line, compared with the one before; a second line
    warns if the loss improved while the answers got worse."""

    def change(name: str, lower_is_better: bool = False) -> str:
        if not before:
            return ""
        if now[name] == before[name]:
            return f" (unchanged from {before[name]:.4g})"
        better = (now[name] < before[name]) == lower_is_better
        return f" ({'better' if better else 'worse'} than {before[name]:.4g})"

    parts = [f"eval_loss {now['eval_loss']:.4f}{change('eval_loss', True)}"]
    if now["eval_answers"]:
        parts += [
            f"sound {now['eval_sound']}/{now['eval_answers']}{change('eval_sound')}",
            f"ended {now['eval_ended']}/{now['eval_answers']}",
            f"points {now['eval_points']}/{now['eval_max_points']}, "
            f"wrong claims {now['eval_wrong_claims']}",
            f"ROUGE-L {now['eval_rouge_l']:.3f}",
        ]
    line = f"step {now['step']}: " + " | ".join(parts)
    if before and now["eval_loss"] < before["eval_loss"]:
        names = {"eval_sound": "sound answers", "eval_points": "points"}
        worse = [
            f"{text} {before[n]} -> {now[n]}" for n, text in names.items() if now[n] < before[n]
        ]
        if worse:
            line += f"\n  the loss improved while the answers got worse: {', '.join(worse)}"
    return line


# --- Training ------------------------------------------------------------------------------------


class Stop:
    """Whether a signal asked the run to end: during training, after the step and a checkpoint."""

    number: int | None = None
    """The first signal."""
    training = False

    def receive(self, number: int, frame: types.FrameType | None) -> None:
        """Handles a signal."""
        again = number == signal.SIGINT == self.number
        self.number = self.number or number
        if again or not self.training:
            raise infer.Interrupted(self.number)
        # Not by print, which the signal may have interrupted.
        if is_main_process():
            os.write(2, b"\nStopping after this step. Ctrl-C again stops at once.\n")

    def check(self) -> None:
        """Raises `infer.Interrupted` if a signal came."""
        if self.number:
            raise infer.Interrupted(self.number)


STOP = Stop()


def make_callback(
    config: TrainConfig, folder: Path, recipe: Log, deadline: float | None
) -> TrainerCallback:
    """A callback that shows progress, writes metrics.jsonl, saves every --save-minutes, and stops
    training on a signal or in time for `deadline`, a value of `time.monotonic`."""
    import torch
    from tqdm import tqdm
    from transformers.trainer_callback import ExportableState, ProgressCallback

    class RunCallback(ProgressCallback, ExportableState):
        """Its state in trainer_state.json is the recipe and the seconds of training so far."""

        seconds = longest_step = 0.0
        began = time.monotonic()
        stopping = False

        def state(self) -> dict[str, Any]:
            seconds = self.seconds + time.monotonic() - self.began
            return {"args": {}, "attributes": {"recipe": recipe, "seconds": round(seconds, 1)}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = self.saved = time.monotonic()
            self.current_step = state.global_step
            if is_main_process():
                self.training_bar = tqdm(
                    total=state.max_steps, initial=state.global_step, desc="training", unit="step"
                )

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step_began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            now = time.monotonic()
            self.longest_step = max(self.longest_step, now - self.step_began)
            evaluation = max(log.get("eval_runtime", 0.0) for log in state.log_history)
            late = deadline is not None and now + self.longest_step + 2 * evaluation > deadline
            # One step before an evaluation, so that a run that ends during it resumes there.
            before = (state.global_step + 1) % state.eval_steps == 0
            due = before or now - self.saved >= 60 * config.save_minutes
            votes = [late, bool(STOP.number), due]
            votes = torch.tensor(votes, dtype=torch.int, device=args.device)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(votes)
            late, stop, due = votes.bool().tolist()
            self.stopping = (late or stop) and state.global_step < state.max_steps
            control.should_save |= self.stopping or due

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.saved = time.monotonic()
            # Only now, since a saved should_training_stop means that the run is complete.
            control.should_training_stop |= self.stopping

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            if sys.stderr.isatty():
                super().on_prediction_step(*args, **kwargs)
            STOP.check()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            if is_main_process():
                lines = (json.dumps(line) + "\n" for line in select_metrics(state.log_history))
                data.write_atomic(folder / "metrics.jsonl", "".join(lines))
            if self.training_bar is not None and "loss" in logs:
                self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    return RunCallback()


def select_metrics(log_history: Sequence[Log]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: the Trainer's logs of steps and evaluations, without times."""
    # TRL counts tokens since the last start.
    volatile = re.compile(r"runtime|_per_second|flos|num_tokens")
    # Sorted, as trainer_state.json is after a resume.
    return [
        {name: log[name] for name in sorted(log) if not volatile.search(name)}
        for log in log_history
        if "loss" in log or "eval_loss" in log
    ]


def make_sft_config(
    config: TrainConfig,
    profile: Profile,
    folder: Path,
    eval_steps: int,
    checkpointing: Checkpointing = False,
) -> SFTConfig:
    """TRL's settings, with every value whose default differs between Unsloth's GPU and CPU code."""
    from unsloth import is_bfloat16_supported  # isort: skip
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder),
        max_length=config.max_seq_length,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.passes,
        eval_accumulation_steps=None,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=0.03,
        weight_decay=0.01,
        optim=profile.optim,
        # A T4 has no bf16.
        fp16=not is_bfloat16_supported(),
        bf16=is_bfloat16_supported(),
        gradient_checkpointing=bool(checkpointing),
        train_sampling_strategy=profile.train_sampling_strategy,
        padding_free=profile.padding_free,
        pad_to_multiple_of=profile.pad_to_multiple_of,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        # Otherwise a loss that is not a number would be hidden.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="no",
        eval_strategy="steps",
        eval_steps=eval_steps,
        # Not by calling `evaluate` before training: accelerate would then not wrap the model, and
        # each of several processes would train alone.
        eval_on_start=True,
        save_steps=eval_steps,
        save_total_limit=2,
        metric_for_best_model=METRICS[config.metric_for_best_model],
        greater_is_better=config.metric_for_best_model != "eval_loss",
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        # Our callback shows the progress.
        disable_tqdm=True,
        torch_empty_cache_steps=None,
        ddp_find_unused_parameters=False,
    )


def order_rows(rows: list[dict[str, list[int]]], seed: int) -> list[dict[str, list[int]]]:
    """The rows in an order in which those of a step have similar lengths, to save padding.

    The Trainer's own sampler draws from the global generator, which evaluations also use, and
    groups by the batch of one process.
    """
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(seed)
    lengths = [len(row["input_ids"]) for row in rows]
    order = get_length_grouped_indices(lengths, ROWS_PER_STEP, generator=generator)
    return [rows[number] for number in order]


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    train: list[dict[str, list[int]]],
    held_out: list[dict[str, list[int]]],
    evaluation: AnswerEvaluation | None = None,
) -> SFTTrainer:
    """TRL's trainer for encoded rows, which also calls `evaluation` at each evaluation."""
    import torch
    from datasets import Dataset
    from tqdm import tqdm
    from transformers import PrinterCallback
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        """TRL's trainer with metrics of the answers besides the loss."""

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            output = super().evaluation_loop(*args, **kwargs)
            if evaluation is None:
                return output
            metrics, step = [None], self.state.global_step
            if is_main_process():
                metrics = [evaluation(step, output.metrics["eval_loss"])]
                logs = reversed(self.state.log_history)
                before = next((log for log in logs if "eval_loss" in log), None)
                now = {"step": step, **output.metrics, **metrics[0]}
                tqdm.write(describe_evaluation(now, before), sys.stderr)
            if torch.distributed.is_initialized():
                torch.distributed.broadcast_object_list(metrics)
            output.metrics.update(metrics[0])
            return output

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Does nothing; `write_results` writes the card."""

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            # By default, PEFT checks on the hub whether the embedding has grown.
            grown = tokenizer.pad_token == infer.ADDED_PAD_TOKEN
            self.model.save_pretrained(
                output_dir, state_dict=state_dict, save_embedding_layers=grown
            )

    trainer = Trainer(
        model=model,
        processing_class=tokenizer,
        args=args,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# --- The run folder ------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state in a checkpoint. Raises an error if one of its files is corrupt."""
    import safetensors

    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    state["stateful_callbacks"]["RunCallback"]["attributes"]["recipe"]
    # One per process.
    states = [path.name for path in checkpoint.glob("rng_state*.pth")] or ["rng_state.pth"]
    for name in ("optimizer.pt", "scheduler.pt", *states):
        with zipfile.ZipFile(checkpoint / name) as archive:
            if archive.testzip():
                raise ValueError(f"{name} is broken")
    with safetensors.safe_open(checkpoint / infer.WEIGHTS, framework="np"):
        return state


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be loaded and its state, or None if there is none.

    Newer ones are reported. Those that a killed process left incomplete are removed, and damaged
    ones renamed, so that the Trainer does not write into them. Raises UsageError if only
    damaged ones are left.
    """
    broken, found = {}, None
    for checkpoint in list_checkpoints(folder):
        try:
            found = checkpoint, read_checkpoint(checkpoint)
            break
        except Exception as error:
            broken[checkpoint] = f"{checkpoint} cannot be loaded ({data.first_line(error)})"
    damaged = [checkpoint for checkpoint in broken if (checkpoint / STATE).is_file()]
    if damaged and not found:
        raise UsageError(
            f"{broken[damaged[0]]}, and there is no earlier one. Restore it, or start over with "
            "--restart."
        )
    for checkpoint, problem in broken.items() if is_main_process() else ():
        if found:
            print(f"{problem}; {found[0].name} is used instead.", file=sys.stderr)
        if checkpoint in damaged:
            checkpoint.rename(checkpoint.with_name(f"damaged-{checkpoint.name}"))
        else:
            shutil.rmtree(checkpoint)
    return found


def check_recipe(folder: Path, found: Log, recipe: Log) -> None:
    """Raises UsageError if the run in the folder has another recipe."""
    differences = [
        f"  {name}: {found.get(name)!r} there, {recipe.get(name)!r} now"
        for name in sorted(found.keys() | recipe.keys())
        if found.get(name) != recipe.get(name)
    ]
    if differences:
        raise UsageError(
            f"{folder} contains a run with other values:\n"
            + "\n".join(differences)
            + "\nChoose another --name, or start over with --restart, which renames that run.",
            OTHER_VALUES,
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """run.json, which a run writes last, or None. Raises UsageError if it is corrupt."""
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["recipe"].items(), record["numbers"]["chosen"]["step"]
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is broken ({error!r}). Start over with --restart.") from None


def commit_id() -> str | None:
    """Commit of the kit's checkout, or None if it is not one."""
    command = ["git", "-C", str(data.HERE), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def list_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a run's results depend on."""
    names = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "datasets")
    versions = {name: importlib.metadata.version(name) for name in names}
    return versions | {"python": platform.python_version()}


def train_model(trainer: SFTTrainer, folder: Path, checkpoint: Path | None) -> TrainerState:
    """Trains, from the checkpoint if there is one, and returns the Trainer's last state. Raises
    `infer.Interrupted` on a signal; the message says what is saved."""
    import torch
    from transformers import TrainerState

    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        if is_complete(state):
            return state
        # accelerate names the CPU of several processes cpu:0, which torch.load does not know.
        torch.serialization.register_package(
            100, lambda _: None, lambda each, place: each if place.startswith("cpu:") else None
        )
    STOP.training = True
    try:
        with data.writing(folder), infer.quiet_libraries():
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            if not is_complete(trainer.state):
                STOP.check()
    except infer.Interrupted as interrupted:
        # A second Ctrl-C may have left the last one incomplete.
        saved = [each for each in list_checkpoints(folder) if (each / STATE).is_file()]
        newest = saved[0] if saved else "Nothing"
        message = (
            f"Interrupted. {newest} of {trainer.state.max_steps} steps is saved; run the same "
            "command (without --restart) to resume."
        )
        raise infer.Interrupted(interrupted.number, message) from None
    finally:
        STOP.training = False
    return trainer.state


def is_complete(state: TrainerState) -> bool:
    """Whether the state was saved at the end of training: all steps done, or early stopping."""
    control = state.stateful_callbacks.get("TrainerControl", {"args": {}})
    return control["args"].get("should_training_stop", False)


def run(
    config: TrainConfig,
    profile: Profile,
    start: infer.Adapter | None,
    mix: data.Mix,
    recipe: Log,
    folder: Path,
    deadline: float | None,
) -> dict[str, Any] | None:
    """Trains into the folder, from its newest checkpoint if there is one, and returns the record.

    None if --max-hours ended it before the first evaluation, and in all processes but the main one.
    """
    found = None if config.restart else find_checkpoint(folder)
    checkpoint = found[0] if found else None
    if found:
        saved = found[1]["stateful_callbacks"]["RunCallback"]["attributes"]["recipe"]
        check_recipe(folder, saved, recipe)
        print(f"resuming {folder} after step {found[1]['global_step']} of {found[1]['max_steps']}")
    if config.num_probes and is_main_process():
        infer.prepare_reference(profile)
    model, tokenizer = infer.load_base(profile, dtype=None, max_seq_length=config.max_seq_length)
    import datasets

    datasets.disable_progress_bars()
    mix = data.fit_mix(mix, tokenizer, config.max_seq_length)
    audit = data.audit_mix(mix, tokenizer)
    dtype = str(model.dtype).removeprefix("torch.")
    plan = format_plan(config, profile, folder, audit, dtype)
    print(f"\n{data.format_audit(audit)}\n\n{plan}", flush=True)
    train = [data.encode_row(tokenizer, row) for row in mix.train]
    held_out = [data.encode_row(tokenizer, row) for row in mix.eval]
    held_out.sort(key=lambda row: len(row["input_ids"]))
    if profile.train_sampling_strategy == "sequential":
        train = order_rows(train, config.seed)
    longest = audit["lengths"]["longest"]
    eval_steps = config.eval_steps(config.count_steps(len(train)))
    with infer.quiet_libraries():
        if config.pad == "added":
            infer.add_pad_token(model, tokenizer)
        checkpointing = use_checkpointing(config, profile, longest)
        model = add_lora(model, config, checkpointing)
        if start:
            model.load_adapter(start.folder, "default", is_trainable=True)
        check_model(model, tokenizer, config, profile)
        speed_up(model, config, profile, longest)
        lora = model.peft_config["default"]
        # For other programs: the model may be loaded from this machine's cache.
        lora.base_model_name_or_path = profile.hub_id
        lora.target_modules = sorted(lora.target_modules)  # a set, whose order varies
        probes = infer.read_probes(config.probes)
        loaded = infer.LoadedModel(
            model, tokenizer, profile, system_prompt=mix.system_prompt, probes=probes
        )
        evaluation = AnswerEvaluation(config, loaded, mix, held_out, folder, checkpointing)
        args = make_sft_config(config, profile, folder, eval_steps, checkpointing)
        args.eval_on_start = checkpoint is None
        trainer = make_trainer(model, tokenizer, args, train, held_out, evaluation)
        trainer.add_callback(make_callback(config, folder, recipe, deadline))
        if config.early_stopping_patience:
            from transformers import EarlyStoppingCallback

            trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    if is_main_process() and not checkpoint:
        if config.restart and folder.exists():
            names = (f"{folder.name}.old-{number}" for number in itertools.count(1))
            folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))
        with data.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    state = train_model(trainer, folder, checkpoint)
    if not is_main_process():
        return None
    return write_results(config, loaded, mix, audit, recipe, folder, state)


def write_results(
    config: TrainConfig,
    loaded: infer.LoadedModel,
    mix: data.Mix,
    audit: Log,
    recipe: Log,
    folder: Path,
    state: TrainerState,
) -> dict[str, Any] | None:
    """Writes adapter, curves and, if the run is complete, run.json last; returns its content, or
    None before the first evaluation. Raises UsageError if the weights selected have no loss."""
    losses = {log["step"]: log["eval_loss"] for log in state.log_history if "eval_loss" in log}
    chosen = losses.get(state.best_global_step)
    if chosen is None and not is_complete(state):
        return None
    if chosen is None or not math.isfinite(chosen):  # diverged weights still give answers
        raise UsageError(
            f"{folder}: the eval loss is not a number, so there are no weights to select. "
            "Lower --learning-rate, and start over with --restart."
        )
    tokenizer, decoding = loaded.tokenizer, infer.DECODINGS["kit"]
    adapter_record = infer.AdapterRecord(
        base_model=loaded.profile.base_model,
        profile=loaded.profile.name,
        prompt_fingerprint=data.prompt_fingerprint(tokenizer, mix.system_prompt),
        decoding=decoding,
        pad=config.pad,
        system_prompt=mix.system_prompt,
        surprisal_reference=infer.surprisal_reference(loaded) if config.num_probes else None,
        load_in_4bit=loaded.profile.load_in_4bit,
    )
    checkpoint = folder / f"checkpoint-{state.best_global_step}"
    numbers = collect_numbers(state, config, loaded, audit)
    numbers["adapter_bytes"] = (checkpoint / infer.WEIGHTS).stat().st_size
    record = {
        "recipe": recipe,
        "argv": sys.argv,
        "processes": world_size(),
        "versions": list_versions(),
        "commit": commit_id(),
        "system_prompt": mix.system_prompt,
        "prompt_fingerprint": adapter_record.prompt_fingerprint,
        "numbers": numbers,
    }
    adapter, part = folder / "adapter", folder / ".adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    with data.writing(adapter, part):
        part.mkdir()
        for name in (infer.WEIGHTS, infer.CONFIG):
            shutil.copyfile(checkpoint / name, part / name)
        tokenizer.save_pretrained(part)
        infer.make_generation_config(
            decoding.max_new_tokens,
            [data.end_of_turn_id(tokenizer)],
            tokenizer.pad_token_id,
            decoding.repetition_penalty,
            decoding.no_repeat_ngram_size,
        ).save_pretrained(part)
        content = json.dumps(dataclasses.asdict(adapter_record), indent=2)
        data.write_atomic(part / infer.ADAPTER_RECORD, content + "\n")
        samples = folder / "samples" / f"{state.best_global_step}.jsonl"
        lines = samples.read_text(encoding="utf-8").splitlines() if samples.is_file() else []
        card = make_card(config, loaded.profile, record, [json.loads(line) for line in lines])
        data.write_atomic(part / "README.md", card)
        # An adapter of an earlier --max-hours is kept until the new one is in place.
        old = folder / ".adapter.old"
        shutil.rmtree(old, ignore_errors=True)
        if adapter.exists():
            adapter.rename(old)
        part.rename(adapter)
        shutil.rmtree(old, ignore_errors=True)
    draw_curves(state.log_history, numbers["selected"], folder / "curves.png")
    if is_complete(state):
        data.write_atomic(folder / "run.json", json.dumps(record, indent=2) + "\n")
    return record


def collect_numbers(
    state: TrainerState, config: TrainConfig, loaded: infer.LoadedModel, audit: Log
) -> dict[str, Any]:
    """The results of a run, for run.json, the model card and the last lines."""
    import torch

    dtype = str(loaded.model.dtype).removeprefix("torch.")
    trainable, planned_bytes = config.count_adapter(loaded.profile, dtype)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = [log for log in select_metrics(state.log_history) if "eval_loss" in log]
    selected = {}
    for name, key in METRICS.items():
        sign = -1 if name == "eval_loss" else 1
        # `max` returns the first of equal ones.
        finite = [line for line in lines[1:] if math.isfinite(line.get(key, math.nan))]
        if finite:
            selected[name] = max(finite, key=lambda line: sign * line[key])["step"]
    return {
        "steps": state.global_step,
        "planned_steps": state.max_steps,
        "stopped_early": is_complete(state) and state.global_step < state.max_steps,
        "training_seconds": state.stateful_callbacks["RunCallback"]["attributes"]["seconds"],
        "peak_memory_bytes": peak,
        "before": lines[0],
        "chosen": next(line for line in lines if line["step"] == state.best_global_step),
        "last": lines[-1],
        "selected": selected,
        "trainable_parameters": trainable,
        "planned_adapter_bytes": planned_bytes,
        **{name: audit[name] for name in ("train_rows", "train_tokens", "eval_rows")},
    }


# --- Results -------------------------------------------------------------------------------------


def make_card(config: TrainConfig, profile: Profile, record: Log, samples: Sequence[Log]) -> str:
    """The model card (markdown) from `CARD`; text of rows and answers is escaped."""
    from huggingface_hub import ModelCard, ModelCardData

    numbers = record["numbers"]
    before, chosen = numbers["before"], numbers["chosen"]
    values = {
        **record["recipe"],
        "training rows": f"{numbers['train_rows']:,} of {numbers['train_tokens']:,} tokens; loss "
        "on the answers only",
        "steps": f"{numbers['steps']:,} of {numbers['planned_steps']:,}",
        "weights": f"of step {chosen['step']}, selected by {config.metric_for_best_model}",
        "eval loss": f"{before['eval_loss']:.4f} before, {chosen['eval_loss']:.4f} at that step, "
        f"on {numbers['eval_rows']} held-out rows",
        "sound answers": f"{before['eval_sound']} of {before['eval_answers']} before, "
        f"{chosen['eval_sound']} of {chosen['eval_answers']} at that step",
    }
    # Without the base model's path, which may be private, and what is shown below.
    values = {
        name: str(value).replace("|", "&#124;").replace("\n", " ")
        for name, value in values.items()
        if value is not None and name not in ("base_model", "system_prompt")
    }
    sources = []
    for name, source in config.sources(profile).items():
        # A file's folder may be private.
        shown = Path(source).name if Path(source).is_file() else source
        sources.append((name, shown, LICENCES.get(source, "unknown to the kit")))
    samples = [
        {
            **each,
            "question": " ".join(each["question"].split()),
            "facts": infer.Facts(**each["facts"]) if each["facts"] else "",
        }
        for each in samples
    ]
    card_data = ModelCardData(
        base_model=profile.hub_id,
        library_name="peft",
        pipeline_tag="text-generation",
        license=profile.licence,
        tags=["lora", "unsloth", "medical"],
    )
    card = ModelCard.from_template(
        card_data,
        template_str=CARD,
        values=values,
        sources=sources,
        samples=samples,
        system_prompt=" ".join(record["system_prompt"].replace("`", "'").split()),
        versions=record["versions"],
        commit=record["commit"],
    )
    return data.escape_controls(card.content)


def draw_curves(log_history: Sequence[Log], selected: Mapping[str, int], path: Path) -> None:
    """Draws loss and answers over the steps, with the step that each metric selects. Lines also
    differ in dashes and markers, so the figure is readable in black and white."""
    import pandas
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.4), layout="constrained")
    losses, answers = figure.subplots(2, sharex=True)
    logs = pandas.DataFrame(log_history).set_index("step")
    training, evaluations = logs[logs.loss.notna()], logs[logs.eval_loss.notna()]
    losses.plot(training.loss.astype(float), color="0.6", label="train")
    losses.plot(evaluations.eval_loss, "o--", color="black", label="eval")
    losses.set_ylabel("loss (nats per token)")
    sound = evaluations.eval_sound / evaluations.eval_answers
    ended = evaluations.eval_ended / evaluations.eval_answers
    points = evaluations.eval_points / evaluations.eval_max_points
    answers.plot(sound, "o-", color="black", label="sound", clip_on=False)
    answers.plot(ended, "s:", color="0.35", label="ended by the stop token", clip_on=False)
    answers.plot(points, "^--", color="0.55", label="points named", clip_on=False)
    if "eval_rouge_l" in logs:
        answers.plot(evaluations.eval_rouge_l, "x-.", color="0.45", label="ROUGE-L", clip_on=False)
    answers.set(ylabel="share of answers, or ROUGE-L", xlabel="step", ylim=(0, 1))
    answers.locator_params(axis="x", integer=True)
    for step in sorted(set(selected.values())):
        names = ", ".join(name for name, each in selected.items() if each == step)
        place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        losses.annotate(f"selected by\n{names}", (step, 1), **place)
        for axes in (losses, answers):
            axes.axvline(step, color="0.85", linewidth=5, zorder=0)
    for axes in (losses, answers):
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    data.write_atomic(path, image.getvalue())


# --- Export --------------------------------------------------------------------------------------


def check_exports(config: TrainConfig) -> None:
    """Raises UsageError if an export needs the network or a token, and it is missing."""
    if config.push_to_hub:
        from huggingface_hub import HfApi

        try:
            HfApi().whoami()
        except Exception as error:
            raise UsageError(
                f"--push-to-hub {config.push_to_hub} needs the network and a token with write "
                f"access ({type(error).__name__}). Run hf auth login, or set HF_TOKEN, or remove "
                "the flag."
            ) from None
    if (config.gguf or (config.merge and config.load_in_4bit)) and not data.reaches_hub():
        raise UsageError(
            "--gguf downloads llama.cpp, and --merge the 16-bit weights of a model in 4 bits, but "
            "the hub cannot be reached. Go online, or remove the flag."
        )


def make_modelfile(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> str:
    """An Ollama Modelfile for a merged model, with the prompt of training and the kit's decoding.

    The template is the tokenizer's own around a system prompt and a question, without the
    beginning-of-text token, which Ollama adds itself.
    """
    decoding = infer.DECODINGS["kit"]
    messages = [
        {"role": "system", "content": "{{ .System }}"},
        {"role": "user", "content": "{{ .Prompt }}"},
    ]
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string=data.TEMPLATE_DATE
    )
    prompt = prompt.removeprefix(tokenizer.decode(tokenizer("")["input_ids"]))
    stop = tokenizer.convert_ids_to_tokens(data.end_of_turn_id(tokenizer))
    quoted = system_prompt.replace('"""', '"')
    return f"""# ollama create medical -f Modelfile && ollama run medical
# Ollama's repetition penalty includes the prompt, so answers differ from those of infer.py.
FROM .
TEMPLATE \"\"\"{prompt}{{{{ .Response }}}}{stop}\"\"\"
SYSTEM \"\"\"{quoted}\"\"\"
PARAMETER stop "{stop}"
PARAMETER temperature {decoding.temperature:g}
PARAMETER repeat_penalty {decoding.repetition_penalty:g}
PARAMETER repeat_last_n -1
PARAMETER num_predict {decoding.max_new_tokens}
PARAMETER num_ctx {data.MAX_SEQ_LENGTH}
"""


def export(config: TrainConfig, profile: Profile, folder: Path) -> Iterator[str]:
    """Merges, converts and uploads a complete run as the flags say; yields a line for each."""
    adapter = folder / "adapter"
    if config.merge or config.gguf:
        record = infer.read_adapter_record(adapter)
        model, tokenizer = infer.load_base(profile, dtype=profile.dtype)
        with infer.quiet_libraries():
            if config.pad == "added":
                infer.add_pad_token(model, tokenizer)
            model = add_lora(model, config)
            model.load_adapter(adapter, "default")
    if config.merge:
        merged, part = folder / "merged", folder / ".merged.part"
        shutil.rmtree(part, ignore_errors=True)
        with infer.quiet_libraries(), data.writing(merged, part):
            model.save_pretrained_merged(str(part), tokenizer, save_method="merged_16bit")
            data.write_atomic(part / "Modelfile", make_modelfile(tokenizer, record.system_prompt))
            shutil.rmtree(merged, ignore_errors=True)
            part.rename(merged)
        yield f"merged    {merged}, with a Modelfile for Ollama"
    if config.gguf:
        with infer.quiet_libraries(), data.writing(folder / "gguf"):
            model.save_pretrained_gguf(
                str(folder / "gguf"), tokenizer, quantization_method=config.gguf
            )
        yield f"GGUF      {folder / 'gguf'}"
    if config.push_to_hub:
        from huggingface_hub import HfApi

        try:
            url = HfApi().create_repo(config.push_to_hub, private=True, exist_ok=True)
            HfApi().upload_folder(repo_id=config.push_to_hub, folder_path=adapter)
        except (OSError, ValueError) as error:  # bases of the client's errors
            raise UsageError(
                f"{adapter} is complete, but was not uploaded to {config.push_to_hub} "
                f"({data.first_line(error)}). Run the same command again to upload it."
            ) from None
        yield f"uploaded  {url} (private, if it is new)"


# --- Command -------------------------------------------------------------------------------------


def lock_run(folder: Path) -> contextlib.AbstractContextManager:
    """A lock on the folder as a context. Raises UsageError if another process trains into it."""
    from filelock import FileLock, Timeout

    if not is_main_process():
        return contextlib.nullcontext()
    with data.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder.with_name(f".{folder.name}.lock")).acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"Another process is training into {folder}. Wait for it, or choose another --name.",
            BUSY,
        ) from None


def describe_result(config: TrainConfig, folder: Path, record: Log | None) -> str:
    """The results of a run, where they are, and the next command."""
    if record is None:
        return "Stopped by --max-hours before the first evaluation; run the same command to resume."
    numbers = record["numbers"]
    before, chosen = numbers["before"], numbers["chosen"]
    planned = numbers["planned_adapter_bytes"]
    as_planned = ", as planned" if numbers["adapter_bytes"] == planned else f", planned {planned:,}"
    lines = [
        f"loss      {before['eval_loss']:.4f} before, {numbers['last']['eval_loss']:.4f} after "
        f"{numbers['last']['step']} steps ({numbers['training_seconds'] / 60:.1f} minutes)",
        f"before    {describe_evaluation(before, None)}",
        f"chosen    {describe_evaluation(chosen, before)}",
        f"memory    {numbers['peak_memory_bytes'] / data.GIB:.2f} GiB at the peak",
        f"adapter   {folder / 'adapter'} ({numbers['adapter_bytes']:,} bytes{as_planned})",
        f"record    {folder}: metrics.jsonl, samples, curves.png, adapter/README.md",
    ]
    if numbers["steps"] < numbers["planned_steps"]:
        how = "early stopping" if numbers["stopped_early"] else "--max-hours"
        then = "" if numbers["stopped_early"] else "; run the same command to resume"
        steps = f"{numbers['steps']} of {numbers['planned_steps']} steps"
        lines.append(f"Stopped by {how} after {steps}{then}.")
    is_default = folder.parent.resolve() == infer.TRAIN_RUNS.resolve()
    flag = "" if is_default else f"--adapter {shlex.quote(str(folder / 'adapter'))} "
    choices = ", ".join(f"{name} step {step}" for name, step in numbers["selected"].items())
    lines += [
        "Read some answers:",
        f'  python infer.py {flag}"What are the warning signs of a heart attack?"',
        f"selected  step {chosen['step']} by {config.metric_for_best_model}; by each metric: "
        + choices,
    ]
    return "\n".join(lines)


def count_rows(config: TrainConfig, profile: Profile) -> dict[str, Any] | None:
    """The audit of the rows; None if they are on the hub and it cannot be reached."""
    try:
        mix, tokenizer = config.load(profile), data.load_tokenizer(profile)
    except UsageError:
        if not config.needs_hub(profile) or data.reaches_hub():
            raise
        for name, source in config.sources(profile).items():
            if Path(source).suffix.lower() in data.FILE_SUFFIXES:
                rows, report = data.load_source(name, source, config)
                data.clean_rows(rows, report)
                data.check_losses(report)  # files can be checked without the hub
        return None
    return data.audit_mix(data.fit_mix(mix, tokenizer, config.max_seq_length), tokenizer)


def main(config: TrainConfig) -> None:
    """Resolves the values, prints them and the plan, trains, exports, and prints the results."""
    infer.handle_signals(STOP.receive)
    # A minute for saving, besides the time for a step and evaluations in `make_callback`.
    deadline = time.monotonic() + 3600 * config.max_hours - 60 if config.max_hours else None
    if not is_main_process():
        sys.stdout = io.StringIO()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    config, profile, start = resolve(config)
    folder = config.output_dir / (config.name or config.default_name(profile))
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise UsageError(f"--output-dir {config.output_dir}: {file} is a file; expected a folder.")
    needs_hub = config.needs_hub(profile) or config.push_to_hub
    infer.prepare_environment(profile, offline=None if needs_hub else True)
    recipe = config.recipe(profile, start)
    for name, value in {**recipe, **config.sources(profile), "run folder": folder}.items():
        if value is not None:
            print(f"{name:<30}{data.escape_controls(str(value))}")
    if config.dry_run:
        audit = count_rows(config, profile)
        if audit:
            print(f"\n{data.format_audit(audit)}\n")
        else:
            print("The rows are not counted, because the hub cannot be reached.", file=sys.stderr)
        dtype = profile.dtype
        if config.pad == "added" and dtype == "float32":
            # The embedding's size depends on the dtype in which Unsloth trains.
            with infer.quiet_libraries():
                from unsloth import is_bfloat16_supported

            dtype = "bfloat16" if is_bfloat16_supported() else dtype
        print(format_plan(config, profile, folder, audit, dtype))
        return
    check_exports(config)
    mix = config.load(profile)
    recipe["data_fingerprint"] = mix.fingerprint
    with lock_run(folder):
        record = None if config.restart else read_record(folder)
        if record:
            check_recipe(folder, record["recipe"], recipe)
            infer.check_adapter(folder / "adapter")
            print(f"{folder} is already trained with these values (--restart trains it again).")
        else:
            check_disk(config, profile, folder)
            record = run(config, profile, start, mix, recipe, folder, deadline)
        if not is_main_process():
            return
        if record and folder.parent.resolve() == infer.TRAIN_RUNS.resolve():
            data.write_atomic(infer.LATEST, folder.name + "\n")
        complete = (folder / "run.json").is_file()
        for checkpoint in folder.glob("*checkpoint-*") if complete else ():
            shutil.rmtree(checkpoint)
        exported = list(export(config, profile, folder)) if complete else []
        print("\n".join([*exported, describe_result(config, folder, record)]))


if __name__ == "__main__":
    data.run_command(TrainConfig, main, __doc__, MEMORY_ADVICE)
