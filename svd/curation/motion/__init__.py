"""Optical flow and camera motion."""
