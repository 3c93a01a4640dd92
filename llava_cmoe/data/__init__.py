"""What is learned: files on disk become canonical samples, and those become token batches."""
