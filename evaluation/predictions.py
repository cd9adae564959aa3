"""Predictions as arrays. A study is the unit of evaluation: its images' probabilities are averaged."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from contracts.dataset import Dataset
from contracts.errors import CxrayError


@dataclass(frozen=True)
class Predictions:
    """What one model said of n studies. Studies stand in the order of their ids, so that models of the same rows can be compared."""

    model: str
    targets: tuple[str, ...]
    studies: np.ndarray  # [n], str
    groups: np.ndarray  # [n], str: the patients
    splits: np.ndarray  # [n], str
    scores: np.ndarray  # [n, F], float64 probabilities
    labels: np.ndarray  # [n, F], float64: 1, 0, or NaN where nothing is known


def read(data: Dataset, splits: Sequence[str] | None = None) -> Predictions:
    """A data set of predictions (contracts.schema.predictions_schema; one row an image) -> its studies; splits: only these.

    Raises CxrayError where a row has no study, scores or labels, where an image was scored twice, where the images of a study differ in
    patient, split or label, and where a patient stands in two splits.
    """
    where, model, targets = str(data.place), str(data.manifest["model"]), tuple(data.manifest["targets"])
    table = data.table(["row_id", "group_id", "split", "study_id", "scores", "labels"])
    for column in ("study_id", "scores", "labels"):
        if table[column].null_count:
            raise CxrayError(
                f"{where}: {table[column].null_count:,} rows have no {column}: there is nothing to judge; predict labelled studies"
            )
    if len(pc.unique(table["row_id"])) < len(table):
        raise CxrayError(f"{where}: an image was scored twice; were two runs written into one folder?")
    wide = table.schema.field("scores").type.list_size
    if wide != len(targets):
        raise CxrayError(f"{where}: dataset.json names {len(targets)} targets, and a row has {wide} scores; predict again")
    split = _of_patients(table, where)
    if splits is not None:
        inside = np.isin(split, list(splits))
        table, split = table.filter(pa.array(inside)), split[inside]
    scores, labels = (_matrix(table[column], wide) for column in ("scores", "labels"))
    if np.isnan(scores).any():
        raise CxrayError(f"{where}: {np.isnan(scores).sum():,} scores are null or not a number; predict again")
    studies, study = _codes(table["study_id"])
    n = len(studies)
    sums = np.zeros((n, wide))
    np.add.at(sums, study, scores)
    cell = (study[:, None] * wide + np.arange(wide)).ravel()
    return Predictions(
        model,
        targets,
        studies,
        _one_each(table["group_id"].to_numpy(), study, n, f"{where}: a study belongs to two patients"),
        _one_each(split, study, n, f"{where}: a study stands in two splits"),
        sums / np.bincount(study, minlength=n)[:, None],
        _one_each(labels.ravel(), cell, n * wide, f"{where}: the images of a study have different labels").reshape(n, wide),
    )


def _of_patients(table: pa.Table, where: str) -> np.ndarray:
    """The split of each row. Raises CxrayError where one patient's rows are of two: what is fitted on one would be known to the other."""
    split = table["split"].to_numpy()
    patients, patient = _codes(table["group_id"])
    _one_each(split, patient, len(patients), f"{where}: a patient stands in two splits; make the cohort and its predictions again")
    return split


def _matrix(column: pa.ChunkedArray, wide: int) -> np.ndarray:
    """Fixed lists -> float64 [n, wide], NaN for null."""
    return column.combine_chunks().flatten().cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(-1, wide)


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Strings -> (the distinct ones, sorted; each row's place among them)."""
    encoded = column.combine_chunks().dictionary_encode()
    words = np.array(encoded.dictionary.to_pylist(), dtype=object)
    order = np.argsort(words)
    places = np.empty(len(words), np.int64)
    places[order] = np.arange(len(words))
    return words[order], places[encoded.indices.to_numpy()]


def _one_each(values: np.ndarray, places: np.ndarray, count: int, otherwise: str) -> np.ndarray:
    """The one value that all rows of a place share. Raises CxrayError, saying `otherwise`, where they do not."""
    one = np.empty(count, values.dtype)
    one[places] = values
    same = one[places] == values
    if values.dtype.kind == "f":
        same |= np.isnan(one[places]) & np.isnan(values)
    if not same.all():
        raise CxrayError(otherwise)
    return one
