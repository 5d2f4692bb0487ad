"""Benchmarks that say what they timed: `pytest benchmarks/ --benchmark-only`."""
