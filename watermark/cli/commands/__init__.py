"""The commands, a module a group of them; main.py collects them. Heavy imports wait until a command runs."""
