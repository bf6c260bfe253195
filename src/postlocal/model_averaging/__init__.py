"""Averaging of parameters every so many steps: torch's averagers, by torch's names.

Change ``torch.distributed.algorithms.model_averaging`` to ``postlocal.model_averaging``.
"""
