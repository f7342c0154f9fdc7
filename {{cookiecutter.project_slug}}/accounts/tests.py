"""How a task is tested: `drain()` runs what is due in this process, as a worker would."""

from datetime import timedelta

from django.contrib.sessions.models import Session
from django.db import transaction
from django.test import TestCase
from django.utils import timezone
from durable_jobs import Job
from durable_jobs.testing import drain

from accounts.tasks import clear_sessions


class ClearSessionsTest(TestCase):
    def setUp(self):
        for key, days in (("old", -1), ("new", 1)):
            expires = timezone.now() + timedelta(days=days)
            Session.objects.create(session_key=key, session_data="", expire_date=expires)

    def keys(self):
        return sorted(session.session_key for session in Session.objects.all())

    def test_expired_sessions_go_and_others_stay(self):
        clear_sessions.delay()
        self.assertEqual(drain(), 1)
        self.assertEqual(self.keys(), ["new"])

    def test_a_call_that_is_rolled_back_leaves_no_job(self):
        with self.assertRaises(ZeroDivisionError), transaction.atomic():
            clear_sessions.delay()
            raise ZeroDivisionError
        self.assertFalse(Job.objects.exists())
        self.assertEqual(self.keys(), ["new", "old"])
