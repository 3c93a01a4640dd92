"""The pocket sequence, eight small rendered tasks, and the small backbone that ships with the package."""
