"""Experiments, one file each: `python -m scripts.experiments --list`."""
