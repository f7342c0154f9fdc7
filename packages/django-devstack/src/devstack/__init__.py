"""Runs the whole project on this machine, without Docker: `python -m devstack up`."""
