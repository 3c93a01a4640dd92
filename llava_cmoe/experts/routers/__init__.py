"""When each expert of a site is used: one file per kind of router."""
