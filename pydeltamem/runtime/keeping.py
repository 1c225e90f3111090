"""An error that comes up where it cannot be raised, and waits for somebody who can raise it."""

from __future__ import annotations


class Keeping:
    """Something that keeps an error.

    Attributes:
        error: None if there is none.
    """

    error: BaseException | None = None

    def check(self) -> None:
        """Raises the error, once."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # else its traceback would keep it, and the model, until the garbage collector runs
