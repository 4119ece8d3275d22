import contextlib
import errno
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.serving import free_port
from server import listening
from server.errors import Misconfigured
from server.settings import HttpSettings, Settings
from tests.support.server import make_certificate


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@contextlib.contextmanager
def opened(auth: dict[str, object] | None = None, **http: object) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    with listening.bound(Settings(http={"port": free_port()} | http, auth=auth or {})) as sockets:  # type: ignore[arg-type]
        yield sockets


def said(auth: dict[str, object] | None = None, **http: object) -> str:
    """Why the server must not or cannot listen there."""
    with pytest.raises(Misconfigured) as caught, opened(auth, **http):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cert.pem`, `key.pem`, `locked.pem` (the same key with a passphrase) and `other.pem`, another key."""
    folder = tmp_path_factory.mktemp("tls")
    make_certificate(folder)
    for command in (
        ["openssl", "pkey", "-in", "key.pem", "-aes256", "-passout", "pass:secret", "-out", "locked.pem"],
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "other.pem"],
    ):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


class TestAddresses:
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8", "::1"])
    def test_loopback_is_for_all(self, host: str) -> None:
        if host == "::1" and not Path("/proc/net/if_inet6").exists():
            pytest.skip("needs IPv6")
        with opened(host=host) as (sockets, ops):
            assert sockets
            assert not ops

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])  # noqa: S104 - refused
    def test_beyond_it_there_must_be_keys(self, host: str) -> None:
        line = said(host=host)
        assert "UNETPP_HTTP__HOST" in line
        assert "UNETPP_AUTH__KEYS_FILE" in line
        assert "--insecure" in line

    def test_the_ops_port_counts_too(self) -> None:
        assert "UNETPP_HTTP__OPS_HOST" in said(ops_port=free_port(), ops_host="0.0.0.0")  # noqa: S104 - refused

    @pytest.mark.parametrize("auth", [{"keys_file": "keys"}, {"insecure": True}])
    def test_with_them_or_where_it_is_asked_for(self, auth: dict[str, object]) -> None:
        with opened(auth, host="0.0.0.0", ops_port=free_port(), ops_host="0.0.0.0") as (sockets, ops):  # noqa: S104 - for a moment
            assert [made.getsockname()[0] for made in (*sockets, *ops)] == ["0.0.0.0"] * 2  # noqa: S104

    @pytest.mark.parametrize("host", ["no.such.host.invalid", "1.2.3.4", "256.1.1.1"])
    def test_that_are_not_ours(self, host: str) -> None:
        assert host in said({"insecure": True}, host=host)

    def test_a_name_with_an_address_that_the_machine_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As localhost has ::1 where IPv6 is turned off."""
        real = listening._bind_one

        def lacks_six(family: int, address: tuple[object, ...]) -> socket.socket:
            if family == socket.AF_INET6:
                raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
            return real(family, address)

        port = free_port()
        found = [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)), (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]  # fmt: skip
        monkeypatch.setattr(listening.socket, "getaddrinfo", lambda *_, **__: found)
        monkeypatch.setattr(listening, "_bind_one", lacks_six)
        with opened(port=port) as (sockets, _):
            assert [made.getsockname() for made in sockets] == [("127.0.0.1", port)]


class TestPorts:
    def test_taken(self, taken: int) -> None:
        assert f"port {taken} of 127.0.0.1 is taken" in said(port=taken)
        assert f"port {taken} of 127.0.0.1 is taken" in said(ops_port=taken)

    def test_one_for_both(self) -> None:
        port = free_port()
        assert "must differ" in said(port=port, ops_port=port)

    def test_nobody_is_answered_before_the_server_listens(self) -> None:
        with opened() as (sockets, _), socket.socket() as caller:
            assert caller.connect_ex(sockets[0].getsockname()) == errno.ECONNREFUSED

    def test_are_given_back(self, taken: int) -> None:
        port = free_port()
        said(port=port, ops_port=taken)
        for _ in range(2):
            with opened(port=port):
                pass


class TestCertificates:
    def check(self, folder: Path, cert: str | None, key: str | None) -> None:
        listening.check_certificate(HttpSettings(tls_cert=cert and folder / cert, tls_key=key and folder / key))  # type: ignore[arg-type]

    def test_that_fits(self, certificate: Path) -> None:
        self.check(certificate, "cert.pem", "key.pem")
        self.check(certificate, None, None)

    @pytest.mark.parametrize(
        ("cert", "key", "said"),
        [
            ("cert.pem", None, "set both, or none"), (None, "key.pem", "set both, or none"), ("none.pem", "key.pem", "no file"),
            ("cert.pem", "none.pem", "no file"), ("cert.pem", "other.pem", "belong to each other"), ("key.pem", "key.pem", "must be PEM"),
            ("cert.pem", "cert.pem", "must be PEM"), ("cert.pem", "locked.pem", "no passphrase"),
        ],
    )  # fmt: skip
    def test_that_does_not(self, certificate: Path, cert: str | None, key: str | None, said: str) -> None:
        with pytest.raises(Misconfigured, match=said):
            self.check(certificate, cert, key)
