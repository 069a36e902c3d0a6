"""The human study: pairs of videos in the browser, answers in SQLite, results with intervals."""
