"""Sampling multi-turn trajectories: one conversation at a time, hundreds at once, in a process."""
