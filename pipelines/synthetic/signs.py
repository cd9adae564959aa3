"""What each finding does to a chart: complaint, vitals, laboratory, medicines and codes. Figures are plausible, not measured."""

from dataclasses import dataclass, field

KNOWN_LABS = (50813, 50882, 50902, 50912, 50931, 50971, 50983, 51006, 51222, 51265, 51301, 50963, 51003, 50820, 50821, 50818,
              50889, 51237, 50862, 50885, 51196)  # fmt: skip


@dataclass(frozen=True)
class LabItem:
    label: str
    category: str
    unit: str
    low: float
    high: float
    digits: int


LAB_ITEMS: dict[int, LabItem] = {
    50813: LabItem("Lactate", "Blood Gas", "mmol/L", 0.5, 2.0, 1),
    50818: LabItem("pCO2", "Blood Gas", "mm Hg", 35, 45, 0),
    50820: LabItem("pH", "Blood Gas", "units", 7.35, 7.45, 2),
    50821: LabItem("pO2", "Blood Gas", "mm Hg", 85, 105, 0),
    50862: LabItem("Albumin", "Chemistry", "g/dL", 3.5, 5.2, 1),
    50882: LabItem("Bicarbonate", "Chemistry", "mEq/L", 22, 32, 0),
    50885: LabItem("Bilirubin, Total", "Chemistry", "mg/dL", 0, 1.5, 1),
    50889: LabItem("C-Reactive Protein", "Chemistry", "mg/L", 0, 5, 1),
    50902: LabItem("Chloride", "Chemistry", "mEq/L", 96, 108, 0),
    50912: LabItem("Creatinine", "Chemistry", "mg/dL", 0.5, 1.2, 1),
    50931: LabItem("Glucose", "Chemistry", "mg/dL", 70, 105, 0),
    50963: LabItem("NTproBNP", "Chemistry", "pg/mL", 0, 852, 0),
    50971: LabItem("Potassium", "Chemistry", "mEq/L", 3.3, 5.1, 1),
    50983: LabItem("Sodium", "Chemistry", "mEq/L", 133, 145, 0),
    51003: LabItem("Troponin T", "Chemistry", "ng/mL", 0, 0.01, 2),
    51006: LabItem("Urea Nitrogen", "Chemistry", "mg/dL", 6, 20, 0),
    51196: LabItem("D-Dimer", "Hematology", "ng/mL", 0, 500, 0),
    51222: LabItem("Hemoglobin", "Hematology", "g/dL", 12, 16, 1),
    51237: LabItem("INR(PT)", "Hematology", "", 0.9, 1.1, 1),
    51265: LabItem("Platelet Count", "Hematology", "K/uL", 150, 400, 0),
    51301: LabItem("White Blood Cells", "Hematology", "K/uL", 4, 10, 1),
    50893: LabItem("Calcium, Total", "Chemistry", "mg/dL", 8.4, 10.3, 1),
    50960: LabItem("Magnesium", "Chemistry", "mg/dL", 1.6, 2.6, 1),
    51248: LabItem("MCH", "Hematology", "pg", 27, 32, 1),
    51277: LabItem("RDW", "Hematology", "%", 10.5, 15.5, 1),
}


@dataclass(frozen=True)
class Sign:
    """vitals: shifts of the mean. labs: typical value. home, given: (medicine, class). icd: the codes of version 9 and 10."""

    weight: float  # its part in the severity
    icd: tuple[str, str]
    complaints: tuple[str, ...] = ()
    vitals: dict[str, float] = field(default_factory=dict)
    labs: dict[int, float] = field(default_factory=dict)
    home: tuple[tuple[str, str], ...] = ()
    given: tuple[tuple[str, str], ...] = ()


SIGNS: dict[str, Sign] = {
    "Atelectasis": Sign(0.2, ("5180", "J9811"), ("Dyspnea", "Abd pain"), {"o2sat": -1.5, "resprate": 2},
                        home=(("albuterol sulfate [ProAir HFA]", "Asthma Therapy - Inhaled Beta-2 Agonists"),)),
    "Cardiomegaly": Sign(0.2, ("4293", "I517"), ("Leg swelling", "Palpitations"), {"sbp": 12, "dbp": 6}, {50963: 1200},
                         home=(("carvedilol", "Alpha-Beta Blockers"), ("aspirin", "Salicylate Analgesics"))),
    "Consolidation": Sign(0.5, ("481", "J181"), ("Cough", "Fever"), {"temperature": 1.2, "heartrate": 8}, {51301: 13.5, 50889: 80},
                          given=(("CefTRIAXone", ""),)),
    "Edema": Sign(1.0, ("514", "J810"), ("Dyspnea", "Orthopnea", "Leg swelling"),
                  {"heartrate": 10, "resprate": 6, "o2sat": -4.5, "sbp": 28, "dbp": 12}, {50963: 7000, 51003: 0.05, 51006: 34},
                  home=(("furosemide", "Diuretic - Loop"), ("metoprolol succinate", "Beta Blockers Cardiac Selective")),
                  given=(("Furosemide", ""), ("Nitroglycerin SL", ""))),
    "Enlarged Cardiomediastinum": Sign(0.5, ("4419", "I719"), ("Chest pain", "Back pain"), {"sbp": 15, "pain": 3}, {51196: 1900},
                                       given=(("Labetalol", ""),)),
    "Fracture": Sign(0.3, ("80700", "S2249XA"), ("s/p Fall", "MVC", "Rib pain"), {"pain": 6, "heartrate": 6},
                     given=(("OxycoDONE (Immediate Release)", ""), ("Ibuprofen", ""))),
    "Lung Lesion": Sign(0.3, ("1629", "C3490"), ("Hemoptysis", "Weight loss"), labs={50862: 3.1, 51222: 10.8},
                        home=(("oxycodone", "Analgesic Opioid Agonists"),)),
    "Lung Opacity": Sign(0.3, ("79319", "R918"), ("Cough", "Dyspnea"), {"o2sat": -1.0, "resprate": 1}),
    "Pleural Effusion": Sign(0.4, ("5119", "J90"), ("Dyspnea", "Pleuritic pain"), {"resprate": 3, "o2sat": -2}, {50862: 2.7},
                             home=(("spironolactone", "Aldosterone Receptor Antagonists"),)),
    "Pleural Other": Sign(0.1, ("5110", "J929"), ("Pleuritic pain",), {"pain": 2}),
    "Pneumonia": Sign(0.9, ("486", "J189"), ("Fever", "Cough", "Productive cough"),
                      {"temperature": 2.6, "heartrate": 18, "resprate": 5, "o2sat": -3.5, "sbp": -8},
                      {51301: 16.5, 50889: 150, 50813: 2.4},
                      given=(("CefTRIAXone", ""), ("Azithromycin", ""), ("Acetaminophen", ""))),
    "Pneumothorax": Sign(0.8, ("5128", "J939"), ("Chest pain", "Sudden dyspnea"),
                         {"pain": 5, "resprate": 6, "o2sat": -4, "heartrate": 14}, {50821: 66},
                         given=(("Morphine Sulfate", ""),)),
    "Support Devices": Sign(0.3, ("V4501", "Z950"), ("Weakness",), home=(("warfarin", "Anticoagulants - Coumarin"),)),
}  # fmt: skip

CONDITIONS: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "hypertension": (("4019", "I10"), ("lisinopril", "ACE Inhibitors")),
    "diabetes": (("25000", "E119"), ("metformin", "Antihyperglycemic - Biguanide Type")),
    "copd": (("496", "J449"), ("tiotropium bromide [Spiriva with HandiHaler]", "Asthma/COPD - Anticholinergic Agents, Inhaled")),
    "atrial fibrillation": (("42731", "I4891"), ("apixaban", "Direct Factor Xa Inhibitors")),
    "kidney disease": (("5859", "N189"), ("calcium acetate", "Phosphate Binders")),
    "coronary disease": (("41401", "I2510"), ("atorvastatin", "Antihyperlipidemic - HMG CoA Reductase Inhibitors (statins)")),
    "smoking": (("3051", "F17210"), ("nicotine [Nicoderm CQ]", "Smoking Deterrents - Nicotine-Type")),
}

SYMPTOMS = (("78605", "R0602"), ("78650", "R079"), ("78900", "R109"), ("78060", "R509"))
NEUTRAL_COMPLAINTS = ("Dyspnea", "Chest pain", "Weakness", "Transfer", "Abnormal CXR", "Dizziness")
NEUTRAL_MEDICINES = (("omeprazole", "Gastric Acid Secretion Reducers - Proton Pump Inhibitors (PPIs)"), ("multivitamin", ""),
                     ("docusate sodium", "Laxative - Surfactant"), ("vitamin D3", ""), ("levothyroxine", "Thyroid Hormones"))  # fmt: skip
NEUTRAL_DISPENSED = ("Ondansetron", "Sodium Chloride 0.9%  Flush", "Heparin Flush", "Acetaminophen", "Potassium Chloride")

ICD_TITLES: dict[tuple[str, int], str] = {
    ("5180", 9): "Pulmonary collapse", ("J9811", 10): "Atelectasis",
    ("4293", 9): "Cardiomegaly", ("I517", 10): "Cardiomegaly",
    ("481", 9): "Pneumococcal pneumonia [Streptococcus pneumoniae pneumonia]", ("J181", 10): "Lobar pneumonia, unspecified organism",
    ("514", 9): "Pulmonary congestion and hypostasis", ("J810", 10): "Acute pulmonary edema",
    ("4419", 9): "Aortic aneurysm of unspecified site without mention of rupture",
    ("I719", 10): "Aortic aneurysm of unspecified site, without rupture",
    ("80700", 9): "Closed fracture of rib(s), unspecified",
    ("S2249XA", 10): "Multiple fractures of ribs, unspecified side, initial encounter for closed fracture",
    ("1629", 9): "Malignant neoplasm of bronchus and lung, unspecified",
    ("C3490", 10): "Malignant neoplasm of unspecified part of unspecified bronchus or lung",
    ("79319", 9): "Other nonspecific abnormal finding of lung field", ("R918", 10): "Other nonspecific abnormal finding of lung field",
    ("5119", 9): "Unspecified pleural effusion", ("J90", 10): "Pleural effusion, not elsewhere classified",
    ("5110", 9): "Pleurisy without mention of effusion or current tuberculosis", ("J929", 10): "Pleural plaque without asbestos",
    ("486", 9): "Pneumonia, organism unspecified", ("J189", 10): "Pneumonia, unspecified organism",
    ("5128", 9): "Other spontaneous pneumothorax", ("J939", 10): "Pneumothorax, unspecified",
    ("V4501", 9): "Cardiac pacemaker in situ", ("Z950", 10): "Presence of cardiac pacemaker",
    ("4019", 9): "Unspecified essential hypertension", ("I10", 10): "Essential (primary) hypertension",
    ("25000", 9): "Diabetes mellitus without mention of complication, type II or unspecified type, not stated as uncontrolled",
    ("E119", 10): "Type 2 diabetes mellitus without complications",
    ("496", 9): "Chronic airway obstruction, not elsewhere classified",
    ("J449", 10): "Chronic obstructive pulmonary disease, unspecified",
    ("42731", 9): "Atrial fibrillation", ("I4891", 10): "Unspecified atrial fibrillation",
    ("5859", 9): "Chronic kidney disease, unspecified", ("N189", 10): "Chronic kidney disease, unspecified",
    ("41401", 9): "Coronary atherosclerosis of native coronary artery",
    ("I2510", 10): "Atherosclerotic heart disease of native coronary artery without angina pectoris",
    ("3051", 9): "Tobacco use disorder", ("F17210", 10): "Nicotine dependence, cigarettes, uncomplicated",
    ("78605", 9): "Shortness of breath", ("R0602", 10): "Shortness of breath",
    ("78650", 9): "Chest pain, unspecified", ("R079", 10): "Chest pain, unspecified",
    ("78900", 9): "Abdominal pain, unspecified site", ("R109", 10): "Unspecified abdominal pain",
    ("78060", 9): "Fever, unspecified", ("R509", 10): "Fever, unspecified",
}  # fmt: skip
