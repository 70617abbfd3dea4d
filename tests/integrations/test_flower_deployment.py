"""A SuperLink and SuperNodes as processes on the loopback, with TLS and node authentication."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: make test-flower installs it")

from experiments.flower.deployment import Deployment
from experiments.flower.secure import certificates, node_key
from fedq.integrations.flower.__main__ import new

BLOCKING = '''
import os
import time
from pathlib import Path

from fedq.data.writers import Writers


class Blocking(Writers):
    """The first reading of client 2 is for its registration. The next reading waits until the node is killed."""

    def __init__(self, folder, **arguments):
        super().__init__(**arguments)
        self.folder = Path(folder)

    def client(self, number):
        registered, killed = self.folder / "registered", self.folder / "killed"
        if number == 2 and os.environ.get("FLWR_HOME") and not killed.exists():
            if registered.exists():
                (self.folder / "training").touch()
                while not killed.exists():
                    time.sleep(0.1)
                os._exit(1)
            registered.touch()
        return super().client(number)
'''
DAMAGING = '''
from pathlib import Path

from flwr.app import Array, ArrayRecord
from flwr.clientapp import ClientApp

from fedq.encoding.message import peek
from fedq.integrations.flower.client import client_app


class Damaging(ClientApp):
    """Client 1 cuts its message of the second round."""

    def __call__(self, message, context):
        reply = inner(message, context)
        if context.node_config["partition-id"] == 1 and "answer" in reply.content:
            record = reply.content["answer"]
            data = record["0"].data
            if peek(data)[1].round == 1:
                record["0"] = Array("uint8", (len(data) - 7,), "fedq.message", data[:-7])
        return reply


inner = client_app(Path(__file__).with_name("config.yaml"))
app = Damaging()
'''


@pytest.mark.timeout(600)
def test_training_goes_on_when_a_node_is_killed_and_a_message_is_cut(tmp_path: Path) -> None:
    """Client 2's node is killed while it trains in the first round, and another node takes its place."""
    app = tmp_path / "app"
    sizes = ["dataset=writers", "dataset.clients=3", "dataset.examples_per_client=20", "dataset.test_examples=10"]
    blocking = ["dataset._target_=blocking.Blocking", f"+dataset.folder={tmp_path}"]
    run = ["model=mlp", "encoder=uint8", "run.rounds=3", "run.clients_per_round=3", "run.min_clients=1"]
    (tmp_path / "blocking.py").write_text(BLOCKING)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.delenv("FLWR_HOME", raising=False)
        new(app, [*sizes, *blocking, *run])
    (app / "blocking.py").write_text(BLOCKING)
    (app / "client_app.py").write_text(DAMAGING)
    certificates(tmp_path)
    link = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
    security = f'root-certificates = "{tmp_path}/ca.crt"'
    deployment = Deployment(tmp_path, link_options=[*link, "--enable-supernode-auth"], security=security)
    with deployment, ThreadPoolExecutor() as pool:
        for name in ("0", "1", "2", "again"):
            node_key(tmp_path, name)
            deployment.command("supernode", "register", str(tmp_path / f"{name}.pub"))

        def options(name: str) -> list[str]:
            return ["--root-certificates", "ca.crt", "--auth-supernode-private-key", name]

        *_, third = (deployment.node(number, options=options(str(number))) for number in range(3))
        running = pool.submit(deployment.run, app, f'output="{tmp_path}/out"', 500)
        while not (tmp_path / "training").exists():
            assert not running.done(), running.result()
            time.sleep(0.1)
        deployment.kill(third)
        (tmp_path / "killed").touch()
        deployment.node(2, "again", options("again"))
        log = running.result()
    (folder,) = (tmp_path / "out").iterdir()
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["clients"] for one in rounds] == [2, 2, 3], log
    assert [one["clients_failed/silent"] for one in rounds] == [1, 0, 0]
    assert [one["clients_failed/refused"] for one in rounds] == [0, 1, 0]
    assert "client 2 is left out" in log
    assert "client 1 is left out: the header says" in log
