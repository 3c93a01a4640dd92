"""A run opened and checked, what a stage learns from and trains with, and the facts that go on record."""
