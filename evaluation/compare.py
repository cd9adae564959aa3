"""The verdict of an ablation: does a variant differ from the baseline, on the same studies, by more than chance?

Macro AUROC, averaged over training seeds. Two sources of chance enter the interval. Patients: the difference is taken on the same
resamples of patients for both sides. Training: another run of the same recipe would have come out otherwise, and a gain that one lucky
run made alone is none; to each resample's difference is added what Student's t, with 2 (S - 1) degrees of freedom, says of a difference
of two means of S seeds. To resample the seeds themselves would not do: of three that differ by chance alone, one time in four all point
the same way. With one seed the noise of training is not in the interval at all, and the sentence says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from contracts.errors import CxrayError
from evaluation.intervals import Interval, bootstrap, holm, interval, macro, p_value

ALPHA = 0.05
Verdict = Literal["helps", "hurts", "no difference shown"]


@dataclass(frozen=True)
class Subset:
    """A part of the whole to compare on by itself."""

    name: str | None  # None for the whole
    rows: np.ndarray | None = None  # bool [n]; None for all
    findings: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Comparison:
    """One variant against the baseline. p is adjusted for its family: the variants on the whole, or all pairs of variant and subset."""

    variant: str
    baseline: str
    subset: str | None
    auroc: Interval  # macro, mean over seeds; with what chance does to it by itself
    baseline_auroc: Interval
    difference: Interval
    by_seed: tuple[float, ...]
    p: float
    studies: int
    patients: int
    over: int  # findings that have both classes
    verdict: Verdict

    @property
    def sentence(self) -> str:
        where = f" on {self.subset}" if self.subset else ""
        if not np.isfinite(self.p):
            return f"{self.variant}{where}: {self.verdict}; no finding has both classes in these {self.studies:,} studies."
        d, seeds = self.difference, len(self.by_seed)
        alike = (
            f"{sum(s > 0 for s in self.by_seed)} of {seeds} seeds higher"
            if seeds > 1
            else "one seed, so the noise of training is not in it"
        )
        return (
            f"{self.variant}{where}: {self.verdict}; macro AUROC over {self.over} findings {self.auroc.value:.3f} against "
            f"{self.baseline_auroc.value:.3f} of {self.baseline}, difference {d.value:+.3f} (95 % interval {d.low:+.3f} to {d.high:+.3f}, "
            f"Holm-adjusted p = {self.p:.3g}; {self.studies:,} studies of {self.patients:,} patients; {alike})."
        )


def compare(
    predictions: Mapping[str, Sequence[np.ndarray]],
    baseline: str,
    labels: np.ndarray,
    groups: np.ndarray,
    findings: Sequence[str],
    subsets: Sequence[Subset] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> list[Comparison]:
    """Each variant against the baseline, on the whole and then on each subset.

    predictions: {variant: [scores [n, F] of seed 0, of seed 1, ...]}, all of the same rows; labels [n, F]; groups [n]. Raises
    CxrayError where the baseline is not among them, where seeds or shapes differ, where a subset is empty, and where so many comparisons
    are asked of so few resamples that none could be shown.
    """
    variants = [v for v in predictions if v != baseline]
    if baseline not in predictions or not variants:
        raise CxrayError(f"compare: needs the baseline {baseline!r} and a variant; there are {', '.join(predictions) or 'none'}")
    if len({len(runs) for runs in predictions.values()}) > 1 or not predictions[baseline]:
        raise CxrayError("compare: every variant needs the same seeds: " + ", ".join(f"{v} has {len(r)}" for v, r in predictions.items()))
    smallest = 2 / (resamples + 1) * len(variants) * max(1, len(subsets))
    if smallest > ALPHA:
        raise CxrayError(
            f"compare: {resamples:,} resamples can show nothing in so many comparisons; take {int(resamples * smallest / ALPHA) + 1:,}"
        )
    every = np.ones(len(labels), bool)
    drawn = _draw(every, predictions, labels, groups, resamples, seed)
    whole = _against(Subset(None), drawn, baseline, findings, resamples, seed)
    parts: list[Comparison] = []
    for subset in subsets:
        of_these = drawn if subset.rows is None else _draw(np.asarray(subset.rows, bool), predictions, labels, groups, resamples, seed)
        parts += _against(subset, of_these, baseline, findings, resamples, seed)
    return _judged(whole) + _judged(parts)


@dataclass(frozen=True)
class _Drawn:
    """AUROC of each variant and seed on some rows: of the rows themselves [S, F], and of their resamples [S, F, R]."""

    auroc: dict[str, tuple[np.ndarray, np.ndarray]]
    studies: int
    patients: int


def _draw(
    rows: np.ndarray, predictions: Mapping[str, Sequence[np.ndarray]], labels: np.ndarray, groups: np.ndarray, resamples: int, seed: int
) -> _Drawn:
    if not rows.any():
        raise CxrayError("compare: a subset holds no studies; leave it out")
    labels, groups = np.asarray(labels)[rows], np.asarray(groups)[rows]
    found = {}
    for variant, runs in predictions.items():
        each = [bootstrap(np.asarray(run)[rows], labels, groups, ("auroc",), resamples=resamples, seed=seed)["auroc"] for run in runs]
        found[variant] = np.stack([itself for itself, _ in each]), np.stack([drawn for _, drawn in each])
    return _Drawn(found, len(groups), len(np.unique(groups)))


def _against(subset: Subset, drawn: _Drawn, baseline: str, findings: Sequence[str], resamples: int, seed: int) -> list[Comparison]:
    """Each variant against the baseline on one subset; p not yet adjusted, nothing yet judged."""
    if strangers := set(subset.findings or ()) - set(findings):
        raise CxrayError(f"compare: nothing is known of {', '.join(sorted(strangers))}, which the subset {subset.name} names")
    keep = [i for i, f in enumerate(findings) if subset.findings is None or f in subset.findings]
    old, old_drawn = (a[:, keep] for a in drawn.auroc[baseline])
    over = int((~np.isnan(old[0])).sum())
    seeds = len(old)
    told = 2 * (seeds - 1)
    rng = np.random.default_rng([seed, seeds])
    luck = rng.standard_t(told, resamples) if told else np.zeros(resamples)
    of_one = rng.standard_t(seeds - 1, resamples) if told else np.zeros(resamples)

    def by_itself(values: np.ndarray, drawn: np.ndarray) -> Interval:
        spread = np.sqrt(values.var(ddof=1) / seeds) if told else 0.0
        return interval(float(values.mean()), macro(drawn.mean(axis=0)) + spread * of_one)

    found = []
    for variant in [v for v in drawn.auroc if v != baseline]:
        new, new_drawn = (a[:, keep] for a in drawn.auroc[variant])
        value, baseline_value = macro(new.T), macro(old.T)  # [S]
        spread = np.sqrt((value.var(ddof=1) + baseline_value.var(ddof=1)) / seeds) if told else 0.0
        differences = macro((new_drawn - old_drawn).mean(axis=0)) + spread * luck
        by_seed = value - baseline_value
        found.append(
            Comparison(
                variant=variant,
                baseline=baseline,
                subset=subset.name,
                auroc=by_itself(value, new_drawn),
                baseline_auroc=by_itself(baseline_value, old_drawn),
                difference=interval(float(by_seed.mean()), differences),
                by_seed=tuple(by_seed.tolist()),
                p=p_value(differences) if over else np.nan,
                studies=drawn.studies,
                patients=drawn.patients,
                over=over,
                verdict="no difference shown",
            )
        )
    return found


def _judged(family: list[Comparison]) -> list[Comparison]:
    """The same with p adjusted for the family, and the verdict it gives."""
    judged = []
    for c, p in zip(family, holm([c.p for c in family])):
        shown = p < ALPHA
        judged.append(replace(c, p=p, verdict=("helps" if c.difference.value > 0 else "hurts") if shown else "no difference shown"))
    return judged
