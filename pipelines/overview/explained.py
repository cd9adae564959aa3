"""What `cxray explain` found, for a page: each study's X-ray with where the network looked, its findings, and what it read."""

import json
from collections.abc import Mapping
from typing import Any

from contracts.errors import CxrayError
from contracts.pages import Page
from contracts.storage import Place

HOW_TO_READ = (
    "Colour on the X-ray is the attention that the text paid to each part of it: none up to an even share, then violet, green and yellow "
    "for ever more; the strongest part is framed. Where hardly anything is coloured, it looked at no part more than at the others. A "
    "share is the part of the image's attention that a sentence or a passage got; those of a study add up to 1. Attention says where a "
    "network looked, and not why it said what it said (Jain & Wallace 2019, arXiv:1902.10186)."
)
ANSWER = {1: "yes", 0: "no", None: "not known"}


def show(p: Page, where: Place) -> None:
    """Raises CxrayError where there is no output of `cxray explain`."""
    file = where / "explained.json"
    if not file.exists():
        raise CxrayError(f"{where}: no finished `cxray explain` here (no explained.json); run it, or name its folder")
    found = json.loads(file.read())
    how_many = f"{len(found['studies'])} of the studies of {found['split']}. {found['chosen']}"
    labels = f"Labels are those of the reports, as the network was taught them ({found['policy']})."
    sure = "" if found["calibrated"] else " The model is not calibrated: thresholds are 0.5, and `cxray evaluate` has yet to fit them."
    p.text("What the network looked at", f"{how_many} {labels}{sure}")
    p.text("", HOW_TO_READ)
    for number, study in enumerate(found["studies"], 1):
        _study(p, number, study, (where / study["picture"]).read())


def _study(p: Page, number: int, study: Mapping[str, Any], picture: bytes) -> None:
    lead = next(one for one in study["findings"] if one["name"] == study["lead"])
    p.text(f"Study {number}: {lead['name']}, {_verdict(lead)}", _in_words(lead, study["read"]))
    p.picture(picture, _caption(study["patches"]))
    p.table(
        "",
        ("finding", "probability", "threshold", "called", "label", ""),
        [(f["name"], f["probability"], f["threshold"], ANSWER[f["called"]], ANSWER[f["label"]], _verdict(f)) for f in study["findings"]],
    )
    rows = [(s["share"], _what(s), s["text"], _fetched(s)) for s in sorted(study["read"], key=lambda s: -s["share"])]
    if rows:
        p.table("", ("share", "what", "text", "fetched by (score)"), rows)


def _verdict(finding: Mapping[str, Any]) -> str:
    """Empty where nothing was called and nothing is there, and where nothing is known."""
    return {(True, 1): "found", (False, 1): "missed", (True, 0): "false alarm"}.get((finding["called"], finding["label"]), "")


def _in_words(lead: Mapping[str, Any], read: list[Mapping[str, Any]]) -> str:
    said = f"Probability {lead['probability']:.3f}, threshold {lead['threshold']:.3f}. "
    passages = [s["share"] for s in read if s["kind"] == "passage"]
    if not read:
        return said + "There was no text for it to read."
    if not passages:
        return said + f"It read {len(read)} segments of the note; the note fetched no passages."
    return said + (
        f"It read {len(read) - len(passages)} segments of the note and {len(passages)} passages; {sum(passages):.2f} of the attention fell "
        f"on passages, and an even share for each of the {len(read)} would be {1 / len(read):.3f}."
    )


def _caption(patches: list[list[float]] | None) -> str:
    if patches is None:
        return "The X-ray as it is stored. Where the network looked is not shown: it is not given the image in parts."
    shares = [share for row in patches for share in row]
    strongest = f"the framed part got {max(shares) * len(shares):.1f} times an even share" if max(shares) else "none was paid to it"
    return f"Left the X-ray as it is stored, right with the attention on {len(patches)} x {len(patches[0])} parts of it; {strongest}."


def _what(segment: Mapping[str, Any]) -> str:
    return f"passage on {segment['topic']} ({segment['id']})" if segment["kind"] == "passage" else f"{segment['kind']}, {segment['name']}"


def _fetched(segment: Mapping[str, Any]) -> str:
    return f"{segment['asked_by']} ({segment['score']:.2f})" if segment["kind"] == "passage" else ""
