"""A training loop under a strategy: the clock, synchronizations, and what they act on."""
