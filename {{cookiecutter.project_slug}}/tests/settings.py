"""The project's settings, in a hurry: a test does not want to wait for half a minute."""

from config.settings import *  # noqa: F403

# A job whose worker is silent for so long is given to another one; 30, 10 and 5 s otherwise.
DURABLE_JOBS = {"LEASE": 3, "HEARTBEAT": 1, "TICK": 0.5}
