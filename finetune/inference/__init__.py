"""Token ids become texts, and what they are worth."""
