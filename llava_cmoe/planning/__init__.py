"""What learning costs, computed from a recipe and a config alone: parameters, memory, disk and hours."""
