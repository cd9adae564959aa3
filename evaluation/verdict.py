"""The answer of an ablation: a treatment against its rivals, on the same studies, in numbers and in words made from them.

`evaluation.compare` says how a difference is told from chance. Here every difference is that of the treatment less a rival, and a control
(the same treatment with its point taken away) is put to the same rivals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from contracts.errors import CxrayError
from contracts.pages import Page
from evaluation.compare import Comparison, Subset, Verdict, compare
from evaluation.intervals import Interval
from evaluation.metrics import judge
from evaluation.plots import dots
from evaluation.predictions import Predictions
from evaluation.studies import COUNTS

ALL = "all findings"
MANY = f"studies of {COUNTS} or more findings"
_TURNED: dict[Verdict, Verdict] = {"helps": "hurts", "hurts": "helps", "no difference shown": "no difference shown"}


def turned(c: Comparison) -> Comparison:
    """The same comparison the other way round: the baseline less the variant."""
    d = c.difference
    return replace(
        c,
        variant=c.baseline,
        baseline=c.variant,
        auroc=c.baseline_auroc,
        baseline_auroc=c.auroc,
        difference=Interval(-d.value, -d.high, -d.low, d.dropped),
        by_seed=tuple(-s for s in c.by_seed),
        verdict=_TURNED[c.verdict],
    )


def judged(
    said: Mapping[str, Sequence[Predictions]],
    treatment: str,
    controls: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    many: np.ndarray,
    resamples: int,
) -> dict[str, Any]:
    """said: {variant: the predictions of each seed}, of the same studies. groups: {name: findings to compare on by themselves}; many: bool
    [n], the studies of so many findings that they are compared by themselves.

    -> 'answer' (words); 'knowledge_gain_low' and 'shuffled_gain_low': the lowest lower bound of the differences of macro AUROC between
    the treatment, or the control that gains most, and its rivals, so that above 0 means better than each of them (of 95 % intervals as they
    are; the words go by p, which Holm's method adjusts, and can be more careful); 'gains': the same by part; 'comparisons': each
    difference with its interval and adjusted p; 'auroc': {variant: {finding or 'macro': mean over seeds}}.
    Raises CxrayError where variants were asked about other studies.
    """
    first = said[treatment][0]
    if any(not np.array_equal(p.studies, first.studies) for runs in said.values() for p in runs):
        raise CxrayError("the variants predicted other studies: delete the ablation's folder, and run it again")
    rivals = [v for v in said if v != treatment and v not in controls]
    found = {v: [p.scores for p in runs] for v, runs in said.items()}
    parts = subsets(first, groups, many)

    def against(one: str, others: Sequence[str]) -> list[Comparison]:
        chosen = {v: found[v] for v in (one, *others)}
        return [turned(c) for c in compare(chosen, one, first.labels, first.groups, first.targets, parts, resamples)]

    ours = against(treatment, [*rivals, *controls])
    theirs = {c: against(c, rivals) for c in controls}
    names = [ALL, *(p.name or ALL for p in parts)]
    gains = {
        part: {
            "knowledge": lowest([c for c in of(ours, part) if c.baseline in rivals]),
            "shuffled": max((lowest(of(own, part)) for own in theirs.values()), default=None),
        }
        for part in names
    }
    words = [in_words([c for c in of(ours, part) if c.baseline in rivals]) for part in names]
    words += [in_words(of(own, part)) for own in theirs.values() for part in names]
    auroc = {v: np.mean([_aurocs(p) for p in runs], axis=0).tolist() for v, runs in said.items()}
    return {
        "answer": " ".join(words),
        "knowledge_gain_low": gains[ALL]["knowledge"],
        "shuffled_gain_low": gains[ALL]["shuffled"],
        "gains": gains,
        "treatment": treatment,
        "comparisons": [asdict(c) | {"sentence": c.sentence} for c in [*ours, *(c for own in theirs.values() for c in own)]],
        "auroc": {v: dict(zip(("macro", *first.targets), each, strict=True)) for v, each in auroc.items()},
        "studies": len(first.studies),
        "patients": len(np.unique(first.groups)),
        "groups": {name: list(own) for name, own in groups.items()},
    }


def subsets(judged: Predictions, groups: Mapping[str, Sequence[str]], many: np.ndarray) -> list[Subset]:
    """Groups of findings, and the studies of many findings; left out is where no finding has both classes."""
    parts = [*(Subset(name, findings=tuple(own)) for name, own in groups.items()), Subset(MANY, rows=many)]
    return [p for p in parts if _both(judged, p)]


def _both(judged: Predictions, part: Subset) -> bool:
    labels = judged.labels if part.rows is None else judged.labels[part.rows]
    own = labels[:, [f in (part.findings if part.findings is not None else judged.targets) for f in judged.targets]]
    return bool(((own == 1).any(axis=0) & (own == 0).any(axis=0)).any())


def of(comparisons: Sequence[Comparison], part: str) -> list[Comparison]:
    return [c for c in comparisons if (c.subset or ALL) == part]


def lowest(comparisons: Sequence[Comparison]) -> float:
    return float(min(c.difference.low for c in comparisons))


def in_words(comparisons: Sequence[Comparison]) -> str:
    """One treatment against its rivals on one part -> a sentence, whose words the verdicts choose alone."""
    by: dict[str, list[str]] = {}
    for c in comparisons:
        by.setdefault(c.verdict, []).append(c.baseline)
    one, where = comparisons[0].variant, f" on {comparisons[0].subset}" if comparisons[0].subset else ""
    better, worse, same = (by.get(v, []) for v in ("helps", "hurts", "no difference shown"))
    told = [f"better than {_list(better)}"] * bool(better) + [f"worse than {_list(worse)}"] * bool(worse)
    told += [f"not shown to differ from {_list(same)} (no difference shown)"] * bool(same)
    head = "helps" if not worse and not same else "does not help" if worse else "is not shown to help"
    least = min(comparisons, key=lambda c: c.difference.low)
    d = least.difference
    lead = f"least it gains over {least.baseline}, {d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})"
    return f"{one} {head}{where}: it is {', and '.join(told)}; {lead}."


def page(found: Mapping[str, Any]) -> Page:
    p = Page("Does knowledge help?", found["answer"])
    p.text(
        "How this was asked",
        f"The same network, budget and rows; {len(found['seeds'])} seeds each; {found['studies']:,} studies of {found['patients']:,} "
        f"patients of the test split; labels by the policy {found['policy']}. Differences are of macro AUROC, paired, with 95 % intervals "
        "over resampled patients and the noise of training; in brackets behind each AUROC its own, which is wider, for nothing is paired. "
        "p is adjusted by Holm's method, on the whole and over all parts; intervals are not. 'image only' has the image, 'chart only' the "
        "chart in numbers; variants with a note have both, and the words besides. A shuffled one reads the passages of another patient.",
    )
    for part in dict.fromkeys(c["subset"] or ALL for c in found["comparisons"]):
        own = [c for c in found["comparisons"] if (c["subset"] or ALL) == part]
        p.table(
            part[0].upper() + part[1:],
            ("variant", "against", "AUROC", "of the other", "difference", "low", "high", "p", "verdict"),
            [_row(c) for c in own],
            f"{own[0]['studies']:,} studies of {own[0]['patients']:,} patients, {own[0]['over']} findings with both classes"
            + (f": {', '.join(found['groups'][part])}." if part in found["groups"] else "."),
        )
    drawn: dict[str, dict[str, Interval]] = {}
    for c in found["comparisons"]:
        if c["variant"] == found["treatment"]:
            drawn.setdefault(f"less {c['baseline']}", {})[c["subset"] or ALL] = Interval(**c["difference"])
    p.picture(dots(drawn, f"macro AUROC of {found['treatment']}, less another's", 0), "Right of the line, knowledge is ahead.")
    if found["evidence"]:
        p.text("What the network looks at", found["evidence"]["words"])
    names = list(found["auroc"])
    rows = [(finding, *(found["auroc"][v][finding] for v in names)) for finding in found["auroc"][names[0]]]
    p.table("AUROC by finding, mean over seeds", ("finding", *names), rows)
    return p


def _row(c: Mapping[str, Any]) -> tuple[Any, ...]:
    d = c["difference"]
    return (
        c["variant"],
        c["baseline"],
        str(Interval(**c["auroc"])),
        str(Interval(**c["baseline_auroc"])),
        *(f"{d[k]:+.3f}" for k in ("value", "low", "high")),
        c["p"],
        c["verdict"],
    )


def _aurocs(p: Predictions) -> list[float]:
    found = judge(p.scores, p.labels, p.targets)
    return [found["macro"]["auroc"]["value"], *(found["findings"][f]["auroc"] for f in p.targets)]


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
