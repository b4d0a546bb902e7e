"""A record becomes source and target text, and those become token ids: templates, tokenizers, languages."""
