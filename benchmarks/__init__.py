"""Measurements: ratios from one run, never bare times. Records lie in ``records``."""
