"""How a thread learns that nobody wants its result any more."""


class Cancelled(Exception):
    """Ends work whose result nobody wants; whoever began the work has left."""


class CancelToken:
    """Asked between pieces of work of a second or so; set by whoever waits for it."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """The work is to end."""
        self._set = True

    def check(self) -> None:
        """Ends the work, if it is to.

        Raises:
            Stopped: it is.
        """
        if self._set:
            raise Cancelled


# Of work that goes on to its end.
NO_CANCEL = CancelToken()
