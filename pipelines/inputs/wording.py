"""How what was charted becomes words: numbers, times, medicines, diagnoses, complaints. Each is a pure function of one entry."""

import re

from pipelines.inputs.abbreviations import expand

# A dispensing cabinet writes 32 characters and cuts the name to make room for the dose (seen in MIMIC-IV-ED's pyxis table).
CABINET_WIDTH = 32
CUT_NAMES = {
    "acetamin": "acetaminophen", "aluminum-magnesium hy": "aluminum-magnesium hydroxide", "calcium gluco": "calcium gluconate",
    "ciprofloxa": "ciprofloxacin", "hepari": "heparin", "levetirace": "levetiracetam", "levofloxac": "levofloxacin",
    "magnesium sulf": "magnesium sulfate", "metronidaz": "metronidazole", "morphine sulfat": "morphine sulfate",
    "nitroglyce": "nitroglycerin", "norepinephri": "norepinephrine", "piperacilli": "piperacillin", "vancomyci": "vancomycin",
}  # fmt: skip
_BRAND = re.compile(r"\s*\[.*$")
_DOSE = re.compile(r"\s*\(?(?<![\w-])\d[\d.,]*\s?(?:mg|mcg|gm?|ml|meq|units?|tab|cap|neb|ptch)\b.*$", re.IGNORECASE)
_FORM = re.compile(
    r"\s*\((?:mini bag plus|immediate release|delayed release|extended release|sustained release|for dilution|in ns|rectal|chewable|elixir|"
    r"po|iv)\)",
    re.IGNORECASE,
)
_OPEN = re.compile(r"\s*\([^)]*$")
_ROUTE = re.compile(r"(?:\s+(?:IV|PO|IM|SL|ODT|Neb|Soln|Inhaler|Patch|TAB|CAP))+$")
_WORD = re.compile(r"[A-Za-z]{5,}")
_SUPPLY = re.compile(r"needle|lancet|syringe|meter\b|strips?\b|diagnostic|swab", re.IGNORECASE)

# Qualifiers that serve billing: they say what the coder did not know, not what the patient has.
_QUALIFIER = re.compile(
    r",?\s*(?:\b(?:organism |site |cause )?unspecified(?: (?:organism|site|type|cause))?|not otherwise specified|not elsewhere classified"
    r"|site not specified|(?:initial|subsequent) encounter[^,]*|not stated as uncontrolled)\s*(?=,|$)",
    re.IGNORECASE,
)
_TWICE = re.compile(r"\b(\w.*) \(\1\)")  # an abbreviation in brackets behind what it stands for, both written out
_UNSPECIFIED = re.compile(r"^unspecified\s+", re.IGNORECASE)
# Where, doing what and as whom something happened, not what: ICD-10 Y92, Y93, Y99; ICD-9 E849 and E000 to E030.
_CIRCUMSTANCE = {10: re.compile(r"Y9[239]"), 9: re.compile(r"E(?:849|00\d|01\d|02\d|030)")}

_SEPARATOR = re.compile(r"[,;]|(?<=[A-Za-z])\s*/\s*(?=[A-Za-z])")
_DEIDENTIFIED = re.compile(r"_{2,}\s*(?:-?\s*(?:year[- ]old|years[- ]old|y/?o))?\s*", re.IGNORECASE)
_SCRAPS = {
    "after",
    "with",
    "without",
    "possible",
    "rule out",
    "history of",
    "complaining of",
    "left",
    "right",
    "bilateral",
    "new",
    "and",
    "of",
}
_SEX = {"F": "woman", "M": "man"}
_LEADING_SEX = re.compile(r"^([FM])(?![\w/.])")


def number(value: float) -> str:
    """98.6 -> '98.6', 112.0 -> '112', 0.013 -> '0.013': at most four figures after which nothing is lost."""
    if value == int(value):
        return str(int(value))
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"


def span(hours: float) -> str:
    """A time before the study -> 'half an hour', '2 hours', '5 days', '3 months', '2 years'; '' for the time of the study itself."""
    minutes = round(-hours * 60)
    if minutes < 3:
        return ""
    if minutes < 90:
        minutes = minutes if minutes < 10 else 5 * round(minutes / 5)
        return {30: "half an hour", 60: "an hour"}.get(minutes, f"{minutes} minutes")
    if minutes < 36 * 60:
        return f"{round(minutes / 60)} hours"
    days = minutes / 1440
    if days < 60:
        return f"{round(days)} days"
    months = days / 30.44
    return f"{round(months)} months" if months < 24 else f"{round(days / 365.25)} years"


def when(hours: float | None) -> str:
    """'half an hour before the study', 'at the time of the study', 'at an unknown time'."""
    if hours is None:
        return "at an unknown time"
    gap = span(hours)
    return f"{gap} before the study" if gap else "at the time of the study"


def medicine(name: str) -> str:
    """'HYDROmorphone (Dilaudid) 2mg TAB' -> 'hydromorphone (Dilaudid)'; 'albuterol sulfate [ProAir HFA]' -> 'albuterol sulfate'.

    A brand in square brackets goes, one in round brackets stays; so do words that are not known, as they are. Letters written tall
    against mix-ups ('predniSONE') become low. What is nothing but a brand or a dose is kept whole.
    """
    whole = " ".join(name.split())
    short = _OPEN.sub("", _FORM.sub("", _DOSE.sub("", _BRAND.sub("", whole)))).strip(" ,-*")
    short = _ROUTE.sub("", short) or whole
    if len(name) >= CABINET_WIDTH - 1:
        short = CUT_NAMES.get(short.lower(), short)
    return _WORD.sub(lambda m: m[0].lower() if _is_tall(m[0]) else m[0], short)


def _is_tall(word: str) -> bool:
    return not word.isupper() and re.search("[A-Z]{2}", word) is not None


def is_supply(name: str) -> bool:
    """Needles, lancets, meters and the like, which stand among a patient's medicines."""
    return _SUPPLY.search(name) is not None


def diagnosis(title: str) -> str:
    """'HYPERTENSION NOS' -> 'hypertension'; 'Pneumonia, unspecified organism' -> 'Pneumonia'."""
    written = _TWICE.sub(r"\1", " ".join(expand(title.replace(",", ", ")).split()))
    return _UNSPECIFIED.sub("", _QUALIFIER.sub("", written)).strip(" ,") or written


def is_circumstance(code: str, version: int) -> bool:
    """The code of a place, an activity or a status of someone hurt, which says nothing of health."""
    return _CIRCUMSTANCE[version].match(code) is not None


def complaint(text: str) -> tuple[bool, str]:
    """A chief complaint, abbreviations written out -> (sent from another hospital, 'with cough and fever, after fall').

    '' where nothing is left to say.
    """
    transfer, have, after = False, [], []
    for item in _SEPARATOR.split(text):
        item = " ".join(item.split()).strip(" .-")
        first, space, rest = item.partition(" ")
        if first.istitle():
            item = first.lower() + space + rest
        if item.startswith("?"):
            item = f"possible {item.lstrip('? ').lower()}".strip()
        if item == "transfer":
            transfer = True
        elif item.startswith("after "):
            after.append(item.removeprefix("after ").lower())
        elif any(c.isalnum() for c in item) and item not in _SCRAPS:
            have.append(item)
    said = [f"{word} {_listed(items)}" for word, items in (("with", have), ("after", after)) if items]
    return transfer, ", ".join(said)


def _listed(items: list[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c', each once."""
    *most, last = dict.fromkeys(items)
    return f"{', '.join(most)} and {last}" if most else last


def indication(text: str) -> str:
    """'___F with SOB // eval for cause' -> 'woman with shortness of breath; evaluation for cause'."""
    text = _DEIDENTIFIED.sub(" ", text).replace("//", ";")
    text = _LEADING_SEX.sub(lambda m: _SEX[m[1]], " ".join(text.split()))
    return re.sub(r"\s+([;,.])", r"\1", expand(text)).strip(" ;,")
