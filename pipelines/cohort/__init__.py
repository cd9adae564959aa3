"""MIMIC's tables -> one row an image, with all that was known before its study, and what became of the patient after."""
