"""What lies in a run's directory, and who writes and reads it."""
