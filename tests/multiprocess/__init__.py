"""Real processes that talk by gloo."""
