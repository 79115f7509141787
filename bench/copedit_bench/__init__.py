"""Microbenchmarks and end-to-end benchmarks, and their recorded results."""
