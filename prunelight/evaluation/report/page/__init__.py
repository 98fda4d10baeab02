"""report.html: one self-contained page to decide from, drawn from report.json."""
