"""Abbreviations of emergency and chest medicine, written out: 'CP, SOB' -> 'chest pain, shortness of breath'.

The table is abbreviations.csv: abbreviation, expansion, and the public source it was checked against ('common usage' where no
one list was). How an abbreviation is spelt there says how it must be spelt in a text: with a capital in it, exactly so ('SI' is
suicidal ideation, 'si' is not); in lower case, in any case ('abd', 'Abd', 'ABD'). Words of capitals that are English words
(OR, IT, AM, ALL, AS, HAS, US) are not in the table at all. One whose expansion is itself is ambiguous and stays as it is: its
source says between what. An empty expansion is a placeholder of the department ('UNKNOWN-CC'), which says nothing.
"""

import csv
import re
from pathlib import Path

TABLE = Path(__file__).with_name("abbreviations.csv")

with TABLE.open(encoding="utf-8", newline="") as _file:
    ABBREVIATIONS: dict[str, str] = {row["abbreviation"]: row["expansion"] for row in csv.DictReader(_file)}

_LONGEST_FIRST = sorted(ABBREVIATIONS, key=lambda a: (-len(a), a))
# 'w/' may touch the word after it; every other abbreviation ends where no letter or digit follows.
_PATTERN = re.compile(
    r"(?<![A-Za-z0-9])(?:" + "|".join(re.escape(a) + ("" if a.endswith("/") else r"(?![A-Za-z0-9])") for a in _LONGEST_FIRST) + ")",
    re.IGNORECASE,
)

# One letter is a side only before a part of the body: 'B Leg swelling', 'L Arm', but 'hepatitis B', 'vitamin B 12', '4 L of oxygen'.
SIDES = {"L": "left", "R": "right", "B": "bilateral"}
_BODY = (
    "abd|abdomen|abdominal|ankle|arm|armpit|axilla|back|breast|buttock|calf|cheek|chest|ear|elbow|extremity|eye|face|facial|finger|flank|foot|"
    "forearm|groin|hand|head|heel|hip|jaw|knee|leg|lower|neck|pelvis|rib|shin|shoulder|side|sided|thigh|thumb|toe|upper|weakness|wrist"
)
_SIDE = re.compile(rf"(?<![A-Za-z0-9])([LRB]) ((?:{_BODY})s?)(?![A-Za-z])", re.IGNORECASE)


def expand(text: str) -> str:
    """`text` with its abbreviations written out; a part between commas that is all in capitals becomes lower case.

    'SOB/ABNL LABS' -> 'shortness of breath/abnormal labs'. Words that are not in the table are kept; a lone short word in capitals too,
    which is rather an abbreviation that is not known here ('SW') than a word.
    """
    return ",".join(map(_expand, text.split(",")))


def _expand(part: str) -> str:
    shouting = part.isupper() and len(part.strip()) > 4
    part = _SIDE.sub(lambda m: f"{SIDES[m[1]]} {m[2].lower()}" if m[1] in SIDES else m[0], part)
    done, end = [], 0
    for match in _PATTERN.finditer(part):
        written = ABBREVIATIONS.get(match[0])
        if written is None:
            written = ABBREVIATIONS.get(match[0].lower())
        if written is None:
            continue
        space = " " if match[0].endswith("/") and part[match.end() : match.end() + 1].isalnum() else ""
        done += [part[end : match.start()].lower() if shouting else part[end : match.start()], written, space]
        end = match.end()
    done.append(part[end:].lower() if shouting else part[end:])
    return "".join(done)
