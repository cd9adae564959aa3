"""Label states -> target and mask, under a policy that a result can name: the one place where uncertain and blank get a meaning."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from contracts.config import Config
from contracts.findings import FINDINGS, NEGATIVE, POSITIVE, UNCERTAIN, label_column


class Policy(Config):
    """What an uncertain label and a blank one count as. u-zeros, u-ones and u-ignore are named by Irvin et al. 2019 (arXiv:1901.07031).

    u-soft: the middle of `soft`. Pham et al. 2021 (arXiv:1911.06475) draw the target from a range: 0.55 to 0.85 after u-ones
    (the default here), 0 to 0.3 after u-zeros. The losses here are linear in the target, so the middle gives the draw's expected
    gradient, and every run, epoch and rank has the same target.

    blank: a finding that a report does not mention is absent (`zero`), or nothing is known of it (`ignore`). 'No Finding' is
    positive or blank, never zero: under `ignore` a blank one is zero where the study has another finding, positive or
    uncertain, which is why the labeller left it blank. Support devices are no such finding: the labeller does not count them.

    A study without a label row is unknown under every policy.
    """

    uncertain: Literal["u-zeros", "u-ones", "u-ignore", "u-soft"] = "u-ignore"
    blank: Literal["zero", "ignore"] = "zero"
    soft: tuple[float, float] = Field(default=(0.55, 0.85), description="the range of u-soft")

    @model_validator(mode="after")
    def _is_a_range(self) -> "Policy":
        low, high = self.soft
        if not 0 <= low <= high <= 1:
            raise ValueError(f"soft {list(self.soft)} must be a range within 0 and 1, the lower end first")
        return self

    @property
    def name(self) -> str:
        """'u-ignore, blank zero'."""
        between = f" {self.soft[0]:g} to {self.soft[1]:g}" if self.uncertain == "u-soft" else ""
        return f"{self.uncertain}{between}, blank {self.blank}"


class Targets(NamedTuple):
    """target float32 [n, F], NaN where masked; mask bool [n, F]; soft bool [n, F]: a target between the classes, which no metric counts."""

    target: np.ndarray
    mask: np.ndarray
    soft: np.ndarray


def label_columns() -> list[str]:
    """What `targets` reads of a cohort: all findings whichever are trained, for 'No Finding' hangs on the others."""
    return ["label_row", *map(label_column, FINDINGS)]


def targets(rows: pa.Table | pa.RecordBatch, policy: Policy, findings: Sequence[str] = FINDINGS) -> Targets:
    """Cohort rows with `label_columns()` -> targets of `findings`, in their order."""
    columns = [rows.column(label_column(f)).to_numpy(zero_copy_only=False) for f in FINDINGS]
    states = np.stack(columns, axis=1).astype(np.float32)  # a null is NaN
    labelled = np.asarray(rows.column("label_row").fill_null(False)).astype(bool)
    return resolve(states, labelled, policy, findings)


def resolve(states: np.ndarray, labelled: np.ndarray, policy: Policy, findings: Sequence[str] = FINDINGS) -> Targets:
    """states: float [n, 14] of 1, 0, -1 and NaN, in the order of FINDINGS; labelled: bool [n], the study has a label row."""
    blank, uncertain = np.isnan(states), states == UNCERTAIN
    target = np.where(states == POSITIVE, 1, np.where(states == NEGATIVE, 0, np.nan)).astype(np.float32)
    value = {"u-zeros": 0.0, "u-ones": 1.0, "u-ignore": np.nan, "u-soft": sum(policy.soft) / 2}[policy.uncertain]
    target[uncertain] = value
    if policy.blank == "zero":
        target[blank] = 0
    else:
        none = FINDINGS.index("No Finding")
        disease = [i for i, f in enumerate(FINDINGS) if f not in ("No Finding", "Support Devices")]
        other = (states[:, disease] == POSITIVE) | uncertain[:, disease]
        target[blank[:, none] & other.any(axis=1), none] = 0
    target[~labelled] = np.nan
    target = target[:, [FINDINGS.index(f) for f in findings]]
    mask = ~np.isnan(target)
    return Targets(target, mask, mask & (target != 0) & (target != 1))
