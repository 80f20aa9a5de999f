"""What every room uses: errors, atomic files and locks, retries, the device. Imports no other room."""
