"""How radiologists put it: for each finding, sentences that state it, deny it and doubt it, and nouns for a joint denial.

{side} becomes right or left, {size} small, moderate or large, {place} a place in the lung.
"""

SIDES = ("right", "left")
SIZES = ("small", "moderate", "large", "mild")
PLACES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe", "lingula")

STATE: dict[str, tuple[str, ...]] = {
    "Atelectasis": (
        "Linear opacities at the {side} base are consistent with atelectasis.",
        "There is plate-like atelectasis at the {side} lung base.",
        "Low lung volumes with bibasilar atelectasis.",
        "Streaky {side} basilar density reflects volume loss from atelectasis.",
    ),
    "Cardiomegaly": (
        "The heart is enlarged.",
        "There is {size} cardiomegaly.",
        "The cardiac silhouette is enlarged.",
        "Heart size is clearly above normal, in keeping with cardiomegaly.",
    ),
    "Consolidation": (
        "There is dense consolidation in the {place} with air bronchograms.",
        "Consolidation of the {place} is present.",
        "A lobar consolidation occupies much of the {place}.",
    ),
    "Edema": (
        "There is {size} pulmonary edema.",
        "Perihilar haze and septal lines indicate pulmonary edema.",
        "Findings are those of interstitial pulmonary edema.",
        "Vascular redistribution with {size} edema.",
    ),
    "Enlarged Cardiomediastinum": (
        "The mediastinum is widened.",
        "There is widening of the upper mediastinal contour.",
        "The cardiomediastinal silhouette is enlarged above the hila.",
    ),
    "Fracture": (
        "There are displaced {side} rib fractures.",
        "A step in the cortex of two {side} ribs is diagnostic of fracture.",
        "Acute {side} lateral rib fractures are seen.",
    ),
    "Lung Lesion": (
        "There is a rounded nodule in the {place}.",
        "A well-defined {place} mass is seen.",
        "A pulmonary nodule projects over the {place}.",
    ),
    "Lung Opacity": (
        "There is a hazy opacity in the {place}.",
        "An ill-defined opacity projects over the {place}.",
        "Patchy opacity is again noted in the {place}.",
        "Increased opacification of the {place}.",
    ),
    "No Finding": (
        "No acute cardiopulmonary process.",
        "Normal chest radiograph.",
        "No acute cardiopulmonary abnormality.",
        "No evidence of acute intrathoracic disease.",
    ),
    "Pleural Effusion": (
        "There is a {size} {side} pleural effusion.",
        "A {size} {side} effusion blunts the costophrenic angle.",
        "{size} layering pleural fluid on the {side}.",
        "Meniscus of a {size} pleural effusion on the {side}.",
    ),
    "Pleural Other": (
        "There is {side} pleural thickening with calcified plaques.",
        "Chronic pleural thickening along the {side} chest wall.",
        "Calcified pleural plaque on the {side}.",
    ),
    "Pneumonia": (
        "Findings are compatible with pneumonia.",
        "There is {place} pneumonia.",
        "Appearances represent pneumonia in the proper clinical setting.",
        "Multifocal pneumonia.",
    ),
    "Pneumothorax": (
        "There is a {size} {side} apical pneumothorax.",
        "A {size} {side} pneumothorax is present, with a visible pleural line.",
        "{size} pneumothorax on the {side}.",
    ),
    "Support Devices": (
        "Support lines and tubes are in standard position.",
        "A catheter ends in the low SVC.",
        "An endotracheal tube or pacing hardware is in place.",
        "Monitoring and support devices are unchanged.",
    ),
}

DENY: dict[str, tuple[str, ...]] = {
    "Atelectasis": ("No atelectasis is seen.", "There is no volume loss to suggest atelectasis."),
    "Cardiomegaly": ("The heart is normal in size.", "Heart size is within normal limits.", "There is no cardiomegaly."),
    "Consolidation": ("The lungs are without focal consolidation.", "No focal consolidation is seen.", "There is no lobar consolidation."),
    "Edema": ("There is no pulmonary edema.", "No overt pulmonary edema.", "Vascularity is normal, without edema."),
    "Enlarged Cardiomediastinum": ("The mediastinal contours are normal.", "Mediastinal width is within normal limits."),
    "Fracture": ("No displaced rib fracture is identified.", "No acute fracture is seen.", "The ribs are without fracture."),
    "Lung Lesion": ("No suspicious nodule or mass.", "There is no pulmonary nodule."),
    "Lung Opacity": ("The lungs are clear of opacities.", "No parenchymal opacity is seen."),
    "Pleural Effusion": ("No pleural effusion is seen.", "The costophrenic angles are sharp, without effusion.", "There is no effusion."),
    "Pleural Other": ("There is no pleural thickening.", "No pleural plaque is seen."),
    "Pneumonia": ("There is no evidence of pneumonia.", "No convincing pneumonia.", "There is nothing to suggest pneumonia."),
    "Pneumothorax": ("No pneumothorax is seen.", "There is no pneumothorax.", "No visible pneumothorax on either side."),
    "Support Devices": ("No lines or tubes are in place.", "The support devices have been removed."),
}

DENY_TOGETHER = {
    "Consolidation": "focal consolidation",
    "Edema": "pulmonary edema",
    "Pleural Effusion": "pleural effusion",
    "Pneumothorax": "pneumothorax",
}

DOUBT: dict[str, tuple[str, ...]] = {
    "Atelectasis": ("Basilar density may represent atelectasis.", "Possible {side} basilar atelectasis."),
    "Cardiomegaly": ("The heart may be mildly enlarged.", "Borderline heart size; cardiomegaly cannot be excluded."),
    "Consolidation": ("An early consolidation in the {place} is possible.", "Density in the {place} could reflect consolidation."),
    "Edema": ("Mild pulmonary edema cannot be excluded.", "There may be slight interstitial edema."),
    "Enlarged Cardiomediastinum": ("Apparent mediastinal widening may be projectional.", "The mediastinum is possibly widened."),
    "Fracture": ("A subtle {side} rib fracture is possible.", "Contour irregularity of a {side} rib may be a fracture."),
    "Lung Lesion": ("A possible nodule in the {place} needs confirmation.", "Nodule versus nipple shadow in the {place}."),
    "Lung Opacity": ("There may be a faint opacity in the {place}.", "Questionable opacity in the {place}."),
    "Pleural Effusion": ("A trace {side} effusion is possible.", "A small {side} pleural effusion cannot be excluded."),
    "Pleural Other": ("Possible {side} pleural thickening.", "The {side} pleura may be thickened."),
    "Pneumonia": (
        "Pneumonia cannot be excluded.",
        "Superimposed infection is possible; pneumonia is in the differential.",
        "This may represent pneumonia.",
    ),
    "Pneumothorax": ("A tiny {side} apical pneumothorax cannot be excluded.", "Possible {side} pneumothorax versus skin fold."),
    "Support Devices": ("A line over the {side} chest may be external.", "Possible catheter fragment over the {side} chest."),
}

SAID = {1: STATE, 0: DENY, -1: DOUBT}
