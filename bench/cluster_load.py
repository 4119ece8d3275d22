"""The load of `bench.cluster`: clients that send images, volumes and jobs without pause, and the ledger of what became of them."""

import asyncio
import contextlib
import hashlib
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

import httpx

from bench.inputs import bodies
from bench.serving import ROOT, serving
from bench.soak_clients import volume
from client import AsyncClient
from client.request import file_parts

# Attempts of a request: a client of a cluster waits as long as a node takes to come back.
RETRIES = 60


@dataclass(frozen=True)
class Request:
    """One request of the mix: its query and body; `job` sends it to /jobs."""

    query: str
    body: bytes
    job: bool = False

    @property
    def params(self) -> dict[str, str]:
        """The query by name."""
        return dict(part.split("=") for part in self.query.split("&"))


@dataclass
class Ledger:
    """Outcome of all requests.

    Attributes:
        answers: moments of the answers, of `time.monotonic`.
        longest_s: the longest time of a request, with all its attempts.
        attempts: requests on the wire that were not answered by 2xx, by status or error.
        lost: requests that ended with an error.
        wrong: answers that differ from those of a single server.
        jobs: identifiers of the jobs that ended well.
    """

    answers: list[float] = field(default_factory=list)
    longest_s: float = 0
    attempts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)

    def longest_silence_s(self, begun: float) -> float:
        """The longest time without an answer, from a moment on."""
        times = [begun, *self.answers, time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(times))


class CountingTransport(httpx.AsyncHTTPTransport):
    """Counts what did not succeed, in the ledger of the moment."""

    def __init__(self, ledger: Callable[[], Ledger]) -> None:
        super().__init__()
        self._ledger = ledger

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends one request."""
        try:
            response = await super().handle_async_request(request)
        except httpx.TransportError as error:
            self._ledger().attempts[type(error).__name__] += 1
            raise
        if not response.is_success:
            self._ledger().attempts[str(response.status_code)] += 1
        return response


def mix(count: int = 6) -> tuple[list[Request], list[Request], list[Request]]:
    """The requests of the clients for images, for volumes and for jobs."""
    pictures = bodies(160, count)
    volumes = [volume(random.Random(seed)).body for seed in range(3)]  # noqa: S311 - inputs, not secrets
    images = [
        Request(query, body)
        for body in pictures
        for query in ("level=1", "level=3", "mode=accurate&format=mask,json", "mode=auto&instances=true")
    ]
    solid = [Request(f"model=hippocampus&level={level}", body) for body in volumes for level in (1, 2)]
    jobs = [Request("tta=flips&format=mask,csv", body, job=True) for body in bodies(512, 3)]
    jobs += [Request("model=hippocampus&level=2", body, job=True) for body in volumes[:1]]
    return images, solid, jobs


async def send(client: AsyncClient, request: Request, ledger: Callable[[], Ledger]) -> bytes:
    """Sends a request, or a job and waits for it; returns the body of the answer."""
    parts = file_parts(request.body, None, None, "upload")
    if not request.job:
        response = await client.request("POST", "segment", params=request.params, parts=parts)
        return response.content
    id_ = (await client.request("POST", "jobs", params=request.params, parts=parts)).json()["id"]
    await client.job(id_).wait()
    response = await client.request("GET", f"jobs/{id_}/result")
    ledger().jobs.append(id_)
    return response.content


async def reference(requests: list[Request], settings: Mapping[str, str]) -> dict[Request, str]:
    """Digests of the answers of a single server with these settings."""
    with tempfile.TemporaryDirectory() as folder:
        own = {**settings, "UNETPP_JOBS__FOLDER": f"{folder}/jobs"}
        with serving(ROOT / "bundles", own) as server:
            async with AsyncClient(str(server.client.base_url)) as client:
                return {
                    request: hashlib.sha256(await send(client, request, Ledger)).hexdigest()
                    for request in requests
                }


class Load:
    """Clients that send without pause, and the ledger of the present phase.

    Args:
        url: address of the cluster.
        expected: digest of each answer.
    """

    def __init__(self, url: str, expected: dict[Request, str]) -> None:
        self.ledger = Ledger()
        self._url, self._expected = url, expected
        self._enough = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(
        self, requests: tuple[list[Request], ...], clients: tuple[int, ...]
    ) -> AsyncIterator[None]:
        """Runs the clients while the block runs; requests under way end with it."""
        async with asyncio.TaskGroup() as group:
            for kind, count in zip(requests, clients, strict=True):
                for seed in range(count):
                    group.create_task(self._client(kind, seed))
            try:
                yield
            finally:
                self._enough.set()

    async def _client(self, requests: list[Request], seed: int) -> None:
        draw = random.Random(seed)  # noqa: S311 - an order
        transport = CountingTransport(lambda: self.ledger)
        async with AsyncClient(self._url, retries=RETRIES, timeout_s=300, transport=transport) as client:
            while not self._enough.is_set():
                await self._send(client, draw.choice(requests))

    async def _send(self, client: AsyncClient, request: Request) -> None:
        begun = time.monotonic()
        name = f"{'jobs' if request.job else 'segment'}?{request.query}"
        try:
            body = await send(client, request, lambda: self.ledger)
        except Exception as error:
            self.ledger.lost.append(f"{name}: {type(error).__name__}: {error}")
            return
        self.ledger.answers.append(time.monotonic())
        self.ledger.longest_s = max(self.ledger.longest_s, time.monotonic() - begun)
        if hashlib.sha256(body).hexdigest() != self._expected[request]:
            self.ledger.wrong.append(name)
