"""Images: bytes of any origin -> one 8-bit grey picture -> the stored 518 px square."""
