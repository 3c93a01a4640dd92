"""What people look at: tables and figures drawn from `results.json` alone, so no report ever costs a generation."""
