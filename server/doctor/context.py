"""State that the checks share: the settings, results of earlier checks, and the output of libraries."""

import contextlib
import faulthandler
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.runtime.bundle import Bundle
from server.runtime.deployment import Deployment
from server.settings import Settings


def _nothing() -> str:
    return ""


@dataclass
class Context:
    """State of one examination; a check reads what earlier checks have set.

    Attributes:
        bundles_folder: folder that replaces UNETPP_BUNDLES, from the command line.
        output: function that returns all that libraries have printed so far.
        settings: settings; None until they are read, and where they are not valid.
        facts: facts for the report.
        bundles: bundles whose files are sound.
        deployments: bundles that this machine can serve, by name.
        has_gpu: whether this process sees an NVIDIA GPU.
        driver: version of the GPU's driver; empty where it is not known.
        is_serving: whether a server of ours answers on one of the configured ports.
    """

    bundles_folder: Path | None = None
    output: Callable[[], str] = _nothing
    settings: Settings | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    bundles: list[Bundle] = field(default_factory=list)
    deployments: dict[str, Deployment] = field(default_factory=dict)
    has_gpu: bool = False
    driver: str = ""
    is_serving: bool = False

    @property
    def known_settings(self) -> Settings:
        """The settings, for checks that run only where they are valid."""
        if self.settings is None:
            raise RuntimeError("this check needs valid settings")
        return self.settings


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """Keeps what libraries print, and yields a function that returns it.

    ONNX Runtime prints the reason why CUDA does not work, partly from C++ to file descriptor 2, and then uses
    the CPU; the exception alone does not name the missing library.
    """
    with tempfile.TemporaryFile("w+b") as file, contextlib.ExitStack() as stack:
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            # A service may run without them.
            with contextlib.suppress(OSError):
                kept = os.dup(descriptor)
                stack.callback(os.close, kept)
                if descriptor == 2 and not faulthandler.is_enabled():
                    # A library that ends the process would leave nothing on the screen.
                    faulthandler.enable(kept)
                    stack.callback(faulthandler.disable)
                os.dup2(file.fileno(), descriptor)
                stack.callback(os.dup2, kept, descriptor)
        text = stack.enter_context(open(file.fileno(), "w", buffering=1, closefd=False, errors="replace"))
        stack.enter_context(contextlib.redirect_stdout(text))
        stack.enter_context(contextlib.redirect_stderr(text))

        def read() -> str:
            text.flush()
            size = os.fstat(file.fileno()).st_size
            # The position is shared with the writers, which must go on at the end.
            return os.pread(file.fileno(), size, 0).decode("utf-8", "replace")

        yield read
