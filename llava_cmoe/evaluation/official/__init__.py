"""The official files of CoIN and its descendants: read, scored as their scripts do, written and brought in."""
