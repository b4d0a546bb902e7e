"""From files of instruction rows or parallel text to a prepared dataset; `prepare` is the way in."""
