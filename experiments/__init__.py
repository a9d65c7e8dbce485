"""Studies: one folder a claim, each with its question, its run and its result."""
