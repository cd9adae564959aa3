"""What is left of a text once words are taken out of it, so that it reads as if they had never stood there."""

import re

from pipelines.inputs.terms import Words


def without(words: Words, gone: bytearray) -> str:
    """The text with NUL for each run of removed words; the brackets within a run stay, to be closed or emptied."""
    parts, end = [], 0
    for i, removed in enumerate(gone):
        gap = words.text[end : words.starts[i]]
        run = removed and i and gone[i - 1]
        parts.append("".join(c for c in gap if c in "()[]") if run else gap)
        parts.append("\0" if removed else words.text[words.starts[i] : words.ends[i]])
        end = words.ends[i]
    return "".join(parts) + words.text[end:]


_DENIED_LIST = re.compile(r"\b(no|denies|denied|denying|without)\s*\0[\s\0]*,\s*(?=\w)", re.IGNORECASE)
_EMPTY = re.compile(r"[(\[{][\s,;?]*\0[\s,;?\0]*[)\]}]")
_CLAUSE = re.compile(r"([,;:()\[\]\n]|(?<=[\w\0]{2})/(?=[\w\0]{2})|/(?=\0)|(?<=\0)/|\.(?!\d)| - )")
_CONNECTOR = re.compile(
    r"(^|[.;:,(\n])(\s*\0[\s\0]*)(?:(?:and|or|nor|but|with|vs|versus|also|plus|for|of)\b|w/|&|\+)(?=\s)\s*", re.IGNORECASE
)
_BESIDE = re.compile(r"[ \t_&+?'\"*#-]*\0[\s\0_?'\"*-]*")
_MARKS = re.compile(r"([,;:.([/]?)\s*\0(?:\(e?s\))?\s*([,;.:)\]/]?)")


def tidied(left: str, filler: frozenset[str], between: str) -> str:
    """`left` without its NULs, and without what would dangle where they stood."""
    left = _DENIED_LIST.sub(r"\1 ", left)
    for _ in range(2):
        left = _EMPTY.sub("\0", left)
    parts = _CLAUSE.split(left)
    parts[::2] = [
        "\0" if "\0" in p and all(w in filler or w.isdigit() for w in re.findall(r"\w[\w/']*", p.lower())) else p for p in parts[::2]
    ]
    left = _EMPTY.sub("\0", "".join(parts))
    left = _CONNECTOR.sub(r"\1\2", left)
    left = re.sub(r"\0\.(?=\s*[.,;:])", "\0", _BESIDE.sub("\0", left))  # an abbreviation's own dot
    left = _MARKS.sub(lambda m: _mark(m, between), left)
    return re.sub(r"^[.,;:/\s]+(?!\d)|\s+$", "", re.sub(r"[ \t]+", " ", left)).strip().rstrip(" ,;:/-")


def _mark(match: re.Match[str], between: str) -> str:
    """The one mark that stays of the two beside a gap: the stronger."""
    before, after = match[1], match[2]
    if before in ("(", "["):
        return before
    if after in (")", "]"):
        return after
    if before == after == "/":
        return "/"
    if not before and not after:
        return between
    return next(m for m in ".;,:/" if m in (before, after)).replace(":", ",").replace("/", ",") + " "
