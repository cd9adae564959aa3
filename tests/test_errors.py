"""What a person is told of a failure, however it was wrapped on its way."""

from contracts.errors import CxrayError, causes, sentence


class OfRay(CxrayError):
    """As Ray raises it: of its cause's class, and saying a traceback."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("Traceback (most recent call last): ...")
        self.cause = cause


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


def test_the_sentence_is_found_in_every_wrapping():
    said = CxrayError("the bucket is closed; open it\nFailed to run task, try again")
    failed = RuntimeError("workers failed")
    failed.worker_failures = {0: chained(RuntimeError("died"), OfRay(said))}  # pyright: ignore[reportAttributeAccessIssue]
    for error in (said, OfRay(said), chained(ValueError("x"), said), failed):
        assert sentence(error) == "the bucket is closed; open it"


def test_a_fault_of_the_program_has_no_sentence_and_a_circle_ends():
    one, other = ValueError("a"), ValueError("b")
    one.__cause__, other.__cause__ = other, one
    assert sentence(one) is None
    assert list(causes(one)) == [one, other]
