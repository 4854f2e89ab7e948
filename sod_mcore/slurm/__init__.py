"""Writes a job file for SLURM from a configuration, after checking that the two fit.

``scripts/slurm/`` holds the templates, which can be filled in by hand as well. Nothing here imports
torch or asks SLURM: it runs on a login node in a second.
"""
