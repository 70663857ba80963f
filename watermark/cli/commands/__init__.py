"""The commands, one module per group; main.py collects them. Heavy imports are deferred until a command runs."""
