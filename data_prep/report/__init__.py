"""What a preparation says of itself: the printed summary and report.html."""
