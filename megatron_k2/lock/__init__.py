"""One writer at a time in a directory, on file systems that several machines share."""
