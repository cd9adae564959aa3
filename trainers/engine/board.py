"""Numbers on the way (TensorBoard) and at the end (a picture)."""

import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from contracts.storage import Place


class Board:
    """TensorBoard's event file in a folder anywhere; without a folder, nothing."""

    def __init__(self, place: Place | None) -> None:
        self.place = place
        if place is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.folder = place.local or Path(tempfile.mkdtemp(prefix="cxray-board-"))
            self.writer = SummaryWriter(str(self.folder))

    def write(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        if self.place is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Make what was written so far visible; a bucket has no appending, so that the file is put there again."""
        if self.place is not None:
            self.writer.flush()
            if self.place.local is None:
                for file in self.folder.iterdir():
                    (self.place / file.name).write(file.read_bytes())


def curves(steps: Sequence[Mapping[str, float]], epochs: Sequence[Mapping[str, float]], metric: str) -> bytes:
    """A PNG: the training loss by step, the learning rate, and by epoch the metric that decides."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    loss, rate, judged = figure.subplots(1, 3)
    loss.plot([s["loss"] for s in steps], linewidth=0.8)
    loss.set(title="training loss", xlabel="step")
    rate.plot([s["lr"] for s in steps])
    rate.set(title="learning rate", xlabel="step")
    judged.plot([e["epoch"] for e in epochs], [e[metric] for e in epochs], marker="o")
    judged.set(title=f"{metric} on validate", xlabel="epoch")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
