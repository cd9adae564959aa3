"""The 14 CheXpert findings and their three states.

Names and order follow the label tables of MIMIC-CXR-JPG (Johnson et al. 2019, arXiv:1901.07042), which follow CheXpert
(Irvin et al. 2019, arXiv:1901.07031).
"""

FINDINGS: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)

POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1  # blank (not mentioned) is null, and is none of the three


def label_column(finding: str) -> str:
    """'Pleural Effusion' -> 'label_pleural_effusion'."""
    return "label_" + finding.lower().replace(" ", "_")
