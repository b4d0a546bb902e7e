"""One model of any family: loading it, its attention in packed rows, its loss, its adapters."""
