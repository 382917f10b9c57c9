"""Recipes in TOML, shipped with the package. Each header says hardware, minutes and the expected result."""
