"""The browser page of a catalogue."""
