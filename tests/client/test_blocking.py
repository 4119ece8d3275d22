"""Ctrl-C in the thread that waits for a coroutine, at the worst moments."""

import asyncio
import contextlib
import threading
from typing import Any

import pytest

from client.blocking import Blocking


class Nothing:
    async def aclose(self) -> None: ...

    async def models(self) -> list[dict[str, Any]]:
        return []

    async def model(self, name: str) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("begun", [True, False], ids=["after it began", "before it began"])
def test_ctrl_c_before_there_is_a_future_cancels_the_coroutine(
    begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    schedule = asyncio.run_coroutine_threadsafe

    def interrupted(coroutine: Any, loop: asyncio.AbstractEventLoop) -> Any:
        schedule(coroutine, loop)
        if begun:
            assert started.wait(30)
        raise KeyboardInterrupt

    with contextlib.closing(Blocking(Nothing())) as blocking:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
            with pytest.raises(KeyboardInterrupt):
                blocking.run(work())
        # What is scheduled after the interruption runs after what was scheduled before.
        assert blocking.models() == []
        assert cancelled.wait(30) if started.is_set() else not started.is_set()
