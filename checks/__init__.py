"""Tools that are run by hand, and take longer than a test may."""
