"""Checks the arguments passed to Unsloth and TRL against the GPU path's signatures: python -m tests.gpu_signatures

Prints JSON: for each call the keywords that the GPU path has no parameter for; of SFTConfig what it printed, the fields that
came out otherwise than they went in, and the fields that were left to a default which differs from stock TRL's.
"""

import contextlib
import dataclasses
import inspect
import io
import json
import os

import data
import infer
import train
from tests import gpu_path


class BoundError(Exception):
    """Ends a call after its arguments were checked."""


def unknown_to(function, call):
    """Keywords that `call` passes to `function`, put in its place, for which it has no parameter but `**kwargs`.

    Raises TypeError where it has not even that.
    """
    unknown = []

    def bound(*args, **kwargs):
        unknown.extend(inspect.signature(function).bind(*args, **kwargs).arguments.get("kwargs", ()))
        raise BoundError

    with contextlib.suppress(BoundError):
        call(bound)
        raise AssertionError("nothing was called")
    return unknown


def call_in_place(holder, name, call):
    """The unknown keywords of `holder.name` as `call()` calls it."""
    real = getattr(holder, name)

    def with_bound(bound):
        setattr(holder, name, bound)
        try:
            call()
        finally:
            setattr(holder, name, real)

    return unknown_to(real, with_bound)


def examine():
    os.environ["HF_HUB_OFFLINE"] = "1"
    infer.prepare_environment(data.PROFILES["t4"], offline=True)
    gpu_path.import_gpu_unsloth(host_device_map=False)
    import trl
    import unsloth
    from trl.trainer.sft_config import SFTConfig as StockConfig
    from unsloth import save

    recipe, profile = train.resolve(train.TrainConfig(profile="t4"))
    loader, config_class = unsloth.FastLanguageModel, trl.SFTConfig
    passed, said = {}, io.StringIO()

    def recording_config(**kwargs):
        passed.update(kwargs)
        return config_class(**kwargs)

    trl.SFTConfig = recording_config
    with contextlib.redirect_stdout(said):
        config = train.make_sft_config(recipe, profile, 100)
    trl.SFTConfig = config_class
    gpu_defaults = {name: each.default for name, each in inspect.signature(config_class.__init__).parameters.items()}
    stock_defaults = {
        each.name: each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        for each in dataclasses.fields(next(base for base in config_class.__mro__ if base.__module__ == StockConfig.__module__))
        if each.init
    }
    return {
        "unknown": {
            "from_pretrained": call_in_place(loader, "from_pretrained", lambda: infer.load_base(data.PROFILES["t4"], dtype="float16")),
            "get_peft_model": call_in_place(loader, "get_peft_model", lambda: train.add_lora(object(), recipe, profile)),
            # train.py makes a subclass, whose calls go through to this one.
            "SFTTrainer": unknown_to(
                trl.SFTTrainer.__init__,
                lambda bound: bound(None, model=0, processing_class=0, args=0, train_dataset=0, eval_dataset=0),
            ),
            "save_pretrained_merged": unknown_to(
                save.unsloth_save_pretrained_merged,
                lambda bound: bound(None, "merged", tokenizer=0, save_method="merged_16bit"),
            ),
            "save_pretrained_gguf": unknown_to(
                save.unsloth_save_pretrained_gguf,
                lambda bound: bound(None, "gguf", tokenizer=0, quantization_method="q4_k_m"),
            ),
        },
        "typo": unknown_to(loader.from_pretrained, lambda bound: bound(max_seq_lenght=1)),
        "said": said.getvalue(),
        "changed": [name for name, value in passed.items() if getattr(config, name, None) != value],
        "unset_differing_defaults": [
            name
            for name in gpu_defaults.keys() & stock_defaults.keys()
            if gpu_defaults[name] != stock_defaults[name] and name not in passed
        ],
        "fp16": config.fp16,
        "bf16": config.bf16,
    }


if __name__ == "__main__":
    print(json.dumps(examine(), default=str))
