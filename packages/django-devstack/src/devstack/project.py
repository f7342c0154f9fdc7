"""What is the project's and not ours: `[tool.devstack]` of its `pyproject.toml`."""

import tomllib
from pathlib import Path

_file = Path.cwd() / "pyproject.toml"
_table = tomllib.loads(_file.read_text()).get("tool", {}) if _file.exists() else {}
_table = _table.get("devstack", {})
BROKER: str = _table.get("broker", "valkey")
TASK: str = _table.get("task", "")
SETTINGS: str = _table.get("settings", "config.settings")
