"""The paper's comparisons, run and reported."""
