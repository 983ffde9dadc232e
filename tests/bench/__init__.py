"""Benchmarks: `python -m tests.bench NAME`. They print figures; nothing is asserted about time, for machines are noisy."""
