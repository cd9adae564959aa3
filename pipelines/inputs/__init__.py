"""Charts -> what a model reads: the one way in, for training and for serving (`reading.Inputs`)."""
