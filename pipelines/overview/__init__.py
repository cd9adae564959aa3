"""One page of what a folder of outputs holds."""
