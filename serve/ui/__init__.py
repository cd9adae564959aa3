"""The page (`cxray ui`): a client of the HTTP API and nothing more."""
