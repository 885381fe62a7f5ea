"""Generation with a cache."""
