"""Many runs that answer one question: a grid over settings and seeds."""
