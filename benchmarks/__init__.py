"""Benchmarks: each module says in its first lines what it measures and how to run it; records go to results/."""
