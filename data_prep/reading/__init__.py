"""Files, folders, Hub ids and samples become rows."""
