"""Raw videos: what the user names as one list of sources, and the stage that gathers them."""
