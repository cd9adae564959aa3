"""A synthetic MIMIC: the layouts, tables, pictures, reports and dirt of the real one, of patients who never were."""
