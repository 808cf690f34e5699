"""Benchmarks: LaVIN beside what a user would pick instead, interleaved in one run."""
