"""Writes a Flower app that runs a configuration.

python -m fedq.integrations.flower new FOLDER encoder=frontier dataset=mnist5k
"""

import re
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fedq.config import ConfigError, build, check, explain
from fedq.errors import FedqError
from fedq.train import CONF

_PROJECT = """\
[project]
name = "{name}"
version = "1.0.0"
description = "Federated learning with fedq"
license = "Apache-2.0"
dependencies = []  # Flower's processes need an environment with fedq[flower]

[tool.flwr.app]
publisher = "fedq"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
output = "outputs/flower"  # the run's folder is below, named by Flower's number of the run
timeout = 3600             # seconds after which a node that has not answered is left out
"""

_APP = '''\
"""The {side} of the configuration in config.yaml."""

from pathlib import Path

from fedq.integrations.flower.{side} import {side}_app

app = {side}_app(Path(__file__).with_name("config.yaml"))
'''


def main(arguments: list[str]) -> None:
    """Runs the command line. Raises SystemExit with one clear sentence for wrong arguments."""
    if len(arguments) < 2 or arguments[0] != "new" or "=" in arguments[1]:
        sys.exit("usage: python -m fedq.integrations.flower new FOLDER [encoder=frontier dataset=mnist5k …]")
    folder = Path(arguments[1])
    try:
        clients = new(folder, arguments[2:])
    except FedqError as error:
        sys.exit(f"fedq: {error}")
    except OSError as error:
        sys.exit(f"fedq: {error.filename}: {error.strerror}")
    print(
        f"{folder} holds a Flower app with {clients} clients. To run it in Flower's simulation:\n"
        f'flwr run {folder} local --stream --federation-config "num-supernodes={clients}"'
    )


def new(folder: Path, overrides: list[str]) -> int:
    """Writes the four files of an app into a new folder, and returns the number of the dataset's clients.

    overrides: Keys and values, as `fedq.train` takes on its command line.

    Raises FedqError for a configuration that is wrong, and for a folder that holds files.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides)
    except Exception as error:  # an error of Hydra
        raise ConfigError(explain(error)) from error
    check(cfg, overrides)
    clients = build(cfg, "dataset").num_clients
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"{folder} holds files; name a new folder")
    files = {
        "pyproject.toml": _PROJECT.format(name=_app_name(folder.resolve().name)),
        "config.yaml": OmegaConf.to_yaml(cfg),
        "client_app.py": _APP.format(side="client"),
        "server_app.py": _APP.format(side="server"),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return int(clients)


def _app_name(name: str) -> str:
    """Returns a name that Flower allows: a letter, then letters, digits and hyphens, at most 32 together."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    return (words if words[:1].isalpha() else f"app-{words}")[:32].strip("-")


if __name__ == "__main__":
    main(sys.argv[1:])
