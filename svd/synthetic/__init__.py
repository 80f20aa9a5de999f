"""Synthetic worlds whose every cut, motion, caption and defect is known, and a stand-in for UCF-101."""
