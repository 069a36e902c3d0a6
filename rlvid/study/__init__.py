"""A study with people: pairs of videos in the browser, answers in SQLite, results with intervals."""
