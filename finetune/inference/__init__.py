"""Prompts become texts."""
