"""What the cohort and the radiologists say of studies that were predicted: the parts to judge by themselves, and a second reference."""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from contracts.dataset import Dataset
from contracts.errors import CxrayError
from contracts.findings import FINDINGS, NEGATIVE, POSITIVE, label_column
from contracts.storage import Place
from evaluation.predictions import Predictions

RARE = 0.05  # of the labelled studies of train
AGES = (40, 60, 80)
COUNTS = 3  # so many findings, or more
RADIOLOGISTS_POLICY = "What the radiologists marked 1 is positive, 0 or blank is negative, and -1 is left out."


def subgroups(cohort: Dataset, judged: Predictions) -> dict[str, dict[str, np.ndarray]]:
    """{kind: {part: bool [n]}} of these studies: by sex, age band, view, emergency visit, and number of findings.

    Raises CxrayError where a study is not in the cohort, or is there of another patient or split.
    """
    table = cohort.table(["study_id", "row_id", "group_id", "split", "view", "stay_id", "chart_age", "chart_sex"]).sort_by("row_id")
    table = table.filter(pc.is_in(table["study_id"], value_set=pa.array(judged.studies.tolist(), pa.string())))
    first = pc.index_in(pa.array(judged.studies.tolist(), pa.string()), value_set=table["study_id"].combine_chunks())
    if first.null_count:
        raise CxrayError(
            f"{cohort.place}: {first.null_count:,} predicted studies are not in this cohort; name the cohort they were predicted from"
        )
    one = table.take(first)
    for column, values in (("group_id", judged.groups), ("split", judged.splits)):
        if (one[column].to_numpy() != values).any():
            raise CxrayError(f"{cohort.place}: differs from the predictions in {column}; predict again, from this cohort")
    views: dict[str, set[str]] = {}
    for study, view in zip(table["study_id"].to_pylist(), table["view"].to_pylist(), strict=True):
        views.setdefault(study, set()).add(view or "not stated")
    view = [next(iter(own)) if len(own := views[study]) == 1 else "several" for study in judged.studies]
    age = one["chart_age"].to_numpy()
    count = counts(cohort, judged.studies)
    visit = np.where(pc.is_valid(one["stay_id"]).to_numpy(), "with a visit", "without")
    return {
        "sex": _by(np.array([s or "not stated" for s in one["chart_sex"].to_pylist()])),
        "age": _by(np.array([_band(a) for a in age])),
        "view": _by(np.array(view)),
        "emergency visit": _by(visit),
        "number of findings": _by(np.array([str(c) if c < COUNTS else f"{COUNTS} or more" for c in count])),
    }


def counts(cohort: Dataset, studies: np.ndarray) -> np.ndarray:
    """How many findings each of these studies of the cohort has, int [n]: of all but 'No Finding', whichever a model was asked about."""
    columns = [label_column(f) for f in FINDINGS if f != "No Finding"]
    table = cohort.table(["study_id", *columns])
    own = table.take(pc.index_in(pa.array(studies.tolist(), pa.string()), value_set=table["study_id"].combine_chunks()))
    return np.sum([pc.fill_null(pc.equal(own[c], POSITIVE), False).to_numpy() for c in columns], axis=0)


def rare(cohort: Dataset, targets: Sequence[str]) -> list[str]:
    """The findings that under RARE of the labelled studies of train have; none where train has no labelled study."""
    there = [t for t in targets if t in FINDINGS]
    table = cohort.table(
        ["study_id", *map(label_column, there)], where=(pc.field("split") == "train") & (pc.field("label_row") == pa.scalar(True))
    )
    studies = pc.count_distinct(table["study_id"]).as_py()
    having = {t: pc.count_distinct(table.filter(pc.equal(table[label_column(t)], POSITIVE))["study_id"]).as_py() for t in there}
    return [t for t in there if studies and having[t] < RARE * studies]


def radiologists(file: Place, studies: np.ndarray, targets: Sequence[str]) -> np.ndarray:
    """The labels that radiologists gave these studies by RADIOLOGISTS_POLICY: float64 [n, F], NaN in all of a study they did not read.

    file: mimic-cxr-2.1.0-test-set-labeled.csv of MIMIC-CXR-JPG (Johnson et al. 2024, doi:10.13026/jsn5-t979), which says 'Airspace
    Opacity' for Lung Opacity. Raises CxrayError where it is another file, or none of the studies is in it.
    """
    text = pyarrow.csv.ConvertOptions(
        column_types={"study_id": pa.string()} | {name: pa.float64() for name in (*FINDINGS, "Airspace Opacity")}
    )
    try:
        table = pyarrow.csv.read_csv(io.BytesIO(file.read()), convert_options=text)
    except pa.ArrowInvalid:
        raise CxrayError(f"{file}: not a CSV of radiologists' labels: needs study_id, and 1, 0, -1 or nothing by finding") from None
    table = table.rename_columns(["Lung Opacity" if name == "Airspace Opacity" else name for name in table.column_names])
    if "study_id" not in table.column_names or not set(targets) & set(table.column_names):
        raise CxrayError(f"{file}: has no study_id, or none of the findings; name mimic-cxr-2.1.0-test-set-labeled.csv (`radiologists`)")
    if len(pc.unique(table["study_id"])) < len(table):
        raise CxrayError(f"{file}: names a study twice")
    row = pc.index_in(pa.array(studies.tolist(), pa.string()), value_set=table["study_id"].combine_chunks())
    there = pc.is_valid(row).to_numpy(zero_copy_only=False)
    if not there.any():
        raise CxrayError(f"{file}: holds none of the studies of test that were predicted; is it of this cohort?")
    labels = np.full((len(studies), len(targets)), np.nan)
    own = table.take(row.drop_null())
    for i, name in enumerate(targets):
        if name in own.column_names:
            states = own[name].to_numpy().astype(np.float64)
            if not np.isin(states[~np.isnan(states)], (POSITIVE, NEGATIVE, -1)).all():
                raise CxrayError(f"{file}: {name} has values other than 1, 0, -1 and nothing")
            labels[there, i] = np.where(np.isnan(states), 0, np.where(states == -1, np.nan, states))
    return labels


def _by(values: np.ndarray) -> dict[str, np.ndarray]:
    return {str(value): values == value for value in np.unique(values)}


def _band(age: float) -> str:
    if np.isnan(age):
        return "not stated"
    under = [a for a in AGES if age < a]
    if not under:
        return f"{AGES[-1]} and over"
    place = AGES.index(under[0])
    return f"under {AGES[0]}" if place == 0 else f"{AGES[place - 1]} to {AGES[place] - 1}"
