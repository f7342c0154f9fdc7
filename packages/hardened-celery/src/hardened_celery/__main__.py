"""`python -m hardened_celery` is the command `hardened-celery`."""

import sys

from hardened_celery.worker import main

sys.exit(main())
