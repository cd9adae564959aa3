"""Unit vectors under the numbers of their rows, in FAISS: exact for few, a graph for many; asked for all, or for some of them."""

from typing import Any

import faiss
import numpy as np

from contracts.storage import Place, told

# Exact search of 377,110 x 512 takes 0.16 s, HNSW 0.5 ms after minutes of building; below this many rows exact is quick enough.
EXACT_UP_TO = 50_000
HNSW_LINKS, HNSW_BUILD = 32, 80  # neighbours a node, and candidates while building (Malkov & Yashunin 2018, arXiv:1603.09320)
HNSW_SEARCH = 128  # candidates while searching: recall@10 against exact search is stated by benchmarks/search.py
WALK_COST = 16  # a candidate on a walk through the graph takes as long as so many vectors of a scan

_PIECE = 16 << 20  # bytes written and read at once


class Vectors:
    """An index of vectors. Scores are inner products, so of unit vectors cosines."""

    def __init__(self, index: Any) -> None:
        """index: a faiss.IndexIDMap2 over exact or HNSW search; the ids are the numbers of rows."""
        self.index = index
        self._inner = faiss.downcast_index(index.index)
        self._graph = isinstance(self._inner, faiss.IndexHNSWFlat)
        self._flat = faiss.downcast_index(self._inner.storage) if self._graph else self._inner
        self.numbers: np.ndarray = faiss.vector_to_array(index.id_map)  # of the row at each place

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def kind(self) -> str:
        return "HNSW" if self._graph else "exact"

    @classmethod
    def read(cls, file: Place) -> "Vectors":
        """Piece by piece: bytes and index do not stand in memory side by side."""
        with told(file), file.fs.open(file.path, "rb", block_size=_PIECE) as data:
            return cls(faiss.read_index(faiss.PyCallbackIOReader(data.read, _PIECE)))  # pyright: ignore[reportArgumentType]

    def write(self, file: Place) -> None:
        """Piece by piece, into a folder that is there; a reader must not look before this has returned."""
        with told(file), file.fs.open(file.path, "wb", block_size=_PIECE) as data:
            faiss.write_index(self.index, faiss.PyCallbackIOWriter(data.write, _PIECE))  # pyright: ignore[reportArgumentType]

    def of(self, places: np.ndarray) -> np.ndarray:
        """The vectors at these places, float32 [places, width]."""
        return self._flat.reconstruct_batch(places)

    def nearest(self, query: np.ndarray, count: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(places of the vectors most like the query, best first, their scores): `count` of them, or as many as there are.

        query: float32 [1, width]. allowed: bool [rows], which rows may be found. A graph may miss some.
        """
        count = min(count, len(self))
        if not count:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        wide = max(HNSW_SEARCH, 2 * count)
        if allowed is None:
            parameters = faiss.SearchParametersHNSW(efSearch=wide) if self._graph else None
            return self._found(self._inner.search(query, count, params=parameters))
        mask = allowed[self.numbers]
        share = np.count_nonzero(mask) / len(self)
        # Of the candidates on a walk only `share` may stay, so as good an answer needs more of them; a look at each allowed one is exact.
        if not self._graph or share * share * len(self) <= WALK_COST * wide:
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorArray(np.flatnonzero(mask)))  # pyright: ignore[reportCallIssue]
            return self._found(self._flat.search(query, count, params=parameters))
        some = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))  # pyright: ignore[reportCallIssue]
        parameters = faiss.SearchParametersHNSW(efSearch=round(wide / share), sel=some)
        return self._found(self._inner.search(query, count, params=parameters))

    @staticmethod
    def _found(result: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's answer to one query, without the -1 that stand where it found too few."""
        (scores,), (places,) = result
        there = places >= 0
        return places[there], scores[there]


def grown(old: Vectors | None, vectors: np.ndarray, numbers: np.ndarray, exact_up_to: int = EXACT_UP_TO) -> Vectors:
    """`old` with these vectors added, or a new index: exact up to so many, a graph for more."""
    total = len(vectors) + (len(old) if old else 0)
    if old is not None and (total <= exact_up_to or old.kind == "HNSW"):
        old.index.add_with_ids(vectors, numbers)
        return Vectors(old.index)
    if old is not None:  # it has outgrown exact search
        vectors = np.concatenate([old.of(np.arange(len(old))), vectors])
        numbers = np.concatenate([old.numbers, numbers])
    if total <= exact_up_to:
        base: Any = faiss.IndexFlatIP(vectors.shape[1])
    else:
        base = faiss.IndexHNSWFlat(vectors.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        base.hnsw.efConstruction = HNSW_BUILD
    index = faiss.IndexIDMap2(base)
    index.add_with_ids(vectors, numbers)
    return Vectors(index)
