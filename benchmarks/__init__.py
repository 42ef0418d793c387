"""Benchmarks: each module says in its first lines what it measures and how to run it; records go to results/."""

import blto  # noqa: F401  # before torch is loaded, as on the command line: see there what it sets
