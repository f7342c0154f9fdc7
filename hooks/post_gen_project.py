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
# Lines that end with one mark stay, without it; those with the other go.
KEPT, DROPPED = ("  # example\n", "  # no example\n")
ONLY_EXAMPLE, ONLY_PLAIN = "notes", "templates"
if not ANSWERS["example_app"]:
    KEPT, DROPPED, ONLY_EXAMPLE, ONLY_PLAIN = DROPPED, KEPT, ONLY_PLAIN, ONLY_EXAMPLE

if not Path("packages").is_dir():  # a link that arrived as a text file: a zip archive, Windows
    # all of it is ours: the folder was empty
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    sys.exit(
        "Nothing was generated. packages is no folder: take the template by git, on Linux, macOS or"
        " WSL."
    )
# Tests, and what working on a package leaves beside it, stay in the template.
installable = {"LICENSE", "README.md", "pyproject.toml", "src"}
for path in Path("packages").glob("*/*"):
    if path.name not in installable:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
for cache in list(Path("packages").rglob("__pycache__")):
    shutil.rmtree(cache)

shutil.rmtree(ONLY_PLAIN)
for path in (Path("config/settings.py"), Path("config/urls.py")):
    lines = path.read_text().splitlines(keepends=True)
    kept = [line.replace(KEPT, "\n") for line in lines if not line.endswith(DROPPED)]
    path.write_text("".join(kept))

settings = Path(".env.example").read_text()
for name, secret in SECRETS.items():
    settings = settings.replace(name, name.removeprefix("# ") + secret, 1)
with open(os.open(".env", os.O_WRONLY | os.O_CREAT, 0o600), "w") as env_file:
    env_file.write(settings)

print(f"""
{ANSWERS["project_slug"]} is ready:

    cd {ANSWERS["project_slug"]}
    make up      # the whole stack, on this machine
    make test
""")
