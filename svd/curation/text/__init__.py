"""Detection of written text in frames."""
