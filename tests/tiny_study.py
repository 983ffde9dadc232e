"""`ablate.py` with few and short arms, so that a study can be killed often.

    python -m tests.tiny_study CONVERSATIONAL ENCYCLOPEDIC [FLAG ...]

The base model and a training run of two steps on the rows of two files, under three decodings.
"""

import dataclasses
import sys

import ablate
import data
import infer

ARM, DECODINGS = "week4-1-epoch", ("plain", "story-fix", "kit")


def use_tiny_tables(conversational, encyclopedic):
    ablate.ARMS = dict.fromkeys(("base", ARM), DECODINGS)
    ablate.DECODING_ARMS = {
        name: dataclasses.replace(infer.DECODINGS[name], max_new_tokens=12) for name in DECODINGS
    }
    rows = {"conversational": conversational, "encyclopedic": encyclopedic}
    ablate.TRAINING_ARMS = {ARM: ablate.TRAINING_ARMS[ARM] | rows | {"max_steps": 3, "save_minutes": 0}}


if __name__ == "__main__":
    use_tiny_tables(*sys.argv[1:3])
    sys.argv = ["ablate.py", *sys.argv[3:]]
    data.run_command(ablate.AblateConfig, ablate.main, __doc__)
