"""Runs the t4 profile through Unsloth's GPU code, or its CPU backend, on a small Llama without a GPU.

    python -m tests.gpu_path {gpu,cpu} BASE_MODEL {train,infer} FLAG ...

`gpu`: Unsloth believes that it is on a T4. Its loader, 4-bit weights, LoRA, norm, rotary and feed-forward kernels (in Triton's
interpreter), fused loss, padding-free batches, checkpointing, its rewritten trainer and its `generate` are the real ones;
torch.cuda, streams, pinned memory and autocast are not. `cpu`: the same values on the CPU backend. Either way the scripts run
as they are; only the base model in their table is another.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import types
from pathlib import Path

import data
import infer
import train

T4 = types.SimpleNamespace(
    name="Tesla T4", total_memory=15_835_660_288, major=7, minor=5, multi_processor_count=40, gcnArchName="", warp_size=32
)


class NoStream:
    """Replaces a CUDA stream, event or device context: everything is synchronous."""

    cuda_stream = idx = 0

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def __getattr__(self, name):
        return lambda *_, **__: None


def pretend_t4():
    """Makes torch.cuda describe a T4 whose memory is the host's."""
    import torch
    from torch.overrides import TorchFunctionMode

    def on_cpu(given):
        if isinstance(given, torch.device) and given.type == "cuda":
            return torch.device("cpu")
        # A bare number is a card's; True and False are numbers as well, and no cards.
        return "cpu" if type(given) is int or (isinstance(given, str) and given.startswith("cuda")) else given

    class HostMemory(TorchFunctionMode):
        def __torch_function__(self, func, types_, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            name = getattr(func, "__name__", "")
            if name in ("cuda", "pin_memory"):
                return args[0]
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            if name == "to":
                args = (args[0], *map(on_cpu, args[1:]))
            return func(*args, **kwargs)

    said = {
        "get_device_properties": T4,
        "get_device_capability": (7, 5),
        "get_device_name": T4.name,
        "current_device": 0,
        "device_count": 1,
        "mem_get_info": (15 * 2**30, 15 * 2**30),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "is_bf16_supported": False,
        "is_current_stream_capturing": False,
        "empty_cache": None,
        "synchronize": None,
        "set_device": None,
    }
    for name, answer in said.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in ("Stream", "Event", "current_stream", "default_stream", "device"):
        setattr(torch.cuda, name, NoStream)
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    HostMemory().__enter__()


def import_gpu_unsloth(*, host_device_map=True):
    """Imports Unsloth's GPU code as on a GPU, with its 4-bit loader and without driver calls."""
    os.environ.update(UNSLOTH_ALLOW_CPU="1", TRITON_INTERPRET="1", UNSLOTH_COMPILE_DISABLE="1")
    import torch  # noqa: F401 - before the pretence, which it must not see while it is imported

    pretend_t4()
    import unsloth

    assert unsloth.DEVICE_TYPE == "cuda"
    # Told that it may be on a CPU, Unsloth leaves TRL as it is; a GPU import rewrites it.
    os.environ["UNSLOTH_ALLOW_CPU"] = "0"
    from unsloth.models import loader
    from unsloth.models.llama import FastLlamaModel
    from unsloth.models.rl import PatchFastRL
    from unsloth.trainer import _patch_trl_trainer

    PatchFastRL(FastLanguageModel=FastLlamaModel)
    _patch_trl_trainer()
    loader.ALLOW_BITSANDBYTES = True
    if not host_device_map:
        return
    real = unsloth.FastLanguageModel.from_pretrained
    unsloth.FastLanguageModel.from_pretrained = staticmethod(lambda **given: real(**given, device_map={"": "cpu"}))


def log_kernels():
    """Lets Unsloth print which layers it patched, and records of each loss its tokens and the number it is divided by."""
    from unsloth.models import llama

    warn = logging.Logger.warning_once

    def print_patched(logger, message, *args, **kwargs):
        # Whatever the level: Unsloth binds its logger anew while it loads a model.
        if " patched " in message:
            print(message)
        return warn(logger, message, *args, **kwargs)

    logging.Logger.warning_once = print_patched
    fused_loss = llama.unsloth_fused_ce_loss

    def recorded(*args, labels, n_items, **kwargs):
        counts = {"tokens": int((labels[..., 1:] != -100).sum()), "divisor": None if n_items is None else int(n_items)}
        with Path("losses.jsonl").open("a") as file:
            file.write(json.dumps(counts) + "\n")
        return fused_loss(*args, labels=labels, n_items=n_items, **kwargs)

    llama.unsloth_fused_ce_loss = recorded


def use_t4_values(profile, base_model):
    """Puts the t4 profile's values, with another base model, into the tables under `profile`, and makes a run short.

    The interpreter takes a millisecond for what a GPU's block does in a microsecond: steps of 4 rows, answers of 3 tokens in passes of 4 rows.
    """

    t4 = dataclasses.replace(data.PROFILES["t4"], name=profile, base_model=base_model)
    data.PROFILES[profile] = dataclasses.replace(t4, architecture=data.Architecture.read(base_model))
    train.ROWS_PER_STEP = 4
    infer.DECODINGS["kit"] = dataclasses.replace(infer.DECODINGS["kit"], max_new_tokens=3)
    infer.REFERENCE_PROBES, infer.REFERENCE_TOKENS = 1, 3
    infer.ROWS = 4
    infer.prepare_reference = lambda profile: None  # its process would look for a real GPU
    train.choose_checkpointing = lambda profile, *given: profile  # so small a model would not need it


def main(backend, base_model, script, *flags):
    os.environ["HF_HUB_OFFLINE"] = "1"
    profile = "t4" if backend == "gpu" else "cpu"
    use_t4_values(profile, base_model)
    infer.prepare_environment(data.PROFILES[profile], offline=True)
    quiet_libraries = infer.quiet_libraries

    @contextlib.contextmanager
    def keep_output():
        """As `infer.quiet_libraries`, but what it hides goes to a file."""
        with quiet_libraries(), Path("libraries.txt").open("a") as file, contextlib.redirect_stdout(file):
            yield

    infer.quiet_libraries = keep_output
    if backend == "gpu":
        with keep_output():
            import_gpu_unsloth()
        log_kernels()
    config, run = {"train": (train.TrainConfig, train.main), "infer": (infer.InferConfig, infer.main)}[script]
    sys.argv = [f"{script}.py", *flags, "--profile", profile]
    data.run_command(config, run, None)


if __name__ == "__main__":
    main(*sys.argv[1:])
