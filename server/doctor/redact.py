"""Takes out of the report what a bug report does not need: paths, hosts and users of the machine."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.settings import PREFIX, SETTINGS, Settings

# Settings that may have hosts and passwords in them.
PRIVATE = {f"{PREFIX}JOBS__STORE", f"{PREFIX}JOBS__FILES"}
LOCAL_HOSTS = frozenset({"127.0.0.1", "::1", "localhost", "0.0.0.0", "::", ""})  # noqa: S104 - compared, not bound
HIDDEN = "(set)"

# ONNX Runtime puts the name of the machine into the texts of CUDA errors.
HOST_NAME = re.compile(r"hostname=\S+")
# Absolute paths of at least two parts, of which the last is kept.
PATH = re.compile(r"(?<![\w.>/~:-])/(?:[^\s/:;,'\"()\[\]<>]+/)+([^\s/:;,'\"()\[\]<>]*)")


def value_of(settings: Settings, name: str) -> Any:
    """Returns the value of a setting by its environment variable."""
    value: Any = settings
    for part in name.removeprefix(PREFIX).lower().split("__"):
        value = getattr(value, part)
    return value


def changed_settings(settings: Settings) -> dict[str, Any]:
    """Returns the settings that differ from their defaults; of paths and hosts only that they are set."""
    rows = ((name, field.default, value_of(settings, name)) for name, field in SETTINGS.items())
    return {name: _shown(name, value) for name, default, value in rows if value != default}


def redactor(settings: Settings | None) -> Callable[[str], str]:
    """Returns a function that writes settings in the place of their paths and hosts, and shortens all other paths."""
    known = _known_texts(settings) if settings else {}
    # The longest first, because one folder may lie in another.
    named = "|".join(re.escape(text) for text in sorted(known, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w.-])(?:{named})(?![\w-])") if named else None

    def redact(text: str) -> str:
        if pattern:
            text = pattern.sub(lambda match: known[match[0]], text)
        return PATH.sub(r".../\1", HOST_NAME.sub("hostname=...", text))

    return redact


def _known_texts(settings: Settings) -> dict[str, str]:
    known: dict[str, str] = {}
    for name in SETTINGS:
        value = value_of(settings, name)
        if isinstance(value, Path):
            # A name without a folder says nothing of the machine, and may be a word of a sentence.
            texts = {text for text in (str(value), str(value.resolve())) if os.sep in text.strip(os.sep)}
            known |= dict.fromkeys(texts, f"<{name}>")
        elif name in PRIVATE and isinstance(value, str) and "/" in value:
            known[value] = f"<{name}>"
        elif name.endswith("HOST") and value not in LOCAL_HOSTS:
            known[str(value)] = f"<{name}>"
    return known


def _shown(name: str, value: Any) -> Any:
    is_remote = name.endswith("HOST") and value not in LOCAL_HOSTS
    return HIDDEN if isinstance(value, Path) or is_remote or name in PRIVATE else value
