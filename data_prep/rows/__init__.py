"""Any row becomes a Record: instruction, input, output, history."""
