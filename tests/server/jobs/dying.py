"""Some jobs' lives in a store, killed at the first line of its code that may change the disk, then at the second, and so on.

python dying.py FOLDER; the store of the n-th death is FOLDER/n, and FOLDER/n.told holds what its caller had been told by then.
"""

import dataclasses
import io
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.jobs import files, store, store_sqlite
from server.jobs.job import JobSpec
from server.jobs.store_sqlite import SQLiteStore
from server.settings import JobsSettings

SPEC = JobSpec({}, True, "fake", "accurate", 4, "fp32", 1, 1.0)
FETCHED = dataclasses.replace(SPEC, source="pacs/1.2", destination="pacs")
SERVED = {"Content-Type": "image/png"}
CODE = {files.__file__, store.__file__, store_sqlite.__file__}

# Their lines change nothing on the disk, so dying there is like dying before or after the call.
HARMLESS = {"_account", "translate_errors", "expires", "get", "path"}


def lives(folder: Path, told: Callable[[str, str], None]) -> None:
    """`told` takes what happened, and to which job."""
    store = SQLiteStore(JobsSettings(folder=folder))
    first = store.accept(SPEC, io.BytesIO(b"input"), io.BytesIO(b"truth")).id
    told("accepted", first)
    second = store.accept(SPEC, io.BytesIO(b"input"), None).id
    told("accepted", second)
    store.start(first)
    store.keep_preview(first, b"preview", SERVED)
    told("preview", first)
    store.finish(first, b"result", SERVED)
    told("done", first)
    store.cancel(second)
    told("cancelled", second)
    third = store.accept(FETCHED, None, None).id
    told("accepted", third)
    store.start(third)
    store.put_back(third)
    store.start(third)
    store.keep_input(third, io.BytesIO(b"input"), FETCHED)
    told("fetched", third)
    store.keep_result(third, b"result", SERVED)
    told("made", third)
    store.complete(third)
    told("done", third)
    told("removing", first)
    store.remove(first)
    told("removed", first)
    store.close()


def die_at(death: int) -> None:
    """Kills this process at a line of the store, counted from now."""
    lines = itertools.count()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in CODE or frame.f_code.co_name in HARMLESS:
            return None
        if event == "line" and next(lines) == death:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


if __name__ == "__main__":
    for death in itertools.count():
        base = Path(sys.argv[1]) / str(death)
        if not (child := os.fork()):
            # The kernel keeps what a killed process has written; syncing is for power cuts, and slow.
            os.fsync = lambda handle: None
            with base.with_suffix(".told").open("w", buffering=1) as out:
                die_at(death)
                lives(base, lambda what, id_: print(what, id_, file=out))
            sys.exit()
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            # It lived to its end; or something raised, which is not a death.
            sys.exit(os.waitstatus_to_exitcode(status))
