"""Test accuracy at equal epochs: post-local SGD against DDP with large batches."""
