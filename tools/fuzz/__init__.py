"""Hostile input: what each reader of foreign files makes of damaged ones. The product never imports it."""
