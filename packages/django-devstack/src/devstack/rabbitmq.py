"""A private RabbitMQ, where it is installed: a node of its own, reachable from here only.

Its Erlang cookie, its files and its name server (epmd) are this stack's alone, so it meets no other
node of the machine, and nothing of it is left when the stack ends.
"""

import glob
from pathlib import Path

from devstack.processes import Process, free_port, which
from devstack.state import secret, write_private

# Debian's command on PATH changes the user and the folder; the script below it does neither.
FOLDERS = "/usr/lib/rabbitmq/bin", "/opt/homebrew/sbin", "/usr/local/sbin"
ERLANG = "/usr/lib/erlang/erts-*/bin", "/opt/homebrew/lib/erlang/erts-*/bin"
CONFIGURATION = """\
listeners.tcp.1 = 127.0.0.1:{port}
default_user = app
default_pass = {password}
log.file = false
log.console = true
log.console.level = warning
"""


def server() -> Path | None:
    """Return the program, or None where it is not installed."""
    found = [Path(folder) / "rabbitmq-server" for folder in FOLDERS]
    return next((path for path in found if path.is_file()), None) or which("rabbitmq-server")


def processes(
    folder: Path, server: Path, *, ports: tuple[tuple[int, ...], ...] = ((), (), ())
) -> tuple[list[Process], str]:
    """Prepare a node with its data in `folder`; return it with its name server, and its URL."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    port, node_port, epmd_port = (free_port(*some) for some in ports)
    password = secret(folder / "password")
    configuration = folder / "rabbitmq.conf"
    write_private(configuration, CONFIGURATION.format(port=port, password=password))
    environment = {
        "HOME": str(folder),  # the cookie is there
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": "devstack@localhost",
        "RABBITMQ_DIST_PORT": str(node_port),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_CONFIG_FILE": str(configuration),
        # none of the machine's own files
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        # The script becomes the server, instead of waiting for it: signals arrive, and the pid is
        # the server's.
        "RUNNING_UNDER_SYSTEMD": "1",
    }
    epmd = which("epmd", *(found for pattern in ERLANG for found in glob.glob(pattern)))
    url, log = f"amqp://app:{password}@127.0.0.1:{port}//", folder.parent / "log"
    names = Process(
        name="epmd",
        command=[str(epmd or "epmd"), "-port", str(epmd_port), "-address", "127.0.0.1"],
        log=log / "epmd.log",
        ready=lambda: True,
    )
    node = Process(
        name="rabbitmq",
        command=[str(server)],
        log=log / "rabbitmq.log",
        ready=lambda: _answers(url),
        environment=environment,
        grace=20,
    )
    return [names, node], url


def _answers(url: str) -> bool:
    from kombu import Connection

    connection = Connection(url, connect_timeout=2)
    try:
        connection.connect()
    except (OSError, *connection.connection_errors):
        return False
    finally:
        connection.release()
    return True
