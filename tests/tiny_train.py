"""`train.py` with short answers at its evaluations, which take most of a tiny run's time.

python -m tests.tiny_train FLAG ...
"""

import dataclasses

import data
import train

PROFILE = dataclasses.replace(data.PROFILES["cpu"], eval_max_new_tokens=12)

if __name__ == "__main__":
    data.PROFILES["cpu"] = PROFILE
    data.run_command(train.TrainConfig, train.main, __doc__, train.MEMORY_ADVICE)
