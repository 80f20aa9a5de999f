"""The ground floor: errors, atomic files and locks, retries, the device. Imports no other room."""
