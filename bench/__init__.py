"""Benchmarks: every figure that the README quotes, one command each."""
