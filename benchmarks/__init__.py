"""Measurements of what this package claims; ``docs/benchmarks.md`` lists the commands and results.

- ``time_to_loss``, ``convergence``, ``vision``: packages of a benchmark each; ``__main__`` is the
  command, ``table`` makes the tables.
- ``cluster``: hosts of one machine, with links of limited rate, that the others train on.
- ``measure``, ``report``, ``options``, ``cache``, ``training``, ``shapes``, ``peers``: parts of
  benchmarks.
- Every other module is a benchmark.
"""
