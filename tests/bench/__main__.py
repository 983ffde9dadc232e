"""python -m tests.bench NAME [ARGUMENT ...] runs tests/bench/NAME.py."""

import importlib
import sys
from pathlib import Path

names = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
if len(sys.argv) < 2 or sys.argv[1] not in names:
    sys.exit(f"usage: python -m tests.bench {{{','.join(names)}}}")
importlib.import_module(f"tests.bench.{sys.argv[1]}").main(sys.argv[2:])
