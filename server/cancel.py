"""Cancellation of work that runs in a thread."""


class Cancelled(Exception):
    """Ends work whose result is not needed any more."""


class CancelToken:
    """A flag that work in a thread checks between pieces of about a second."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Asks the work to end."""
        self._set = True

    def check(self) -> None:
        """Ends the work if the token was set.

        Raises:
            Cancelled: `set` was called.
        """
        if self._set:
            raise Cancelled


# Token of work that always runs to its end.
NO_CANCEL = CancelToken()
