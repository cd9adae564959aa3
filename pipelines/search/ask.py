"""`cxray search INDEX`: a question in words, an image, or both -> studies.

.venv/bin/cxray search runs/demo/index --text "pleural effusion" -k 5
"""

import json
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from contracts.errors import CxrayError, RowError
from contracts.findings import FINDINGS, label_column
from contracts.storage import Place
from models.encoders import load_known, load_text
from pipelines.images.stored import as_stored
from pipelines.search.vectors import Vectors

RRF = 60  # reciprocal rank fusion's constant (Cormack, Clarke & Buettcher 2009)
NOT_MENTIONED = -128  # a label's fourth state, beside 1, 0 and -1
FILTERS_KEPT = 32  # a byte a row each
FILTER_SECONDS = 10  # a condition that takes longer is no condition on these columns


@dataclass(frozen=True)
class Answer:
    """One study. score: cosine of the question and what was searched; of a question in two parts the fused rank score."""

    study_id: str
    row_id: str
    split: str
    view: str
    score: float
    labels: dict[str, int]  # 1, 0 or -1 of those that are mentioned
    impression: str | None


def table(answers: list[Answer]) -> str:
    """Answers as lines for a terminal."""
    if not answers:
        return "no study fits"
    lines = []
    for n, a in enumerate(answers, 1):
        said = ", ".join(f"{'no ' if v == 0 else 'perhaps ' if v < 0 else ''}{f}" for f, v in a.labels.items()) or "no labels"
        lines.append(f"{n:>2}. {a.score:6.3f}  study {a.study_id}  {a.split}  {a.view or 'view unknown'}  {said}")
        if a.impression:
            lines.append(f"      {a.impression[:160]}")
    return "\n".join(lines)


class Index:
    """An opened index. Raises CxrayError where there is none, and where an encoder is not the one that made it."""

    def __init__(self, where: Place) -> None:
        self.where = where
        model = where / "model"
        if not (model / "config.json").exists():
            raise CxrayError(f"{where}: no index here; make one with `cxray index`")
        self.about = json.loads((model / "config.json").read())
        files = self.about["files"]
        # In one piece: to find a row in a table of many costs more than the search does.
        self.rows = pq.read_table(pa.BufferReader((model / files["rows"]).read())).combine_chunks()
        # An answer takes ten rows of twenty columns; as one matrix, the labels come for the price of one.
        self._labels = np.stack(
            [pc.fill_null(self.rows[label_column(f)], pa.scalar(NOT_MENTIONED, pa.int8())).to_numpy() for f in FINDINGS], axis=1
        )
        self._shown = [self.rows[name].combine_chunks() for name in ("study_id", "row_id", "split", "view", "report_impression")]
        self._study = pc.dictionary_encode(self.rows["study_id"]).combine_chunks().indices.to_numpy()  # a small number for each
        self.images = Vectors.read(model / files["image"])
        self.reports = Vectors.read(model / files["report"]) if "report" in files else None
        self._filters: dict[str, np.ndarray] = {}

    @cached_property
    def image_encoder(self) -> Any:
        return load_known("image", self.about["image_encoder"], f"when {self.where} was made")

    @cached_property
    def text_encoder(self) -> Any:
        """Of the reports."""
        return load_known("text", self.about["text_encoder"], f"when {self.where} was made")

    @cached_property
    def joint_text_encoder(self) -> Any:
        """Of words in the images' own space; `words_by` says whether there is one."""
        return load_text(self.about["image_encoder"]["name"])

    def search(
        self, text: str | np.ndarray | None, image: bytes | np.ndarray | None, via: str | None, where: str | None, k: int
    ) -> list[Answer]:
        """At most k studies, best first, one answer a study.

        via: 'image' compares with the images (words need a joint encoder), 'report' with the reports (an image asks through the reports
        of the images nearest to it). By default words go by reports where there are some, an image by images. where: SQL over
        study_id, split, view, group_id and the label columns. text, image: or their vector, float32 [1, width], where an encoder of
        one's own has made it; of text the one that `words_by` says. Raises CxrayError for a question that this index cannot answer.
        """
        if text is None and image is None:
            raise CxrayError("ask something: --text, --image, or both")
        if via not in (None, "report", "image") or k < 1:
            raise CxrayError("via is 'report' or 'image', and k at least 1")
        allowed = None if where is None else self._allowed(where)
        ranked = []
        if text is not None:
            by = self.words_by(via)
            side, encoder = (self._reports(), "text_encoder") if by == "report" else (self.images, "joint_text_encoder")
            query = text if isinstance(text, np.ndarray) else getattr(self, encoder)([text]).embedding
            ranked.append(self._nearest(side, query, allowed, k))
        if image is not None:
            query = image if isinstance(image, np.ndarray) else self._picture(image)
            if via == "report":
                ranked.append(self._nearest(self._reports(), self._reports_near(query), allowed, k))
            else:
                ranked.append(self._nearest(self.images, query, allowed, k))
        return self._answers(self._fuse(ranked)[:k] if len(ranked) > 1 else ranked[0][:k])

    def words_by(self, via: str | None) -> Literal["report", "image"]:
        """What words are compared with: decides the encoder that they need. Raises CxrayError where this index cannot do so."""
        if via == "report" or (via is None and self.reports is not None):
            self._reports()
            return "report"
        if not self.about["image_encoder"]["joint"]:
            raise CxrayError(
                f"{self.where}: words cannot be compared with images of `{self.about['image_encoder']['name']}`, which has no text side; "
                "search via reports, or index the features of an open_clip: encoder"
            )
        return "image"

    def _reports(self) -> Vectors:
        if self.reports is None:
            raise CxrayError(f"{self.where}: has no reports; search via images")
        return self.reports

    def _picture(self, image: bytes) -> np.ndarray:
        try:
            picture = as_stored(image)
        except RowError as error:
            raise CxrayError(f"the image cannot be read: {error}") from None
        return self.image_encoder(picture[None]).embedding

    @cached_property
    def _report_of(self) -> np.ndarray:
        """int [studies]: the place of each study's report among the reports, -1 where it has none."""
        of = np.full(self._study.max(initial=-1) + 1, -1)
        of[self._study[self._reports().numbers]] = np.arange(len(self._reports()))
        return of

    def _reports_near(self, query: np.ndarray) -> np.ndarray:
        """The mean report vector of the nearest images that have one."""
        places, _ = self.images.nearest(query, 50)
        reports = self._report_of[self._study[self.images.numbers[places]]]
        near = reports[reports >= 0][:5]
        if not len(near):
            raise CxrayError(f"{self.where}: no image near this one has a report; search via images")
        mean = self._reports().of(near).mean(axis=0, keepdims=True)
        return mean / np.linalg.norm(mean)

    @cached_property
    def _table(self) -> Any:
        """A DuckDB that holds the rows without their reports, and reaches nothing else: a filter's words come from outside."""
        con = duckdb.connect(config={"python_enable_replacements": False})
        numbered = self.rows.drop_columns(["report_impression", "report_findings"]).append_column("n_", pa.array(np.arange(len(self.rows))))
        con.register("rows_", numbered)
        con.execute("CREATE TABLE rows AS SELECT * FROM rows_")
        con.unregister("rows_")
        con.execute("SET enable_external_access = false; SET lock_configuration = true")
        return con

    def _allowed(self, where: str) -> np.ndarray:
        """bool [rows]: those that the filter lets through. Kept, as rows never change and a page asks with one filter again and again."""
        allowed = self._filters.get(where)
        if allowed is None:
            if len(self._filters) >= FILTERS_KEPT:
                self._filters.clear()
            allowed = self._filters[where] = self._let_through(where)
        return allowed

    def _let_through(self, where: str) -> np.ndarray:
        """Raises CxrayError for what is no condition on these columns."""
        con = self._table.cursor()  # of its own: questions may come from several threads
        stop = threading.Timer(FILTER_SECONDS, con.interrupt)
        stop.start()
        try:
            # `filter` takes one expression and no statement, so that a filter cannot change the table for those who ask next.
            numbers = con.table("rows").filter(where).select("n_").fetchnumpy()["n_"]
        except duckdb.Error as error:
            known = ", ".join(c for c in self.rows.column_names if not c.startswith("report_"))
            raise CxrayError(f"--where {where!r}: {str(error).splitlines()[0]} (columns: {known})") from None
        finally:
            stop.cancel()
        allowed = np.zeros(len(self.rows), bool)
        allowed[numbers] = True
        return allowed

    def _nearest(self, side: Vectors, query: np.ndarray, allowed: np.ndarray | None, k: int) -> list[tuple[int, float]]:
        """(row, cosine) of the k nearest studies, a study once."""
        # A study has one to four images, and those lie close together: with twice k, every second question had to be asked again.
        ask, there = 4 * k, len(side) if allowed is None else np.count_nonzero(allowed)
        while True:
            places, scores = side.nearest(query, ask, allowed)
            best: dict[int, tuple[int, float]] = {}
            rows = side.numbers[places]
            for study, row, score in zip(self._study[rows].tolist(), rows.tolist(), scores.tolist(), strict=True):
                best.setdefault(study, (row, score))
            if len(best) >= k or ask >= there:
                return list(best.values())[:k]
            ask *= 4

    def _answers(self, found: list[tuple[int, float]]) -> list[Answer]:
        answers = []
        for (number, score), stated in zip(found, self._labels[[number for number, _ in found]].tolist(), strict=True):
            labels = {f: state for f, state in zip(FINDINGS, stated, strict=True) if state != NOT_MENTIONED}
            # Cell by cell: to take ten rows of a column costs more than ten looks into it.
            study, row, split, view, said = [column[number].as_py() for column in self._shown]
            answers.append(Answer(study, row, split, view, score, labels, said or self.rows["report_findings"][number].as_py()))
        return answers

    def _fuse(self, ranked: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
        """Reciprocal rank fusion by study: what stands high in both lists stands highest."""
        scores: dict[int, float] = {}
        row_of: dict[int, int] = {}
        for found in ranked:
            for rank, (row, _) in enumerate(found):
                study = int(self._study[row])
                row_of.setdefault(study, row)
                scores[study] = scores.get(study, 0.0) + 1 / (RRF + rank + 1)
        return sorted(((row_of[s], score) for s, score in scores.items()), key=lambda item: (-item[1], item[0]))
