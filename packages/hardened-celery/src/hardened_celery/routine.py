"""What happens every few seconds and interests nobody while it goes well: no log lines, no traces.

Names only: nothing of these packages is imported, and a project without them has no such tasks.
"""

LOOP, PROBE = "durable_jobs.reconcile", "queue_probes.probe"
TASKS = {LOOP, PROBE}
PATHS = ("/healthz/", "/metrics")
