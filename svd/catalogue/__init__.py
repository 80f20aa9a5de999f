"""The catalogue of clips: its tables and axes, and everything that reads or judges them without decoding a video."""
