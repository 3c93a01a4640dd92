"""Every setting of a run, validated once: what it means stands beside it, with its unit. No tensor lives here."""
