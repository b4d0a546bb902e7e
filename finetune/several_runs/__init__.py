"""Commands that carry out others: `sweep` trains one recipe many times, `distil` makes a small model of a large."""
