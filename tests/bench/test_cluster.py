"""A small cluster under load, while a node is killed and a server is cut off: nothing is lost, and every answer has the same bytes."""

import asyncio
from pathlib import Path

import pytest

from bench import cluster, cluster_lab, stores


@pytest.mark.long
def test_cluster_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("psycopg", "obstore", "moto"):
        pytest.importorskip(package, reason="needs the extra cluster, and moto[s3]")
    monkeypatch.setattr(cluster, "CUT_S", 2)
    names = ["one node killed", *(name for name in cluster.EVENTS if "network" in name)]
    try:
        outcome = asyncio.run(cluster.run(("a1", "b1"), tuple(names), seconds=2, logs=tmp_path))
    except stores.Missing as error:
        pytest.skip(str(error))
    assert not outcome.failures
    # Else the events met no request.
    assert all(len(phase.ledger.answers) > 5 for phase in outcome.phases)
    assert sum(outcome.attempts.values()) == sum(len(phase.ledger.jobs) for phase in outcome.phases) > 0


def test_haproxy_config_has_the_servers_given_and_no_others() -> None:
    text = cluster_lab.haproxy_config(8001, {"a1": (1, 2), "b1": (3, 4)})
    assert "bind 127.0.0.1:8001" in text
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("server ")]
    assert lines == ["server a1 127.0.0.1:1 port 2", "server b1 127.0.0.1:3 port 4"]
    assert "resolvers" not in text


def test_silent_network_delivers_when_it_is_mended() -> None:
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as target:
        road = stores.Network(target.getsockname())
        with socket.create_connection(("127.0.0.1", road.port)) as near:
            far, _ = target.accept()
            with far:
                road.silence()
                near.sendall(b"late")
                threading.Timer(0.2, road.mend).start()
                assert far.recv(4) == b"late"
                road.cut()
                assert far.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", road.port)).close()
