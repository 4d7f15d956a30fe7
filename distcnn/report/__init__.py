"""report.html: what a run, or several side by side, came to. Read from their folders; nothing in them is changed."""
