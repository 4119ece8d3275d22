"""When to ask again, and when to give up."""

import email.utils
import random
import re
from dataclasses import dataclass
from datetime import UTC, datetime

# Asked again after these: the server, or a proxy before it, says that it is a matter of time.
STATUSES = (429, 503)


@dataclass(frozen=True)
class Retries:
    """How often and how patiently.

    Attributes:
        most: further tries after the first; 0 for none.
        first_s: the wait before the second try; it doubles with each.
        longest_s: the longest wait of our own choice. What the server asks for is honoured, however long.
        total_s: from the first try to the end of the answer.
    """

    most: int = 6
    first_s: float = 0.5
    longest_s: float = 30.0
    total_s: float = 300.0

    def wait_s(self, tried: int, asked_s: float | None) -> float:
        """Seconds before the next try.

        Args:
            tried: how often it has been tried, 1 or more.
            asked_s: what the answer's Retry-After said, if anything.

        Returns:
            Never less than asked, and scattered, so that clients that were refused together do not come back together.
        """
        if asked_s is not None:
            return asked_s + random.uniform(0, min(1.0, 0.1 * asked_s + 0.1))  # noqa: S311 - no secret
        # Any more doublings are over every limit, and in the end over that of floats.
        own_s = min(self.longest_s, self.first_s * 2.0 ** min(tried - 1, 60))
        return random.uniform(own_s / 2, own_s)  # noqa: S311 - no secret


def read_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for; None without one, or if it is neither seconds nor an HTTP date.

    Args:
        value: the header.
        now: the answer's own Date where it has one: clocks differ.
    """
    if value is None:
        return None
    # Of more digits nobody waits for the end.
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        return float(value)
    until = read_date(value)
    return None if until is None else max(0.0, (until - (now or datetime.now(UTC))).total_seconds())


def read_date(value: str | None) -> datetime | None:
    """An HTTP date; None if it is none."""
    try:
        read = email.utils.parsedate_to_datetime(value or "")
    except ValueError:
        return None
    return read if read.tzinfo else read.replace(tzinfo=UTC)
