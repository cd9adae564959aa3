"""One page of what a folder of outputs holds."""

from contracts.storage import StorageOptions, place

SYNTHETIC = (
    "Everything on this page is synthetic: the X-rays are drawn phantoms, and the reports, charts, labels and outcomes were made "
    "up with them. Nothing here says anything about people or about how well a method works on them."
)
PATIENTS = "This page shows X-rays and charted words of patients. It may lie where the data themselves may lie, and nowhere else."


def is_synthetic(root: str | None, storage: StorageOptions) -> bool:
    """Whether the sources below `root` were made by `cxray synth`."""
    return root is not None and (place(root, storage) / "synth.json").exists()
