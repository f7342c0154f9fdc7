"""Give the new project its development secrets, drop what was declined, say what comes next."""

import json
import os
import secrets
import shutil
import sys
from pathlib import Path

ANSWERS = json.loads(r"""{{ cookiecutter | tojson }}""")

SECRETS = {
    "# DJANGO_SECRET_KEY=": secrets.token_urlsafe(50),
    "# SERVICES_PASSWORD=": secrets.token_urlsafe(24),
    "# FLOWER_BASIC_AUTH=": f"dev:{secrets.token_urlsafe(12)}",
}

if not Path("packages").is_dir():  # a link that arrived as a text file: a zip archive, Windows
    sys.exit("Nothing was generated. packages is no folder: take the template by git, on Linux, macOS or WSL.")
for leftover in ("tests", "build", "dist"):
    for folder in Path("packages").glob(f"*/{leftover}"):
        shutil.rmtree(folder)
for cache in [*Path("packages").rglob("__pycache__"), *Path("packages").rglob("*.egg-info")]:
    shutil.rmtree(cache)

settings = Path(".env.example").read_text()
for name, secret in SECRETS.items():
    settings = settings.replace(name, name.removeprefix("# ") + secret, 1)
# an existing .env is somebody's: generating over a project keeps it
if not Path(".env").exists():
    with open(os.open(".env", os.O_WRONLY | os.O_CREAT, 0o600), "w") as env_file:
        env_file.write(settings)

if not ANSWERS["example_app"]:
    shutil.rmtree("notes")

print(f"""
{ANSWERS["project_slug"]} is ready:

    cd {ANSWERS["project_slug"]}
    make up      # the whole stack, on this machine
    make test
""")
