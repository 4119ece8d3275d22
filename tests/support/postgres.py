"""A real PostgreSQL and a real S3 server for tests."""

import contextlib
import warnings
from collections.abc import Iterator

import pytest

from bench import stores
from bench.stores import BUCKET


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Starts a PostgreSQL and gives the address of its maintenance database; skips where there is none."""
    pytest.importorskip("psycopg", reason="needs the extra cluster")
    with contextlib.ExitStack() as stack:
        try:
            address = stack.enter_context(stores.postgres_server())
        except stores.Missing as error:
            pytest.skip(str(error))
        yield address


def emptied(address: str) -> str:
    """Removes the tables of an earlier test, and gives the address."""
    import psycopg

    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("SET client_min_messages = warning")
        connection.execute("DROP SCHEMA IF EXISTS unetpp CASCADE")
    return address


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Starts a server that speaks S3, with one bucket, and gives its endpoint; skips where there is none."""
    pytest.importorskip("obstore", reason="needs the extra cluster")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = pytest.importorskip("moto.server", reason="needs moto[s3] and flask-cors")
    import logging

    import httpx

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        endpoint = "http://{}:{}".format(*running.get_host_and_port())
        httpx.put(f"{endpoint}/{BUCKET}").raise_for_status()
        yield endpoint
    finally:
        running.stop()
