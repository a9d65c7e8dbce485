"""Whether the values find the few training examples that teach a fact."""
