"""The two kinds of things that go wrong, and who is told.

`CxrayError` is for a person: the front door prints its one or two lines and exits non-zero, without a traceback.
`RowError` is for a row: a job writes the row as a reject with this reason and goes on.
Everything else is a fault of the program, and propagates.
"""


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
