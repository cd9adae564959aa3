"""Stored pictures one by one: which file and row group each lies in is known from the start."""

from collections import defaultdict
from collections.abc import Iterable

import pyarrow.parquet as pq

from contracts.dataset import Dataset
from contracts.storage import told


class Pictures:
    def __init__(self, images: Dataset) -> None:
        """images: a data set of stored pictures. Reads all of its ids."""
        self.images = images
        self._fs, _ = images.place.arrow()
        self._at: dict[str, tuple[str, int]] = {}
        with told(images.place):
            for path in images.paths():
                file = pq.ParquetFile(self._fs.open_input_file(path))
                for group in range(file.num_row_groups):
                    self._at |= dict.fromkeys(file.read_row_group(group, ["row_id"])["row_id"].to_pylist(), (path, group))

    def __contains__(self, row_id: object) -> bool:
        return row_id in self._at

    def read(self, row_ids: Iterable[str]) -> dict[str, bytes]:
        """The JPEGs of those that are there."""
        wanted: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for row_id in row_ids:
            if row_id in self._at:
                path, group = self._at[row_id]
                wanted[path][group].add(row_id)
        found: dict[str, bytes] = {}
        with told(self.images.place):
            for path, groups in wanted.items():
                with pq.ParquetFile(self._fs.open_input_file(path)) as file:
                    for group, ids in groups.items():
                        table = file.read_row_group(group, ["row_id", "image"])
                        for place, row_id in enumerate(table["row_id"].to_pylist()):
                            if row_id in ids:
                                found[row_id] = table["image"][place].as_py()
        return found
