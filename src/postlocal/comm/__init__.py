"""Communication: groups of ranks, missing ranks, and the thread that works beside training."""
