"""Scripts that measure; run them by hand, they are not tests."""
