"""Opening, probing and decoding sources."""
