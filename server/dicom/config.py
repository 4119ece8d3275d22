"""The operator's file about PACS: DICOMweb servers, the DICOM node, and the rules that choose a model for a series."""

import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from server.errors import Misconfigured
from server.segment.request import SegmentParams

SETTING = "UNETPP_DICOM__CONFIG"

# Printable, without a backslash, and not of blanks alone (PS3.5, value representation AE); "@" and ":" separate here.
AETitle = Annotated[
    str, StringConstraints(strip_whitespace=True, pattern=r"^[!-?A-\[\]-~][ -?A-\[\]-~]{0,15}$")
]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,63}$")]
ADDRESS = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?")
DESTINATION = re.compile(r"(?P<aet>[^@]{1,16})@(?P<host>[^@\s]+):(?P<port>\d{1,5})")


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_address(address: str) -> str:
    if not ADDRESS.fullmatch(address):
        raise ValueError(
            "is not of the form https://HOST[:PORT]/PATH, without credentials, which have files of their own"
        )
    return address.rstrip("/")


def _check_destination(destination: str) -> str:
    parse_destination(destination)
    return destination


def parse_destination(destination: str) -> tuple[str, str, int]:
    """Takes "AET@HOST:PORT" apart.

    Raises:
        ValueError: it has another form.
    """
    match = DESTINATION.fullmatch(destination)
    if not match or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"{destination!r:.80} is not of the form AET@HOST:PORT")
    return match["aet"], match["host"].strip("[]"), int(match["port"])


Destination = Annotated[str, AfterValidator(_check_destination)]


class WebServer(_Table):
    """A server with DICOMweb.

    Attributes:
        address: address below which /studies is.
        user: name for HTTP's basic authentication.
        password_file: file with the password of that name.
        token_file: file with a bearer token, instead of both.
        ca_file: certificates (PEM) that sign that of the server, if the system's do not.
    """

    address: Annotated[str, AfterValidator(_check_address)]
    user: str | None = None
    password_file: Path | None = None
    token_file: Path | None = None
    ca_file: Path | None = None


class NodeTable(_Table):
    """The DICOM node.

    Attributes:
        aet: its AE title, by which it must be called.
        host: address to listen on.
        port: TCP port.
        forward: destination of the answers, "AET@HOST:PORT".
        callers: AE titles that may call; empty: all.
        quiet_s: seconds without another instance after which a series whose sender has hung up is complete.
        tls_cert: certificate chain (PEM); with `tls_key` the node speaks TLS only.
        tls_key: private key of the certificate (PEM), without a passphrase.
        tls_ca: certificates (PEM) that sign those of callers, who must have one then, and of the destination.
        forward_tls: whether answers are sent over TLS; needs `tls_ca`.
    """

    aet: AETitle = "UNETPP"
    host: str = "127.0.0.1"
    port: int = Field(11112, ge=1, le=65535)
    forward: Destination
    callers: tuple[AETitle, ...] = ()
    quiet_s: float = Field(5.0, gt=0, le=3600)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    forward_tls: bool = False


class Rule(_Table):
    """Which series are segmented with which model. A pattern has * and ?, and ignores case; None fits all.

    Attributes:
        modality: pattern of Modality.
        body_part: pattern of BodyPartExamined.
        description: pattern of SeriesDescription.
        called: pattern of the AE title that was called.
        caller: pattern of the AE title that calls.
        model: bundle; the default one if not given.
        mode: mode of the request.
        level: level of the request.
        format: format of the answer.
        forward: destination of the answer, instead of the node's.
    """

    modality: str | None = None
    body_part: str | None = None
    description: str | None = None
    called: str | None = None
    caller: str | None = None
    model: str | None = None
    mode: str | None = None
    level: int | None = None
    format: str = "dicomseg"
    forward: Destination | None = None

    def fits(self, facts: dict[str, str]) -> bool:
        """Whether all its patterns fit what is known of a series, by their names."""
        patterns = ((name, getattr(self, name)) for name in FACTS)
        return all(
            pattern is None or fnmatchcase(facts.get(name, "").upper(), pattern.upper())
            for name, pattern in patterns
        )

    @property
    def params(self) -> SegmentParams:
        """The request parameters.

        Raises:
            InvalidParameter: they are not valid.
        """
        return SegmentParams.parse(
            {"model": self.model, "mode": self.mode, "level": self.level, "format": self.format}
        )


FACTS = ("modality", "body_part", "description", "called", "caller")


class DicomConfig(_Table):
    """The file.

    Attributes:
        servers: servers with DICOMweb, by the name that callers use.
        node: the DICOM node, if there is one.
        rules: rules in their order, of which the first that fits counts; none: the default model for all.
    """

    servers: dict[Name, WebServer] = {}
    node: NodeTable | None = None
    rules: tuple[Rule, ...] = ()

    def choose(self, facts: dict[str, str]) -> Rule | None:
        """The first rule that fits a series; None if none does."""
        return next((rule for rule in self.rules or (Rule(),) if rule.fits(facts)), None)


def read_config(path: Path) -> DicomConfig:
    """Reads the file, and sees that the files it names can be read. Relative paths start at its folder.

    Raises:
        Misconfigured: names the field and the reason.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Misconfigured(
            f"{SETTING}={path} cannot be read: {error}", setting=SETTING, value=str(path)
        ) from error
    config = parse_config(values, str(path))
    tables: dict[str, _Table] = {f"servers.{name}": server for name, server in config.servers.items()}
    if config.node:
        tables["node"] = config.node
    found = {name: _with_files(name, table, path) for name, table in tables.items()}
    servers = {name: found[f"servers.{name}"] for name in config.servers}
    return config.model_copy(update={"servers": servers, "node": found.get("node")})


def parse_config(values: dict[str, Any], where: str) -> DicomConfig:
    """Validates the values of a file.

    Raises:
        Misconfigured: names the field and the reason.
    """
    try:
        config = DicomConfig.model_validate(values)
    except ValidationError as error:
        text = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise Misconfigured(f"{where}: {text}", setting=SETTING) from error
    for name, server in config.servers.items():
        if (server.user is None) != (server.password_file is None) or (server.user and server.token_file):
            raise Misconfigured(
                f"{where}: servers.{name} needs user and password_file, or token_file, or none of them",
                setting=SETTING,
                parameter=f"servers.{name}",
            )
    if (node := config.node) and (
        (node.tls_cert is None) != (node.tls_key is None) or (node.forward_tls and not node.tls_ca)
    ):
        raise Misconfigured(
            f"{where}: node needs tls_cert with tls_key, and tls_ca with forward_tls",
            setting=SETTING,
            parameter="node",
        )
    return config


def _with_files(name: str, table: _Table, config: Path) -> _Table:
    """The table with absolute paths.

    Raises:
        Misconfigured: a file cannot be read.
    """
    update = {}
    for field, value in table:
        if isinstance(value, Path):
            update[field] = config.parent / value
            try:
                update[field].open("rb").close()
            except OSError as error:
                raise Misconfigured(
                    f"{config}: {name}.{field} cannot be read: {error}",
                    setting=SETTING,
                    parameter=f"{name}.{field}",
                    value=str(value),
                ) from error
    return table.model_copy(update=update)
