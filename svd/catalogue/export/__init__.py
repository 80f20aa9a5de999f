"""Export of clips as a data set for others."""
