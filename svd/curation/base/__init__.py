"""What all steps of curation share: records of sources and clips, messages between processes."""
