"""The lowest layer: errors, atomic files and locks, retries, the device. Imports no other package of ours."""
