"""Files of the template that wire this package, or that its launcher and doctor stand beside.

They are what a new project gets; the tests here prove what their comments say.
"""

from pathlib import Path

CONFIG = Path(__file__).parents[3] / "{{cookiecutter.project_slug}}" / "config"
TEMPLATE_SETTINGS = CONFIG / "celery_settings.py"
GUNICORN = CONFIG / "gunicorn.conf.py"
