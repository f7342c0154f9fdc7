"""Who may log in. Django asks for a model of your own before the first migration, so here it is."""

from django.contrib.auth.models import AbstractUser


class User(AbstractUser):
    """Django's own user. Add fields below; `make lint` says how a migration stays harmless."""
