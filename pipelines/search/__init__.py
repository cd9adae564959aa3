"""Search: an index over one image encoder's and one text encoder's embeddings, and questions to it."""
