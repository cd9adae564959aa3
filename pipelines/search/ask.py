"""`cxray search INDEX`: a question in words, an image, or both -> studies.

.venv/bin/cxray search runs/demo/index --text "pleural effusion" -k 5
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import duckdb
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from contracts.errors import CxrayError, RowError
from contracts.findings import FINDINGS, label_column
from contracts.storage import Place
from models.encoders import load_image, load_text
from pipelines.images.decode import decode
from pipelines.images.stored import SIDE, from_stored, to_stored

RRF = 60  # reciprocal rank fusion's constant (Cormack, Clarke & Buettcher 2009)
SCAN_SHARE = 0.05  # with a filter that lets fewer through than this, scanning those is exact and quicker than walking a graph


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
        self.rows = pq.read_table(pa.BufferReader((model / files["rows"]).read()))
        self.images = self._load(model / files["image"])
        self.reports = self._load(model / files["report"]) if "report" in files else None

    @staticmethod
    def _load(file: Place) -> Any:
        index = faiss.deserialize_index(np.frombuffer(file.read(), np.uint8))
        if isinstance(inner := faiss.downcast_index(index.index), faiss.IndexHNSWFlat):
            inner.hnsw.efSearch = 128
        return index

    @cached_property
    def image_encoder(self) -> Any:
        return self._encoder(load_image, self.about["image_encoder"])

    @cached_property
    def text_encoder(self) -> Any:
        """Of the reports."""
        return self._encoder(load_text, self.about["text_encoder"])

    @cached_property
    def joint_text_encoder(self) -> Any:
        """Of words in the images' own space."""
        if not self.about["image_encoder"]["joint"]:
            raise CxrayError(
                f"{self.where}: words cannot be compared with images of `{self.about['image_encoder']['name']}`, which has no text side; "
                "search via reports, or index the features of an open_clip: encoder"
            )
        return load_text(self.about["image_encoder"]["name"])

    def _encoder(self, load: Any, about: dict[str, Any]) -> Any:
        encoder = load(about["name"])
        if encoder.fingerprint != about["fingerprint"]:
            raise CxrayError(f"{self.where}: `{about['name']}` has other weights now than when the index was made; make it again")
        return encoder

    def search(self, text: str | None, image: bytes | None, via: str | None, where: str | None, k: int) -> list[Answer]:
        """At most k studies, best first, one answer a study.

        via: 'image' compares with the images (words need a joint encoder), 'report' with the reports (an image asks through the reports
        of the images nearest to it). By default words go by reports where there are some, an image by images. where: SQL over
        study_id, split, view, group_id and the label columns. Raises CxrayError for a question that this index cannot answer.
        """
        if text is None and image is None:
            raise CxrayError("ask something: --text, --image, or both")
        if via not in (None, "report", "image") or k < 1:
            raise CxrayError("via is 'report' or 'image', and k at least 1")
        allowed = self._allowed(where)
        ranked = []
        if text is not None:
            by = via or ("report" if self.reports is not None else "image")
            query = self.text_encoder([text]) if by == "report" and self._reports() else self.joint_text_encoder([text])
            ranked.append(self._nearest(self._reports() if by == "report" else self.images, query.embedding, allowed, k))
        if image is not None:
            query = self._picture(image)
            if via == "report":
                ranked.append(self._nearest(self._reports(), self._reports_near(query), allowed, k))
            else:
                ranked.append(self._nearest(self.images, query, allowed, k))
        return self._answers(self._fuse(ranked)[:k] if len(ranked) > 1 else ranked[0][:k])

    def _reports(self) -> Any:
        if self.reports is None:
            raise CxrayError(f"{self.where}: has no reports; search via images")
        return self.reports

    def _picture(self, image: bytes) -> np.ndarray:
        try:
            stored = to_stored(decode(image, at_least=SIDE))
        except RowError as error:
            raise CxrayError(f"the image cannot be read: {error}") from None
        return self.image_encoder(from_stored(stored.jpeg)[None]).embedding

    def _reports_near(self, query: np.ndarray) -> np.ndarray:
        """The mean report vector of the nearest images that have one."""
        studies = self.rows["study_id"]
        report_of = {studies[i].as_py(): i for i in faiss.vector_to_array(self._reports().id_map).tolist()}
        ids = self.images.search(query, min(50, self.images.ntotal))[1][0].tolist()
        near = [report_of[study] for i in ids if i >= 0 and (study := studies[i].as_py()) in report_of][:5]
        if not near:
            raise CxrayError(f"{self.where}: no image near this one has a report; search via images")
        mean = np.mean([self._reports().reconstruct(int(i)) for i in near], axis=0, keepdims=True)
        return mean / np.linalg.norm(mean)

    def _allowed(self, where: str | None) -> np.ndarray | None:
        """Row numbers that the filter lets through; None for all."""
        if where is None:
            return None
        con = duckdb.connect()
        con.register(
            "rows_", self.rows.drop_columns(["report_impression", "report_findings"]).append_column("n_", pa.array(range(len(self.rows))))
        )
        con.execute("CREATE TABLE rows AS SELECT * FROM rows_")
        con.unregister("rows_")
        con.execute("SET enable_external_access = false; SET lock_configuration = true")  # the words come from outside
        try:
            return np.sort(con.execute(f"SELECT n_ FROM rows WHERE ({where})").fetchnumpy()["n_"]).astype(np.int64)
        except duckdb.Error as error:
            known = ", ".join(c for c in self.rows.column_names if not c.startswith("report_"))
            raise CxrayError(f"--where {where!r}: {str(error).splitlines()[0]} (columns: {known})") from None

    def _nearest(self, index: Any, query: np.ndarray, allowed: np.ndarray | None, k: int) -> list[tuple[int, float]]:
        """(row, cosine) of the k nearest studies, a study once."""
        if allowed is not None and len(allowed) <= max(k, SCAN_SHARE * len(self.rows)):
            return self._of_studies(self._scan(index, query, allowed))[:k]
        ask = 2 * k
        while True:
            parameters = self._parameters(index, allowed, ask)
            scores, ids = index.search(query, min(ask, index.ntotal), params=parameters)
            found = self._of_studies([(int(i), float(s)) for i, s in zip(ids[0], scores[0], strict=True) if i >= 0])
            if len(found) >= k or ask >= index.ntotal:
                return found[:k]
            ask *= 4

    @staticmethod
    def _parameters(index: Any, allowed: np.ndarray | None, ask: int) -> Any:
        selector = {} if allowed is None else {"sel": faiss.IDSelectorBatch(allowed)}
        if isinstance(faiss.downcast_index(index.index), faiss.IndexHNSWFlat):
            return faiss.SearchParametersHNSW(efSearch=max(128, 2 * ask), **selector)
        return faiss.SearchParameters(**selector)

    @staticmethod
    def _scan(index: Any, query: np.ndarray, allowed: np.ndarray) -> list[tuple[int, float]]:
        """All allowed rows of the index by exact cosine, best first."""
        have = np.intersect1d(allowed, faiss.vector_to_array(index.id_map))
        if not len(have):
            return []
        scores = index.reconstruct_batch(have) @ query[0]
        order = np.argsort(-scores, kind="stable")
        return [(int(have[i]), float(scores[i])) for i in order]

    def _of_studies(self, found: list[tuple[int, float]]) -> list[tuple[int, float]]:
        studies, best = self.rows["study_id"], {}
        for row, score in found:
            best.setdefault(studies[row].as_py(), (row, score))
        return list(best.values())

    def _answers(self, found: list[tuple[int, float]]) -> list[Answer]:
        answers = []
        for number, score in found:
            row = self.rows.slice(number, 1).to_pylist()[0]
            labels = {f: row[label_column(f)] for f in FINDINGS if row[label_column(f)] is not None}
            said = row["report_impression"] or row["report_findings"]
            answers.append(Answer(row["study_id"], row["row_id"], row["split"], row["view"], score, labels, said))
        return answers

    def _fuse(self, ranked: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
        """Reciprocal rank fusion by study: what stands high in both lists stands highest."""
        scores: dict[str, float] = {}
        row_of: dict[str, int] = {}
        for found in ranked:
            for rank, (row, _) in enumerate(found):
                study = self.rows["study_id"][row].as_py()
                row_of.setdefault(study, row)
                scores[study] = scores.get(study, 0.0) + 1 / (RRF + rank + 1)
        return sorted(((row_of[s], score) for s, score in scores.items()), key=lambda item: (-item[1], item[0]))
