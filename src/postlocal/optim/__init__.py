"""Optimizers that average: torch's, by torch's name.

Change ``from torch.distributed.optim import PostLocalSGDOptimizer`` to ``from postlocal.optim``.
"""

from postlocal.optim.post_localSGD_optimizer import PostLocalSGDOptimizer

__all__ = ["PostLocalSGDOptimizer"]
