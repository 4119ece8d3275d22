import contextlib
import errno
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.serving import free_port
from server import listening
from server.errors import Misconfigured
from server.settings import HttpSettings, Settings
from tests.support.server import make_certificate

KEYS = {"keys_file": "keys"}
ALL = "0.0.0.0"  # noqa: S104 - refused, or for a moment


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@contextlib.contextmanager
def bound(
    auth: dict[str, Any] | None = None, **http: Any
) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    with listening.bound(Settings(http={"port": free_port()} | http, auth=auth or {})) as sockets:  # type: ignore[arg-type]
        yield sockets


def refusal(auth: dict[str, Any] | None = None, **http: Any) -> dict[str, Any]:
    """Fields of the error."""
    with pytest.raises(Misconfigured) as caught, bound(auth, **http):
        pass
    assert "\n" not in str(caught.value)
    return caught.value.fields


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8", "::1"])
def test_bound_loopback_needs_no_keys(host: str) -> None:
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("needs IPv6")
    with bound(host=host) as (sockets, ops), socket.socket() as caller:
        assert not ops
        if sockets[0].family == socket.AF_INET:
            # Bound and not listening.
            assert caller.connect_ex(sockets[0].getsockname()) == errno.ECONNREFUSED


@pytest.mark.parametrize(
    ("setting", "http"),
    [
        ("UNETPP_HTTP__HOST", {"host": ALL}),
        ("UNETPP_HTTP__HOST", {"host": "::"}),
        ("UNETPP_HTTP__HOST", {"host": ""}),
        ("UNETPP_HTTP__OPS_HOST", {"ops_port": 1, "ops_host": ALL}),
    ],
)
def test_bound_beyond_loopback_without_keys_is_refused(setting: str, http: dict[str, Any]) -> None:
    fields = refusal(**http)
    assert (fields["setting"], fields["remedy"]) == (setting, "UNETPP_AUTH__KEYS_FILE")


@pytest.mark.parametrize("auth", [KEYS, {"insecure": True}])
def test_bound_beyond_loopback_with_keys_or_insecure(auth: dict[str, Any]) -> None:
    with bound(auth, host=ALL, ops_port=free_port(), ops_host=ALL) as (sockets, ops):
        assert [made.getsockname()[0] for made in (*sockets, *ops)] == [ALL] * 2


@pytest.mark.parametrize("host", ["no.such.host.invalid", "1.2.3.4", "256.1.1.1"])
def test_bound_address_of_another_machine_is_refused(host: str) -> None:
    fields = refusal({"insecure": True}, host=host)
    assert fields["setting"] in ("UNETPP_HTTP__HOST", "UNETPP_HTTP__PORT")


def test_bind_skips_addresses_of_a_name_that_the_machine_lacks() -> None:
    """As localhost has ::1 where IPv6 is turned off."""
    port = free_port()
    # 203.0.113.0/24 belongs to no machine.
    addresses = [(socket.AF_INET, ("203.0.113.1", port)), (socket.AF_INET, ("127.0.0.1", port))]
    with contextlib.ExitStack() as stack:
        sockets = listening.bind("name", port, "UNETPP_HTTP__HOST", True, stack, lambda host, port: addresses)
        assert [made.getsockname() for made in sockets] == [("127.0.0.1", port)]
        only = [addresses[0], (socket.AF_INET, ("203.0.113.2", port))]
        with pytest.raises(Misconfigured):
            listening.bind("name", port, "UNETPP_HTTP__HOST", True, stack, lambda host, port: only)


def test_bound_port_taken_is_refused_and_the_others_are_given_back(taken: int) -> None:
    port = free_port()
    for number, setting in (
        ({"port": taken}, "UNETPP_HTTP__PORT"),
        ({"ops_port": taken}, "UNETPP_HTTP__OPS_PORT"),
    ):
        assert refusal(**({"port": port} | number)) == {"setting": setting, "value": taken}
    for _ in range(2):
        with bound(port=port):
            pass


def test_bound_one_port_for_both_is_refused() -> None:
    port = free_port()
    assert refusal(port=port, ops_port=port) == {"setting": "UNETPP_HTTP__OPS_PORT", "value": port}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cert.pem`, `key.pem`, `locked.pem` (the same key with a passphrase) and `other.pem`, another key."""
    folder = tmp_path_factory.mktemp("tls")
    make_certificate(folder)
    for command in (
        "openssl pkey -in key.pem -aes256 -passout pass:secret -out locked.pem",
        "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out other.pem",
    ):
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("cert", "key", "setting"),
    [
        (None, None, None),
        ("cert.pem", "key.pem", None),
        ("cert.pem", None, "UNETPP_HTTP__TLS_KEY"),
        (None, "key.pem", "UNETPP_HTTP__TLS_CERT"),
        ("none.pem", "key.pem", "UNETPP_HTTP__TLS_CERT"),
        ("cert.pem", "none.pem", "UNETPP_HTTP__TLS_KEY"),
        ("cert.pem", "other.pem", "UNETPP_HTTP__TLS_CERT"),
        ("key.pem", "key.pem", "UNETPP_HTTP__TLS_CERT"),
        ("cert.pem", "cert.pem", "UNETPP_HTTP__TLS_CERT"),
        ("cert.pem", "locked.pem", "UNETPP_HTTP__TLS_CERT"),
    ],
)
def test_check_certificate(
    certificates: Path, cert: str | None, key: str | None, setting: str | None
) -> None:
    http = HttpSettings(tls_cert=cert and certificates / cert, tls_key=key and certificates / key)  # type: ignore[arg-type]
    with contextlib.nullcontext() if setting is None else pytest.raises(Misconfigured) as caught:
        listening.check_certificate(http)
    if setting:
        assert caught.value.fields["setting"] == setting
