"""The paper's data engine (§3.1, App. C): cuts, clips, motion, text, similarity, captions, filters, catalogue."""
