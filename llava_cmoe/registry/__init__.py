"""What has been learned, on disk: one immutable, hashed directory per task."""
