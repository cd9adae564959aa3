"""Words that tests put into requests, and that nothing of the service may repeat: a name, words of a note, ids, a file's name.

Made of letters that stand nowhere else, so that one find is one leak.
"""

PATIENT = "Zebulonia Quistorp-Vraxley"
NOTE = "quibblefrost in the left glenwarble"
STUDY = "s58813467902"
FILE = "quistorp_vraxley_58813467902.dcm"
MEDICINE = "Zorvaquintol"
WRONG_KEY = "vraxley-guessed-this-key-0123456789abcdefghij"

# Of each what gives it away, in small letters: names and ids also in part.
WORDS = ("zebulonia", "quistorp", "vraxley", "quibblefrost", "glenwarble", "58813467902", "zorvaquintol")


def leaked(text: bytes, more: tuple[str, ...] = ()) -> list[str]:
    """Which of the planted words, or of `more` (keys), stand in it."""
    small = text.lower()
    return [word for word in (*WORDS, *more) if word.lower().encode() in small]
