"""The two kinds of things that go wrong, and who is told.

`CxrayError` is for a person: the front door prints its one or two lines and exits non-zero, without a traceback.
`RowError` is for a row: a job writes the row as a reject with this reason and goes on.
Everything else is a fault of the program, and propagates.
"""

from collections.abc import Iterator


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and all that it came of, the nearest first, however Ray wrapped it on the way from a worker.

    What Ray raises for a task is of its cause's class too, but says a traceback: there only the cause counts.
    """
    todo, seen = [error], set[int]()
    while todo:
        error = todo.pop(0)
        if not isinstance(error, BaseException) or id(error) in seen:
            continue
        seen.add(id(error))
        if not isinstance(getattr(error, "cause", None), BaseException):
            yield error
        todo += [getattr(error, name, None) for name in _INNER] + list(getattr(error, "worker_failures", {}).values())


_INNER = ("cause", "_base_exc", "controller_failure", "health_check_failure", "__cause__")  # where Ray and Python keep them


def sentence(error: BaseException) -> str | None:
    """What a person is to be told of a failure, where one of its causes is a CxrayError."""
    said = next((str(cause) for cause in causes(error) if isinstance(cause, CxrayError)), None)
    return said.partition("\nFailed to ")[0] if said else None  # what follows is Ray's, on how to try again


class CxrayError(Exception):
    """Something the user can put right. The message says what was wrong, where, and what to do, in one or two lines."""


class RowError(Exception):
    """Something wrong with one row of input.

    reason: a short fixed word for counting ('empty_file', 'no_pixels'); never an identifier or a text of the row.
    lasting: False if the cause may pass (a bucket that was busy), so that the next run tries the row again.
    """

    def __init__(self, reason: str, detail: str = "", *, lasting: bool = True) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.lasting = lasting

    def __reduce__(self):  # an exception with keyword arguments does not survive pickling by itself
        return _row_error, (self.reason, self.detail, self.lasting)


def _row_error(reason: str, detail: str, lasting: bool) -> RowError:
    return RowError(reason, detail, lasting=lasting)
