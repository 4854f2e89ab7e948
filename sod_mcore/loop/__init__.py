"""What ``pretrain_sod.py`` is made of: checks, trajectory sources, weight sync, stopping, metrics.

Only the entry points import this package; it may import every other part.
"""
