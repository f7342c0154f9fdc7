"""A new release of a Django and Celery project in the middle of the day, and no work lost."""
