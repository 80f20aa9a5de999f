"""Curation: from raw videos to a catalogue of captioned and scored clips (§3, App. C)."""
