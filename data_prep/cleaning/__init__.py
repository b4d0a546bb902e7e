"""Which records are kept: filters, duplicates, contamination, personal data; splits and mixtures."""
