"""A doctor of Celery settings, a worker launcher that loses nothing, liveness, logs and Sentry."""
